"""What several test files share: a small toy data set and the command line of a small model."""

import subprocess
from pathlib import Path

import pytest

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
