"""What the commands that run a detector share."""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from ..class_map import ClassMap
from ..coco import CocoAnnotations
from ..errors import UserError
from ..machine import choose_device
from ..predictor import Predictor, load_detector
from ..registry import MODELS


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """The checkpoint, and what it lacks."""
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="checkpoint, a file or URL")
    text = "config to use, not the checkpoint's: a file, or the name of a published one"
    add("-c", "--config_file", metavar="FILE", help=text)
    text = f"use this model's published config: {', '.join(MODELS)}"
    add("-m", "--modelname", choices=MODELS, metavar="NAME", help=text)
    add("--ema", action="store_true", help="use the averaged weights (EMA)")


def add_detector_arguments(parser: ArgumentParser, batch_size: int | None = 4) -> None:
    """The checkpoint, and how it runs; None is for a command that takes one image at a time."""
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--device", default="", help="cpu, cuda, ...; default: a GPU if available")
    text = "compute in half precision: bfloat16, or float16 on a GPU without it"
    add("--half", action="store_true", help=text)
    text = "compile backbone and encoder (torch.compile): minutes at the start, faster on a GPU"
    add("--compile", action="store_true", help=text)
    if batch_size is not None:
        text = f"images of equal size per batch ({batch_size})"
        names = "--batch_size", "--eval_batch_size"
        add(*names, type=int, default=batch_size, metavar="N", help=text)


def config_of(args: Namespace) -> str | None:
    """The config that -m or -c names, if any."""
    return MODELS[args.modelname].config if args.modelname else args.config_file


def load_checkpoint(args: Namespace, **how: Any) -> Predictor:
    """The detector of the checkpoint arguments; `how` it runs, as in `load_detector`."""
    if not args.checkpoint:
        raise UserError("name a checkpoint, a file or URL")
    return load_detector(args.checkpoint, config_of(args), ema=args.ema, **how)


def load(args: Namespace) -> Predictor:
    """The detector that all arguments describe."""
    if getattr(args, "batch_size", 1) < 1:
        raise UserError("batch_size: at least 1")
    device = choose_device(args.device)
    return load_checkpoint(args, device=device, half=args.half, compile=args.compile)


def read_split(predictor: Predictor, root: Path, split: str = "val2017") -> CocoAnnotations:
    """A split of a data set in COCO 2017's layout; see `read_annotations`."""
    annotations = root / "annotations" / f"instances_{split}.json"
    return read_annotations(predictor, root / split, annotations)


def read_annotations(predictor: Predictor, images: Path, annotations: Path) -> CocoAnnotations:
    """A data set with the detector's labels. Those of a released checkpoint are category ids as far
    as possible, as in `main.py --eval`."""
    class_map: Any = predictor.class_map
    if predictor.labels_are_ids:
        how = {"num_classes": class_map.num_classes, "first": predictor.model.first_id}
        class_map = partial(ClassMap.of_released, **how)
    return CocoAnnotations(images, annotations, class_map)
