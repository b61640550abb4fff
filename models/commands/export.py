"""Write a checkpoint's detector for other programs: ONNX, or torch.export's .pt2.

example: images of 640 x 640 in, as bytes; scores, labels and boxes out

  dn-dino export checkpoint.pth --size 640 640 --batch_size 1 --with_processing
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..download import local_file
from ..errors import UserError
from .common import add_checkpoint_arguments, load_checkpoint, read_split


def add_arguments(parser: ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--format", choices=["onnx", "torch"], default="onnx", help="(onnx)")
    add("--output", type=Path, metavar="FILE", help="default: beside the checkpoint")
    add("--opset", type=int, default=18, metavar="N", help="of ONNX, 18 or more (18)")
    add("--batch_size", default="dynamic", metavar="N", help="a number or dynamic (dynamic)")
    text = "height and width, or dynamic (dynamic)"
    add("--size", nargs="+", default=["dynamic"], metavar="H W", help=text)
    text = "take uint8 RGB images, give scores, labels and boxes in pixels"
    add("--with_processing", action="store_true", help=text)
    text = "data set: compare the AP on its val2017 as well"
    add("--coco_path", type=Path, metavar="DIR", help=text)
    text = "ONNX with convolutions in 8 bits, with ranges measured on --coco_path's train2017"
    add("--int8", action="store_true", help=f"{text}; AP may fall by 0.02")


def run(args: Namespace) -> None:
    from ..export import FORMATS, Target, export_detector

    batch_size = numbers("batch_size", [args.batch_size], 1)
    size = numbers("size", args.size, 2)
    if args.opset < 18:
        raise UserError(f"opset: {args.opset} is less than 18, the first that torch.onnx writes")
    target = Target(
        format=args.format,
        size=(size[0], size[1]) if size else None,
        batch_size=batch_size[0] if batch_size else None,
        with_processing=args.with_processing,
        opset=args.opset,
        int8=args.int8,
    )
    predictor, checkpoint = load_checkpoint(args), local_file(args.checkpoint)
    output = args.output or checkpoint.with_suffix(FORMATS[args.format])
    if output.resolve() == checkpoint.resolve():
        raise UserError(f"output: {output} is the checkpoint itself")
    dataset = read_split(predictor, args.coco_path) if args.coco_path else None
    calibration = None
    if args.int8 and args.coco_path:
        calibration = read_split(predictor, args.coco_path, "train2017")
    figures = export_detector(predictor, checkpoint, output, target, dataset, calibration)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    print("\n".join(f"  {name:18} {value:.3g}" for name, value in figures.items()))


def numbers(name: str, words: list[str], count: int) -> list[int]:
    """`count` positive numbers, or none for the word dynamic."""
    if words == ["dynamic"]:
        return []
    if len(words) != count or not all(word.isdecimal() and int(word) for word in words):
        expected = " ".join(["N"] if count == 1 else ["H", "W"])
        raise UserError(f"{name}: {' '.join(words)} is neither {expected} nor dynamic")
    return [int(word) for word in words]
