"""Time and size of a published model's checkpoint: `python benchmarks/bench_checkpoint.py`."""

import argparse
import statistics
import sys
import tempfile
import timeit
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import build_model
from models.class_map import ClassMap
from train_state import TrainState
from util.checkpoint import read_checkpoint, save_checkpoint
from util.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser("bench_checkpoint.py", description="Time a checkpoint.")
    parser.add_argument("-c", "--config", default="configs/dino_4scale_r50.py", metavar="FILE")
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to write it")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    args = parser.parse_args()
    class_map = ClassMap.identity([{"id": i} for i in range(91)], 91)
    cfg = load_config(args.config)
    state = TrainState(cfg, build_model(cfg)[0], class_map)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = Path(directory) / "checkpoint.pth"
        save = lambda: save_checkpoint(path, state.state_dict(), keep=2)
        for name, step in (("save", save), ("read", lambda: read_checkpoint(path))):
            seconds = statistics.median(timeit.repeat(step, repeat=args.repetitions, number=1))
            print(f"{name}: {seconds:.2f} s (median of {args.repetitions})")
        print(f"size: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
