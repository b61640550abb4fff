"""What several test files share: a small toy data set and the command line of a small model."""

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.toy import make_toy_coco

SMALL = [
    *("-c", "configs/toy/dn_dab_detr.py", "--backbone", "timm/resnet10t"),
    *("--hidden_dim", "32", "--nheads", "4", "--dim_feedforward", "32"),
    *("--enc_layers", "1", "--dec_layers", "2", "--num_queries", "10"),
    *("--data_aug_scales", "48", "64", "--data_aug_max_size", "64", "--num_workers", "0"),
    *("--device", "cpu", "--batch_size", "4", "--epochs", "1"),
]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation images of at most 64 x 64 pixels."""
    return make_toy_coco(tmp_path_factory.mktemp("toy"), num_train=24, num_val=8, size=64)


@pytest.fixture
def small(toy: Path, tmp_path: Path) -> list[str]:
    """Command line of a model that trains in seconds on `toy`, into tmp_path / "out"."""
    return [*SMALL, "--coco_path", str(toy), "--output_dir", str(tmp_path / "out")]


def serve(rank: int, connection: Connection) -> None:
    """What a process of a `Pair` does: it calls what it is sent, and sends what that returns."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    while True:
        function, argument = connection.recv()
        connection.send(function(argument))


class Pair:
    """Two processes that are started once, as that takes longer than most of what they do."""

    def __init__(self):
        self.processes: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def call(self, function: Callable[[Any], Any], first: Any, second: Any) -> list[Any]:
        """What `function`, of a module, returns in each for its argument; None where it hangs for
        150 seconds or raises, which ends the process."""
        if not self.processes:
            context = multiprocessing.get_context("spawn")
            for rank in range(2):
                mine, theirs = context.Pipe()
                process = context.Process(target=serve, args=(rank, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is noticed
                self.processes.append((process, mine))
        for (_, connection), argument in zip(self.processes, (first, second), strict=True):
            connection.send((function, argument))
        answers = []
        for _, connection in self.processes:
            try:
                answers.append(connection.recv() if connection.poll(150) else None)
            except EOFError:
                answers.append(None)
        if None in answers:
            self.end()
        return answers

    def end(self) -> None:
        for process, connection in self.processes:
            process.kill()  # SIGTERM would wait for the step at hand
            process.join()
            connection.close()
        self.processes.clear()


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


def wait_for_first_epoch(process: subprocess.Popen) -> None:
    """Reads what a run prints until its first epoch is done; fails if it ends before."""
    printed = []
    for line in process.stdout:
        if line.startswith("epoch 0: loss"):
            return
        printed.append(line)
    pytest.fail("the run ended before its first epoch was done:\n" + "".join(printed))


def children_of(process: subprocess.Popen) -> list[int]:
    return [
        int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
