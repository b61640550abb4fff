"""The command `dn-dino`, in a checkout `python -m models`: see `dn-dino --help`.

Every command is a module of `commands/` with `add_arguments(parser)` and `run(args)`; its docstring
is its help: a sentence, and an example. Only the chosen one is imported.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import UserError

COMMANDS: dict[str, str] = {
    "predict": "detect objects in images and videos, and draw them",
    "eval": "COCO's 12 figures of a checkpoint on a data set",
    "export": "write a detector for other programs: ONNX, .pt2",
    "convert": "checkpoints of other projects, and to them; safetensors",
    "inspect": "what a checkpoint contains; where its queries look on an image",
    "demo": "a web page to try a detector on images",
    "benchmark": "time and memory of a detector, stage by stage",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting."""

    def error(self, message: str):
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for a user error; 1 if the reader of the output is gone, as `| head`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)  # not that of the packages it uses
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in COMMANDS else ""
    program = f"dn-dino {name}".strip()
    try:
        if not name:
            epilog = "".join(f"  {key:10} {text}\n" for key, text in COMMANDS.items())
            parser = Parser(
                program,
                description="Detectors of the DN-DETR and DINO papers: use, convert, measure.",
                epilog=f"commands, each with --help:\n{epilog}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
            parser.parse_args(words[:1])
        command = import_module(f".commands.{name}", __package__)
        sentence, example = (command.__doc__ or "").split("\n\n", 1)
        parser = Parser(
            program,
            description=sentence,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(parser)
        command.run(parser.parse_args(words[1:]))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (UserError, OSError) as error:  # an OSError names its file
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0
