"""Measure time and memory of a detector on this machine, stage by stage.

Example:
  dn-dino benchmark checkpoint.pth --size 480 640 --batch_size 4 --half
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median, quantiles

import torch
from torch import Tensor

from ..errors import UserError
from ..machine import describe_machine, peak_memory_mb, seconds
from ..predictor import Predictor
from .common import add_detector_arguments, load

WARM_UP = 3  # runs that are not measured


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_arguments(parser, batch_size=1)
    add = parser.add_argument
    text = "size of the model's input; default: that of a 480 x 640 image after resizing"
    add("--size", nargs=2, type=int, metavar=("H", "W"), help=text)
    add("--runs", type=int, default=20, metavar="N", help="measured runs (20)")


def run(args: Namespace) -> None:
    if args.runs < 2 or min(args.size or [32]) < 32:
        raise UserError("runs: at least 2; size: at least 32 pixels")
    predictor, height, width = load(args), 480, 640
    if args.size:
        height, width = args.size
        predictor = replace(predictor, size=min(args.size), max_size=max(args.size))
    generator = torch.Generator().manual_seed(0)
    shape = args.batch_size, 3, height, width
    images = list(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
    times = measure(predictor, images, args.runs)

    device, machine = predictor.device.type, describe_machine(predictor.device.type)
    input_size = " x ".join(map(str, predictor.prepare(images).tensors.shape))
    threads = f", {machine['threads']} threads" if device == "cpu" else ""
    print(f"{machine['name']}{threads}, torch {torch.__version__}")
    mode = f"{'half' if args.half else 'single'} precision{', compiled' if args.compile else ''}"
    print(f"input {input_size}, {mode}, {args.runs} runs")
    print(f"{'ms per batch':13}{'median':>9}  quartiles")
    for name, values in times.items():
        low, _, high = quantiles(values, n=4)
        print(f"{name:13}{median(values):9.1f}  {low:.1f} to {high:.1f}")
    speed = 1000 * len(images) / median(times["all"])
    print(f"{speed:.2f} images/s, peak memory {peak_memory_mb():.0f} MB")


@torch.no_grad()
def measure(predictor: Predictor, images: Sequence[Tensor], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each stage, and of all, in each run on a batch."""
    device, sizes = predictor.device, torch.tensor([image.shape[-2:] for image in images])
    times: dict[str, list[float]] = {"preprocess": [], "model": [], "postprocess": [], "all": []}
    for number in range(-WARM_UP, runs):
        clock = [seconds(device)]
        batch = predictor.prepare(images)
        clock.append(seconds(device))
        outputs = predictor.forward(batch)
        clock.append(seconds(device))
        for result in predictor.postprocess(outputs, sizes.to(device)):
            {name: value.cpu() for name, value in result.items()}
        clock.append(seconds(device))
        spans = [*pairwise(clock), (clock[0], clock[-1])]
        for values, (start, end) in zip(times.values(), spans, strict=True):
            if number >= 0:
                values.append(1000 * (end - start))
    return times
