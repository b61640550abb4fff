"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: `main.py` prints it as one line and exits with status 2.

    A data-loading worker re-raises an exception with its traceback written into the message; only
    what follows the exception's name is for the user, so the rest is cut off here.
    """

    def __init__(self, message: str):
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())
