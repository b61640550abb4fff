"""Times evaluation and training steps of any config, with their memory and a floor.

    python benchmarks/bench_step.py -c configs/dino_4scale_r50.py --batch_size 1
    python benchmarks/bench_step.py -c configs/dn_dab_detr_r50.py --side= --side=--amp

Takes main.py's options. Every --side adds a model with further options, --released the released
code on the CPU; sides take turns, step by step, so that other load affects all of them equally.
Evaluation is forward pass and post-processing of --eval_batch_size images, training the engine's
step of --batch_size. Weights are random; images and targets are random and always the same.

The floor is the time that the step's matrix products, attention and convolutions need at the rates
of a large product and a large 3 x 3 convolution, measured in the same run. Memory is on a GPU the
peak that torch allocates, on a CPU the growth of the process since it imported its modules.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.step_worker import BUILDERS
from engine import AMP_DTYPES
from models.errors import UserError
from models.machine import choose_device, describe_machine, seconds
from util.config import ALIASES, FIXED, RETIRED, Config, parse_command_line

MODES = ["eval", "train"]


class Side:
    """A model in one mode, in a process of its own; see step_worker.py."""

    def __init__(self, label: str, cfg: Config, job: dict):
        self.label = label
        self.dtype = AMP_DTYPES[cfg.amp_dtype] if cfg.amp else torch.float32
        self.images = cfg.batch_size if job["mode"] == "train" else cfg.eval_batch_size
        worker = Path(__file__).with_name("step_worker.py")
        command = [sys.executable, str(worker), json.dumps(job | {"images": self.images})]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.answer()  # it is built

    def ask(self, command: str) -> dict:
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{self.label}: its process stopped")


class Ceilings:
    """Times a large matrix product and a large convolution."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        n, images = (2048, 1) if device.type == "cpu" else (8192, 32)
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        x = torch.randn(images, 256, 64, 64, device=device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
        weight = weight.to(memory_format=torch.channels_last)
        self.device = device
        convolve = lambda: F.conv2d(x, weight, padding=1)
        self.runs = {"product": lambda: a @ b, "convolution": convolve}
        self.flops = {"product": 2 * n**3, "convolution": 2 * 64**2 * images * weight.numel()}
        self.times: dict[str, list[float]] = {name: [] for name in self.runs}

    def measure(self) -> None:
        for name, run in self.runs.items():
            start = seconds(self.device)
            run()
            self.times[name].append(seconds(self.device) - start)

    def flops_per_s(self) -> dict[str, float]:
        return {name: self.flops[name] / min(times) for name, times in self.times.items()}


def released_values(cfg: Config) -> dict:
    """All options of the released code."""
    if cfg.modelname not in BUILDERS:
        raise UserError(f"released: it has to be one of {', '.join(BUILDERS)}, not {cfg.modelname}")
    values = dict.fromkeys(RETIRED) | FIXED | dataclasses.asdict(cfg)
    values |= {old: values[new] for old, new in ALIASES.items()}
    selects, learns = cfg.query_selection != "static", cfg.query_selection == "mixed"
    values |= {"two_stage": selects, "two_stage_type": "standard" if selects else "no"}
    values |= {"use_mqs": learns, "embed_init_tgt": learns}
    values["num_classes"] = values["dn_labelbook_size"] = cfg.num_labels
    return values | {"device": "cpu", "dataset_file": "coco"}


def start_sides(args: argparse.Namespace, options: list[str], device: str, mode: str) -> list[Side]:
    job = {"mode": mode, "size": args.size, "objects": args.objects, "device": device}
    sides = []
    if args.released:
        cfg = parse_command_line(options)
        code = {"released": str(args.released.resolve()), "values": released_values(cfg)}
        sides.append(Side("released", cfg, job | code))
    for further in args.side:
        own = [*options, *shlex.split(further)]
        more = {"released": "", "options": own}
        sides.append(Side(f"ours {further}".strip(), parse_command_line(own), job | more))
    return sides


def measure(sides: list[Side], device: torch.device, repeats: int) -> list[dict]:
    """An entry for each side, whose process then ends."""
    ceilings = {side.dtype: Ceilings(device, side.dtype) for side in sides}
    runs: dict[Side, list[dict]] = {side: [] for side in sides}
    for i in range(1 + repeats):
        for side in sides:
            answer = side.ask("run")
            runs[side] += [answer] if i else []  # the first is a warm-up
        for ceiling in ceilings.values():
            ceiling.measure()
    return [summary(side, runs[side], ceilings[side.dtype]) for side in sides]


def summary(side: Side, runs: list[dict], ceiling: Ceilings) -> dict:
    ms = statistics.median(run["ms"] for run in runs)
    entry = {"side": side.label, "median_ms": ms, "images_per_s": 1e3 * side.images / ms}
    entry |= {"min_ms": min(run["ms"] for run in runs), "runs": runs, **side.ask("finish")}
    entry["median_cpu_ms"] = statistics.median(run["cpu_ms"] for run in runs)
    side.process.communicate()  # without a further command it ends
    if flops := entry.get("flops"):
        entry["flops_per_s"] = rates = ceiling.flops_per_s()
        products = flops.get("matrix product", 0) + flops.get("attention", 0)
        floor = products / rates["product"] + flops.get("convolution", 0) / rates["convolution"]
        entry["floor_ms"] = 1e3 * floor
    return entry


def print_rows(mode: str, entries: list[dict]) -> None:
    for entry in entries:
        times = [entry[key] for key in ("median_ms", "min_ms", "median_cpu_ms")]
        cells = [mode, entry["side"], *(f"{ms:.1f} ms" for ms in times)]
        cells += [f"{entry['images_per_s']:.2f}", f"{entry['peak_MiB']:.0f} MiB"]
        floor, ratio = entry.get("floor_ms"), entries[0]["median_ms"] / entry["median_ms"]
        cells += [f"{floor:.1f} ms, {floor / entry['min_ms']:.0%}" if floor else "-"]
        print(f"| {' | '.join(cells)} | {ratio:.2f} |", flush=True)


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        usage="bench_step.py [OPTION OF MAIN.PY ...] [OPTION ...]",
        description=__doc__,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", nargs=2, type=int, default=[480, 640], metavar=("H", "W"), help="of the images")
    add("--mode", nargs="+", choices=MODES, default=MODES, help="what to time; default: both")
    add("--objects", type=int, default=20, metavar="N", help="in every image")
    add("--repeats", type=int, default=5, metavar="N", help="after a warm-up; default: 5")
    text = "a model with further options, e.g. --side= --side='--amp --batch_size 4'"
    add("--side", action="append", metavar="OPTIONS", help=text)
    text = "a checkout of DN-DETR or DINO, whose operator runs in PyTorch"
    add("--released", type=Path, metavar="DIR", help=text)
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    args, options = parser.parse_known_args()
    args.side = args.side or [""]
    try:
        device = choose_device(parse_command_line(options).device)
        if args.released and device.type != "cpu":
            raise UserError("released: that code is timed on the CPU; use --device cpu")
        report = {"command": f"python {shlex.join(sys.argv)}", "date": time.strftime("%Y-%m-%d")}
        machine = describe_machine(device.type)
        report |= {"machine": machine, "torch": torch.__version__, "modes": {}}
        print(f"{machine['name']}, {machine['threads']} threads, torch {torch.__version__}")
        columns = "step", "side", "median", "minimum", "CPU time", "images/s", "peak memory"
        columns += "floor and its share of the minimum", "times as fast as the first"
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for mode in args.mode:
            sides = start_sides(args, options, str(device), mode)
            report["modes"][mode] = measure(sides, device, args.repeats)
            print_rows(mode, report["modes"][mode])
    except UserError as e:
        parser.error(str(e))
    if args.json:
        args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
