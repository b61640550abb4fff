"""Kills a training run at random moments and goes on, again and again, and compares the end:

    python tools/fault_test.py --kills 20 --processes 1 2

trains a small model on a toy data set once in peace, and once with `kill -9` and `--resume auto`.
Weights, average, optimiser and random state have to be the same bit for bit, and log.txt has to
have every epoch once with the same losses. So many kills take about ten minutes on two CPU cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets.toy import make_toy_coco
from util.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODEL = [
    *("-c", "configs/toy/dino.py", "--hidden_dim", "32", "--nheads", "4", "--enc_layers", "1"),
    *("--dim_feedforward", "32", "--dec_layers", "2", "--num_queries", "10", "--dropout", "0.1"),
    *("--use_ema", "--batch_size", "2", "--data_aug_scales", "48", "64", "--device", "cpu"),
    *("--num_workers", "1", "--save_every_minutes", "0.01", "--log_matching"),
]


def start(processes: int, data: Path, out: Path, epochs: int) -> subprocess.Popen:
    """A process group that trains, or goes on."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = ["--coco_path", str(data), "--output_dir", str(out), "--resume", "auto"]
    command = [*launcher, "main.py", *MODEL, *paths, "--epochs", str(epochs)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> None:
    printed, _ = process.communicate(timeout=600)
    if process.returncode:
        sys.exit(f"a run that was left in peace failed:\n{printed}")


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of what is not the same in two checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{name}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


def read_log(out: Path) -> list[dict]:
    """The lines of log.txt, without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    other = ("epoch_time", "images_per_second", "peak_memory_mb")
    return [{k: v for k, v in line.items() if not k.endswith(other)} for line in lines]


def compare(whole: Path, killed: Path) -> list[str]:
    (_, expected), (_, found) = latest_checkpoint(whole), latest_checkpoint(killed)
    for state in (expected, found):
        state["config"].pop("output_dir")
        for name in ("seconds", "averages", "trained"):  # hold times
            state.pop(name)
    problems = differences(expected, found)
    logs = read_log(whole), read_log(killed)
    if [line["epoch"] for line in logs[1]] != [line["epoch"] for line in logs[0]]:
        problems.append("log.txt: epochs " + ", ".join(str(line["epoch"]) for line in logs[1]))
    return problems + differences(*logs, name="log.txt")


def test(kills: int, processes: int, directory: Path, generator: random.Random) -> list[str]:
    """What differs after so many kills; [] if nothing does."""
    data = make_toy_coco(directory / f"toy{processes}", num_train=24, num_val=4, size=64)
    epochs, whole, killed = 3 * kills, directory / "whole", directory / "killed"
    finish(start(processes, data, directory / "short", 1))
    begun = time.monotonic()
    finish(start(processes, data, directory / "short", 1))  # with caches warm and nothing to train
    startup = time.monotonic() - begun
    finish(start(processes, data, whole, epochs))
    training = max(time.monotonic() - begun - 2 * startup, 1.0)
    hit = 0
    while hit < kills:
        with start(processes, data, killed, epochs) as process:
            time.sleep(startup * generator.uniform(0.5, 1) + generator.uniform(0, training / kills))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            hit += 1
    where = "at the start"
    if found := latest_checkpoint(killed):
        where = f"in epoch {found[1]['epoch'] + 1}, step {found[1]['step']}"
    print(f"{processes} processes: {hit} of {kills} kills before the end, the last {where}")
    finish(start(processes, data, killed, epochs))
    return compare(whole, killed)


def main() -> int:
    parser = argparse.ArgumentParser("fault_test.py", description="Kill a run and compare its end.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (20)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    args = parser.parse_args()
    status = 0
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as directory:
            problems = test(args.kills, processes, Path(directory), random.Random(args.seed))
        print(f"{processes} processes: " + ("the same end" if not problems else "DIFFERENT"))
        print("".join(f"  {problem}\n" for problem in problems[:20]), end="")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
