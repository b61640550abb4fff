"""Shared by several test files: a small toy data set and a small model's command line."""

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.toy import CATEGORIES, make_toy_coco
from models import build_model
from models.class_map import ClassMap
from tests.kill_runs import FORKS
from util.checkpoint import save_checkpoint
from util.config import load_config

SMALL = [
    *("-c", "configs/toy/dn_dab_detr.py", "--backbone", "timm/resnet10t"),
    *("--hidden_dim", "32", "--nheads", "4", "--dim_feedforward", "32"),
    *("--enc_layers", "1", "--dec_layers", "2", "--num_queries", "10"),
    *("--data_aug_scales", "48", "64", "--data_aug_max_size", "64", "--num_workers", "0"),
    *("--device", "cpu", "--batch_size", "4", "--epochs", "1"),
]

QUERIES = ("--nheads", "--enc_layers", "--dec_layers", "--num_queries", "--num_feature_levels")


def without_queries(options: list[str]) -> list[str]:
    """Without those that a Faster R-CNN rejects; each has one value."""
    at = [i for i, word in enumerate(options) if word in QUERIES]
    return [word for i, word in enumerate(options) if i not in at and i - 1 not in at]


DETECTOR = {
    "modelname": "dn_dab_detr",
    "use_dn": True,
    "backbone": "timm/test_resnet",
    "pretrained_backbone": False,
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 96,
    "num_queries": 12,
    "num_select": 20,
    "data_aug_scales": [64, 96],
    "data_aug_max_size": 128,
}


def full(*values: object) -> list[Any]:
    """Values of a parameter with which a test is part of `make test-full` only."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: the workers then finish at the same time."""
    items.sort(key=lambda item: not {"slow", "full"} & set(item.keywords))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation images of at most 64 x 64 pixels."""
    return make_toy_coco(tmp_path_factory.mktemp("toy"), num_train=24, num_val=8, size=64)


@pytest.fixture
def small(toy: Path, tmp_path: Path) -> list[str]:
    """Arguments for a model that trains on `toy` in seconds, writing to tmp_path / "out"."""
    return [*SMALL, "--coco_path", str(toy), "--output_dir", str(tmp_path / "out")]


@pytest.fixture(scope="session")
def checkpoint() -> dict:
    """As main.py would save it, with different averaged weights."""
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    class_map = ClassMap.from_categories(categories)
    cfg = load_config(overrides=DETECTOR | {"num_classes": class_map.num_classes})
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(cfg)[0].state_dict())
    state = {"model": weights[0], "ema_model": weights[1], "epoch": 3}
    return state | {"config": dataclasses.asdict(cfg), "class_map": class_map.state_dict()}


@pytest.fixture(scope="session")
def saved(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    save_checkpoint(path, checkpoint)
    return path


def serve(rank: int, connection: Connection) -> None:
    """Worker loop of a `Pair`: calls each function received and sends back its result."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    while True:
        function, argument = connection.recv()
        connection.send(function(argument))


class Pair:
    """Two worker processes."""

    def __init__(self):
        self.processes: list[tuple[BaseProcess, Connection]] = []

    def call(self, function: Callable[[Any], Any], first: Any, second: Any) -> list[Any]:
        """Results of the module-level `function` in each process; None where it raises or takes
        over 150 seconds, after which both are killed."""
        if not self.processes:
            for rank in range(2):
                parent_end, child_end = FORKS.Pipe()
                process = FORKS.Process(target=serve, args=(rank, child_end), daemon=True)
                process.start()
                child_end.close()  # so that the process's exit is detected
                self.processes.append((process, parent_end))
        for (_, connection), argument in zip(self.processes, (first, second), strict=True):
            connection.send((function, argument))
        results = []
        for _, connection in self.processes:
            try:
                results.append(connection.recv() if connection.poll(150) else None)
            except EOFError:
                results.append(None)
        if None in results:
            self.stop()
        return results

    def stop(self) -> None:
        for process, connection in self.processes:
            process.kill()  # SIGTERM would wait for the current step
            process.join()
            connection.close()
        self.processes.clear()


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.stop()


def wait_for_first_epoch(output: Path, is_running: Callable[[], bool]) -> None:
    """Wait until a run says in the file `output` that its first epoch is complete; fails if the run
    exits first."""
    while "\nepoch 0: loss" not in (printed := output.read_text() if output.exists() else ""):
        if not is_running():
            pytest.fail(f"the run exited before its first epoch completed:\n{printed}")
        time.sleep(0.02)


def children_of(process: BaseProcess | subprocess.Popen) -> list[int]:
    return [
        int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
