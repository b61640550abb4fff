"""The exception for a user's mistake, and what its message may end with."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class UserError(Exception):
    """A mistake that the user can correct: the commands print it as one line and exit with 2.

    A data-loading worker re-raises an exception with its traceback written into the message; only
    what follows the exception's name is for the user, so the rest is cut off here.
    """

    def __init__(self, message: str):
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def import_extra(module: str, extra: str) -> ModuleType:
    """An optional package; UserError with the extra that installs it if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"pip install dn_dino[{extra}]"
        raise UserError(f"this needs the package {error.name}: {remedy}") from error
