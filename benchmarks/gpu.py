"""Tries and measures everything that needs a GPU, in less than nine minutes.

    make gpu                                            # all parts
    python benchmarks/gpu.py --parts op_build syncs     # some of them
    python benchmarks/gpu.py --device cpu --size 64 64  # the same logic with toy models

Needs torch, torchvision, timm, scipy and numpy, but no network; installs nothing. Each part is a
process with a time limit, so that none stops another. The most important ones come first, and
after each one gpu_NAME.json and gpu_NAME.md are written in benchmarks/results.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import torch  # whatever else may be missing is imported by the parts that need it

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOY = ["configs/toy/dino.py", "configs/toy/dn_dab_detr.py"]
CONFIGS = {"cuda": ["configs/dino_4scale_r50.py", "configs/dn_dab_detr_r50.py"], "cpu": TOY}
SKIPPED = 77  # exit status
Args, Row = argparse.Namespace, dict[str, Any]
Rows = Iterator[Row]


def skip(reason: str) -> NoReturn:
    """End the process of a part that cannot run here."""
    print(reason)
    sys.exit(SKIPPED)


def call(*command: str) -> None:
    """Run Python with a command; if it fails, so does the part."""
    if status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        sys.exit(status)


def report_of(*command: str) -> Any:
    """What a benchmark writes to the JSON file that is its last argument."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.json"
        call(*command, str(path))
        return json.loads(path.read_text())


def op_build(args: Args) -> Rows:
    """Compile deformable attention where it is not."""
    from ops import native
    from ops.setup import CompileError, find_nvcc

    backend = "cuda" if args.device == "cuda" else "cpp"
    try:
        nvcc = find_nvcc() if backend == "cuda" else ""
        native.load(backend)
    except CompileError as reason:
        skip(str(reason))
    except native.Unavailable:
        call("ops/setup.py", "--quiet", "build_ext", "--inplace")
    yield {"nvcc": nvcc, "library": Path(native.load(backend)._name).name}


def op_tests(args: Args) -> Rows:
    """The tests of deformable attention that need this device."""
    if importlib.util.find_spec("pytest") is None:
        skip("pytest is not installed")
    on_gpu = "(cuda or gpu) and not build and not kernel_compiles"
    chosen = on_gpu if args.device == "cuda" else "baseline and definition"
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        call("-m", "pytest", "tests/test_ops.py", "-k", chosen, f"--junitxml={report}")
        suite = ElementTree.parse(report).getroot()[0].attrib
    yield {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}


def op_times(args: Args) -> Rows:
    """Milliseconds of each implementation of deformable attention."""
    script = "benchmarks/bench_ms_deform_attn.py"
    for case in report_of(script, "--device", args.device, "--output")["cases"]:
        keys = "shape", "dtype", "locations", "direction", "largest_disagreement"
        yield {key: case[key] for key in keys} | case["median_ms"]


def timing(mode: str, model: int, runs: list[list[str]], args: Args) -> Rows:
    """Time and memory of training steps or evaluation, of the sides of each run."""
    on_gpu, config = args.device == "cuda", CONFIGS[args.device][model]
    command = ["benchmarks/bench_step.py", "-c", config, "--no_pretrained_backbone"]
    command += ["--device", args.device, "--size", *map(str, args.size), "--mode", mode]
    command += ["--repeats", "10" if on_gpu else "1"]
    for sides in runs if on_gpu else runs[:1]:
        report = report_of(*command, *(f"--side={side}" for side in sides), "--json")
        for entry in report["modes"][mode]:
            keys = "side", "median_ms", "images_per_s", "peak_MiB", "floor_ms"
            yield {key: entry[key] for key in keys}


def toy_training(args: Args, config: str, steps: int, **options: Any) -> tuple:
    """State, criterion and batches of `steps` steps on toy images, as in trainer.py."""
    from datasets.coco import build_dataset
    from datasets.loader import build_loader
    from datasets.toy import make_toy_coco
    from models import build_model
    from models.machine import choose_device
    from train_state import TrainState
    from util.config import load_config
    from util.distributed import seed_everything

    options |= {"pretrained_backbone": False, "num_workers": 0, "epochs": 1}
    with tempfile.TemporaryDirectory() as directory:
        cfg = load_config(config, {"coco_path": directory, **options})
        make_toy_coco(directory, num_train=steps * cfg.accumulate * cfg.batch_size, num_val=0)
        dataset = build_dataset(cfg, "train")
        batches = list(build_loader(dataset, cfg, train=True))
    cfg = dataclasses.replace(cfg, num_classes=dataset.class_map.num_classes)
    seed_everything(cfg.seed)
    model, criterion, _ = build_model(cfg)
    model.to(choose_device(args.device))
    return TrainState(cfg, model, dataset.class_map, steps), criterion, batches


def check_close(values: dict[str, float], tolerance: float) -> None:
    """RuntimeError if a value is NaN or differs from the first one by more, relatively."""
    first, *others = values.values()
    if not all(abs(x / first - 1) <= tolerance for x in others):
        raise RuntimeError(f"more than {tolerance:.0%} of difference: {values}")


def syncs(args: Args) -> Rows:
    """The lines of a training step that wait for the GPU, and how often; the third step's."""
    if args.device == "cpu":
        skip("a CPU has nothing to wait for")
    from engine import train_steps

    for config in CONFIGS[args.device]:
        state, criterion, batches = toy_training(args, config, 3)
        steps = train_steps(state, state.model, criterion, batches)
        for _ in range(2):
            next(steps)
        torch.cuda.set_sync_debug_mode("warn")
        found = count_syncs(partial(next, steps))
        torch.cuda.set_sync_debug_mode("default")
        for place, times in [*found.most_common(), ("all", found.total())]:
            yield {"config": config, "place": place, "times": times}


def count_syncs(step: Callable[[], Any]) -> Counter[str]:
    """Torch's warnings of synchronisation in `step`, by the innermost line of this repository."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [(Path(f.filename), f) for f in traceback.extract_stack()[:-1]]
            ours = lambda path: path.is_relative_to(ROOT) and "site-packages" not in path.parts
            path, frame = [(path, f) for path, f in frames if ours(path)][-1]
            found[f"{path.relative_to(ROOT)}:{frame.lineno} `{frame.line}`"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        step()
    return found


def amp(args: Args) -> Rows:
    """Mean losses of the toy DINO in each precision; the last ones must be close to fp32's."""
    from engine import train_steps

    on_gpu = args.device == "cuda"
    steps, group = (60, 10) if on_gpu else (1, 1)
    smaller = {} if on_gpu else {"batch_size": 2}  # fp16 is slow on CPUs
    sides = {"fp32": {}, "bf16": {"amp": True}, "fp16": {"amp": True, "amp_dtype": "fp16"}}
    losses = {}
    for name, options in sides.items():
        state, criterion, batches = toy_training(args, TOY[0], steps, **smaller, **options)
        taken = train_steps(state, state.model, criterion, batches)
        losses[name] = [step.stats["loss"] for step in taken]
    for i in range(0, steps, group):
        means = {name: sum(values[i : i + group]) / group for name, values in losses.items()}
        yield {"steps": f"{i + 1} to {i + group}", **means}
    check_close(means, 0.1)


def ddp(args: Args) -> Rows:
    """Steps of two batches alone and in DistributedDataParallel, with NCCL on a GPU."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from engine import train_steps

    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    two = {"accumulate": 2, "batch_size": 2}
    for config in CONFIGS[args.device]:
        state, criterion, batches = toy_training(args, config, 2, **two)
        found = {"alone": list(train_steps(state, state.model, criterion, batches))}
        with tempfile.TemporaryDirectory() as directory:
            state, criterion, batches = toy_training(args, config, 2, **two)
            dist.init_process_group(backend, f"file://{directory}/store", rank=0, world_size=1)
            parallel = DistributedDataParallel(state.model)
            found["DDP"] = list(train_steps(state, parallel, criterion, batches))
            dist.destroy_process_group()
        for figure in ("loss", "grad_norm"):
            for i in range(2):
                values = {name: steps[i].stats[figure] for name, steps in found.items()}
                yield {"config": config, "figure": figure, "step": i + 1, **values}
                check_close(values, 0.01)


TRAIN = [["--batch_size 1", "--batch_size 1 --amp"], ["--batch_size 2", "--batch_size 2 --amp"]]
EVAL = [["--eval_batch_size 1", "--eval_batch_size 1 --amp", "--eval_batch_size 8 --amp"]]
COMPILED = [["--batch_size 2 --amp --compile"], ["--batch_size 1 --amp --compile"]]
PARTS: dict[str, tuple[float, Callable[[Args], Rows]]] = {
    "op_build": (120, op_build),  # limit in seconds on a GPU; the most important first
    "op_tests": (120, op_tests),
    "train_dino": (120, partial(timing, "train", 0, TRAIN)),
    "train_dn_detr": (120, partial(timing, "train", 1, TRAIN)),
    "syncs": (60, syncs),
    "amp": (90, amp),
    "ddp": (90, ddp),
    "op_times": (90, op_times),
    "compile_dino": (120, partial(timing, "train", 0, COMPILED)),
    "eval_dino": (90, partial(timing, "eval", 0, EVAL)),
    "eval_dn_detr": (90, partial(timing, "eval", 1, EVAL)),
    "compile_dn_detr": (120, partial(timing, "train", 1, COMPILED)),
}


def run_part(name: str, args: Args, limit: float) -> Row:
    """Run a part in a process of its own; returns its outcome, seconds, rows and, unless all went
    well, the end of its output. A crash, a hang and an error end only that process."""
    start, status = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as directory:
        rows, log = Path(directory) / "rows", Path(directory) / "log"
        command = [sys.executable, __file__, "--child", name, "--device", args.device]
        command += ["--size", *map(str, args.size), "--output", str(rows)]
        with log.open("w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(limit)
            finally:  # also when interrupted, and whatever it started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        output = log.read_text(errors="replace").strip()
        lines = rows.read_text().splitlines() if rows.exists() else []
    part = {"outcome": outcome(status, output, limit), "rows": [json.loads(x) for x in lines]}
    part["seconds"] = round(time.perf_counter() - start, 1)
    return part if status == 0 else part | {"output": output[-4000:]}


def outcome(status: int | None, output: str, limit: float) -> str:
    """In a line: `status` is the exit status of a part, None if it reached its limit."""
    lines = output.splitlines() or ["no output"]
    if status is None:
        return f"failed: stopped after {limit:.0f} s"
    if status < 0:
        return f"failed: {signal.Signals(-status).name}"
    if status in (0, SKIPPED):
        return f"skipped: {lines[-1]}" if status else "ok"
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return f"failed: {(errors or lines)[-1]}"


def table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x).replace("|", "\\|")
    lines = [columns, ["---"] * len(columns)]
    lines += [[show(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(report: Row) -> str:
    """Outcome and seconds of every part, then the rows of each."""
    parts, machine = report["parts"], report["machine"]["name"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = f"# {machine}\n\n`{report['command']}`, {report['date']}; {versions}\n\n"
    keys = "outcome", "seconds"
    text += table([{"part": name} | {k: part[k] for k in keys} for name, part in parts.items()])
    tables = [f"\n## {name}\n\n{table(p['rows'])}" for name, p in parts.items() if p["rows"]]
    return text + "".join(tables)


def main() -> None:
    from models.machine import describe_machine

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add, side = parser.add_argument, ("H", "W")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    text = f"of {', '.join(PARTS)}; default: all"
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=text)
    add("--size", nargs=2, type=int, default=[800, 1333], metavar=side, help="of images in timings")
    add("--minutes", type=float, default=8.5, metavar="X", help="for all parts; default: 8.5")
    add("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:  # writes each row as soon as it is known
        with args.output.open("w") as file:
            for row in PARTS[args.child][1](args):
                print(json.dumps(row), file=file, flush=True)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu runs the same logic with toy models")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end = time.monotonic() + 60 * args.minutes
    report = {"command": f"python {shlex.join(sys.argv)}", "date": time.strftime("%Y-%m-%d")}
    tf32 = torch.backends.cudnn.allow_tf32  # of convolutions
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN TF32": tf32}
    report |= {"machine": describe_machine(args.device), "versions": versions, "parts": {}}
    name = report["machine"]["name"] if args.device == "cuda" else "cpu"
    path = args.output / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        limit = end - time.monotonic()
        if args.device == "cuda":
            limit = min(limit, PARTS[name][0])
        part = {"outcome": "skipped: no time is left", "seconds": 0, "rows": []}
        part = report["parts"][name] = run_part(name, args, limit) if limit > 0 else part
        print(f"{name}: {part['outcome']}, {part['seconds']} s", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(f"written: {path} and .md")


if __name__ == "__main__":
    main()
