"""Convert a checkpoint of transformers (DETR, DAB-DETR, Deformable DETR), MMDetection (these, DINO)
or detrex (DAB-DETR, DN-DETR, DAB- and DN-Deformable-DETR, DINO) to this project's, which contains
config and classes; or this project's to transformers or to the format of the authors' code.

example:
  dn-dino convert dino_r50_4scale_12ep.pth --output dino.safetensors
  dn-dino convert outputs/run/checkpoint.pth --output dab --to transformers
"""

import argparse
import logging
from pathlib import Path

from ..build import read_config
from ..conversion import SOURCES, read, released, transformers
from ..errors import UserError
from ..registry import MODELS
from ..weights import write_checkpoint
from .common import config_of

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="checkpoint; a directory of transformers")
    add("--output", required=True, metavar="OUT", type=Path, help="file or, there, directory")
    text = "whose checkpoint it is (default: as its names tell)"
    add("--from", dest="source", default="auto", choices=("auto", *SOURCES), help=text)
    targets = ("dn_dino", "transformers", "released")
    add("--to", default="dn_dino", choices=targets, help="default: dn_dino, this project's")
    text = "of the file (default: as the name of OUT ends)"
    add("--format", default="", choices=("pth", "safetensors"), help=text)
    text = "config or published config with options that the file does not tell"
    add("-c", "--config_file", metavar="FILE", help=text)
    text = f"use this model's published config: {', '.join(MODELS)}"
    add("-m", "--modelname", choices=MODELS, metavar="NAME", help=text)
    add("--ema", action="store_true", help="convert the averaged weights (EMA)")
    text = "the detector was trained on BGR images, which detrex's files do not tell"
    add("--bgr", action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
    """Convert, write and say what was written."""
    output: Path = args.output
    if output.exists() and output.samefile(args.file):
        raise UserError(f"--output: {output} is the checkpoint itself; name another file")
    if args.to == "released" and "safetensors" in (args.format, output.suffix[1:]):
        raise UserError("--format: the authors' code does not read safetensors; name a .pth file")
    if args.to != "transformers" and output.is_dir():
        raise UserError(f"--output: {output} is a directory; name a file")
    config = config_of(args)
    values = read_config(config) if config else None
    checkpoint = read(args.file, args.source, values, args.ema, args.bgr)
    if args.to == "transformers":
        transformers.write(output, checkpoint)
    else:
        content = released.export(checkpoint) if args.to == "released" else checkpoint
        write_checkpoint(output, content, args.format)
    name, backbone = checkpoint["config"]["modelname"], checkpoint["config"]["backbone"]
    rows = checkpoint["class_map"]["categories"]
    logger.info("%s: %s with %s, %d classes", output, name, backbone, len(rows))
    if args.to == "released":
        if backbone.startswith("timm/"):
            logger.info("note: the authors' code has no backbone %s", backbone)
        if any(label != id_ for label, id_, _ in rows):
            pairs = ", ".join(f"{id_} -> {label}" for label, id_, _ in rows)
            logger.info("note: the authors' code uses category ids as labels; renumber: %s", pairs)
