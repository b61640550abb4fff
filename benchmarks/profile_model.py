"""Parameters, FLOPs and latency of any config's stages in evaluation, and its peak memory.

    python benchmarks/profile_model.py -c configs/dino_4scale_r50.py --size 800 1333

Takes main.py's options. FLOPs are multiply-adds, as in papers on DETRs; torch counts twice as many.
They include convolutions, matrix products, attention and deformable sampling, for which see
`sampling_flops` in common.py, and no elementwise operations. The decoder includes the box heads
that refine its anchors. Weights and the --eval_batch_size images are random; memory is as in
bench_step.py.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import count_flops, flops_by_kind, memory
from benchmarks.steps import make_step
from models.detector import Detector
from models.errors import UserError
from models.machine import choose_device, describe_machine, seconds
from util.config import parse_command_line

# Giga multiply-adds, averaged over images of COCO val2017, and million parameters, in the papers.
PUBLISHED = {"dino_4scale_r50": (279, 47), "dn_dab_detr_r50": (94, 44)}
PARTS = {  # of the parameters, by their names
    "backbone": "^backbone",
    "input projection": "^input_proj",
    "heads": "class_embed|bbox_embed",
    "encoder": r"^transformer\.encoder",
    "decoder": r"^transformer\.decoder",
    "queries": "",
}


class Stages:
    """Divides what a clock or a counter measures among the stages of a detector's forward pass."""

    def __init__(self, model: Detector):
        if not model.has_queries:
            raise UserError("modelname: a Faster R-CNN has other stages, which are not measured")
        self.stage, self.read, self.last = "other", lambda: 0.0, 0.0
        self.spent: Counter[str] = Counter()
        self.mark("backbone", model.image_backbone, "forward")
        self.mark("input projection", model.input_proj, "forward")
        encoder = getattr(model.transformer, "encoder", None)  # Anchor DETR has layers alone
        for part in [encoder] if encoder else model.encoder_layers:
            self.mark("encoder", part, "forward")
        self.mark("query selection", model, "queries")
        self.mark("decoder", model, "decode")
        self.mark("class heads", model, "classify")

    def mark(self, stage: str, module: nn.Module, method: str) -> None:
        function = getattr(module, method)

        def call(*args):
            before = self.enter(stage)
            result = function(*args)
            self.enter(before)
            return result

        setattr(module, method, call)

    def enter(self, stage: str) -> str:
        """Begin a stage; returns the one that it interrupts."""
        now, before = self.read(), self.stage
        self.spent[before] += now - self.last
        self.stage, self.last = stage, now
        return before

    def measure(self, run: Callable, read: Callable[[], float]) -> Counter[str]:
        """{stage: how far `read` advances in it} of one run."""
        self.spent, self.read, self.last = Counter(), read, read()
        run()
        self.enter("other")
        return self.spent


def parameters_by_part(model: nn.Module) -> Counter[str]:
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        parts[part] += parameter.numel()
    return parts


def profile(options: list[str], size: tuple[int, int], repeats: int) -> dict:
    """What is printed, in multiply-adds, milliseconds and MiB."""
    cfg = parse_command_line(options)
    device = choose_device(cfg.device)
    before, _ = memory(device)
    model, run = make_step("eval", cfg, device, size, num_objects=0)
    stages = Stages(model)
    run()
    clock = lambda: seconds(device)
    runs = [stages.measure(run, clock) for _ in range(repeats)]
    peak = memory(device)[1] - before
    with count_flops() as counter:
        flops = stages.measure(run, counter.get_total_flops)
    return {
        "machine": describe_machine(device.type),
        "parameters": parameters_by_part(model),
        "multiply_adds": {stage: flops[stage] // 2 for stage in runs[0]},
        "multiply_adds_by_kind": {k: n // 2 for k, n in flops_by_kind(counter).items()},
        "median_ms": {s: 1e3 * statistics.median(r[s] for r in runs) for s in runs[0]},
        "peak_MiB": peak / 2**20,
    }


def show(report: dict, published: tuple[int, int] | None) -> None:
    machine, flops, ms = (report[key] for key in ("machine", "multiply_adds", "median_ms"))
    total, millions = sum(flops.values()), lambda n: f"{n / 1e6:.1f} M"
    print(f"{machine['name']}, {machine['threads']} threads, torch {torch.__version__}")
    print("| stage | G multiply-adds | latency |\n|---|---|---|")
    for stage in ms:
        print(f"| {stage} | {flops[stage] / 1e9:.2f} | {ms[stage]:.1f} ms |")
    print(f"| total | {total / 1e9:.2f} | {sum(ms.values()):.1f} ms |")
    kinds = report["multiply_adds_by_kind"].items()
    print("multiply-adds:", ", ".join(f"{kind} {n / 1e9:.2f} G" for kind, n in kinds))
    parts = report["parameters"]
    each = ", ".join(f"{part} {millions(n)}" for part, n in parts.items())
    print(f"parameters: {millions(sum(parts.values()))}: {each}")
    print(f"peak memory: {report['peak_MiB']:.0f} MiB")
    if published:
        print(f"published: {published[0]} G, {published[1]} M; see benchmarks/README.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="profile_model.py -c FILE [OPTION OF MAIN.PY ...] [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config_file", required=True, metavar="FILE", help="config file; see configs/")
    add("--size", nargs=2, type=int, default=[800, 1333], metavar=("H", "W"), help="of the images")
    add("--repeats", type=int, default=5, metavar="N", help="after a warm-up; default: 5")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    args, options = parser.parse_known_args()
    try:
        report = profile(["-c", args.config_file, *options], args.size, args.repeats)
    except UserError as e:
        parser.error(str(e))
    show(report, PUBLISHED.get(Path(args.config_file).stem))
    if args.json:
        args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
