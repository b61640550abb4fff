"""Repeatedly kills a training run at random moments, resumes it, and checks the result:

    python -m tests.kill_runs --kills 20 --processes 1 2

trains a small model on a toy data set once without interruption and once with `kill -9` and
`--resume auto`. Weights, EMA, optimiser and RNG states must be bit-identical, and log.txt must have
every epoch once with the same losses. This takes about ten minutes on two CPU cores.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from datasets.toy import make_toy_coco
from util.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODEL = [
    *("-c", "configs/toy/dino.py", "--hidden_dim", "32", "--nheads", "4", "--enc_layers", "1"),
    *("--dim_feedforward", "32", "--dec_layers", "2", "--num_queries", "10", "--dropout", "0.1"),
    *("--use_ema", "--batch_size", "2", "--data_aug_scales", "48", "64", "--device", "cpu"),
    *("--num_workers", "1", "--save_every_minutes", "0.01", "--log_matching"),
]


# Processes are forked from one that has imported main.py, which takes longer than a training here.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["main"])


def run_main(argv: list[str], output: Path) -> None:
    """main.py in a process group of its own, printing to a file."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a run on its own
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    from main import main

    sys.exit(main(argv))


def start_main(argv: list[str], output: Path) -> BaseProcess:
    process = FORKS.Process(target=run_main, args=(argv, output))
    process.start()
    return process


def start_ranks(argv: list[str], store: Path, outputs: Sequence[Path]) -> list[BaseProcess]:
    """main.py in a process for each file to print to; several meet in the file `store`, unless argv
    says where."""
    together = ["--world_size", str(len(outputs)), "--dist_url", f"file://{store}"]
    argv = [*together, *argv] if len(outputs) > 1 else argv
    number = lambda rank: ["--rank", str(rank)] if len(outputs) > 1 else []
    return [start_main([*argv, *number(i)], output) for i, output in enumerate(outputs)]


def kill(process: BaseProcess) -> None:
    """With its data workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def start(processes: int, data: Path, out: Path, epochs: int) -> list[BaseProcess]:
    """Start or resume a training."""
    out.mkdir(exist_ok=True)
    before = len(list(out.glob("output*")))
    outputs = [out / f"output{before + rank}.txt" for rank in range(processes)]
    for output in outputs:
        output.touch()
    paths = ["--coco_path", str(data), "--output_dir", str(out), "--resume", "auto"]
    argv = [*MODEL, *paths, "--epochs", str(epochs)]
    return start_ranks(argv, out / f"store{before}", outputs)


def finish(processes: list[BaseProcess], out: Path) -> None:
    for process in processes:
        process.join(600)
    if any(process.exitcode for process in processes):
        printed = [path.read_text() for path in sorted(out.glob("output*"))]
        sys.exit("\n".join(["an uninterrupted run failed:", *printed]))


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of the entries that differ between two checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{name}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


def read_log(out: Path) -> list[dict]:
    """The lines of log.txt, without timings and memory."""
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    varying = ("epoch_time", "images_per_second", "peak_memory_mb")
    return [{k: v for k, v in line.items() if not k.endswith(varying)} for line in lines]


def compare(uninterrupted: Path, killed: Path) -> list[str]:
    (_, expected), (_, actual) = latest_checkpoint(uninterrupted), latest_checkpoint(killed)
    for state in (expected, actual):
        for name in ("output_dir", "dist_url"):
            state["config"].pop(name)
        for name in ("seconds", "averages", "trained"):  # contain timings
            state.pop(name)
    problems = differences(expected, actual)
    logs = read_log(uninterrupted), read_log(killed)
    if [line["epoch"] for line in logs[1]] != [line["epoch"] for line in logs[0]]:
        problems.append("log.txt: epochs " + ", ".join(str(line["epoch"]) for line in logs[1]))
    return problems + differences(*logs, name="log.txt")


def test(kills: int, processes: int, directory: Path, generator: random.Random) -> list[str]:
    """The differences after `kills` kills."""
    data = make_toy_coco(directory / f"toy{processes}", num_train=24, num_val=4, size=64)
    epochs, uninterrupted, killed = 3 * kills, directory / "uninterrupted", directory / "killed"
    finish(start(processes, data, directory / "short", 1), directory / "short")
    begin = time.monotonic()
    # With warm caches, nothing to train.
    finish(start(processes, data, directory / "short", 1), directory / "short")
    startup = time.monotonic() - begin
    finish(start(processes, data, uninterrupted, epochs), uninterrupted)
    training = max(time.monotonic() - begin - 2 * startup, 1.0)
    done = 0
    while done < kills:
        running = start(processes, data, killed, epochs)
        time.sleep(startup * generator.uniform(0.5, 1) + generator.uniform(0, training / kills))
        if not all(process.is_alive() for process in running):
            break
        for process in running:
            kill(process)
        done += 1
    position = "at the start"
    if latest := latest_checkpoint(killed):
        position = f"in epoch {latest[1]['epoch'] + 1}, step {latest[1]['step']}"
    print(f"{processes} processes: {done} of {kills} kills before the end, the last {position}")
    finish(start(processes, data, killed, epochs), killed)
    return compare(uninterrupted, killed)


def main() -> int:
    parser = argparse.ArgumentParser("kill_runs", description="Kill and resume a run.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="number of kills (20)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    args = parser.parse_args()
    status = 0
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as directory:
            problems = test(args.kills, processes, Path(directory), random.Random(args.seed))
        print(f"{processes} processes: " + ("identical" if not problems else "DIFFERENT"))
        print("".join(f"  {problem}\n" for problem in problems[:20]), end="")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
