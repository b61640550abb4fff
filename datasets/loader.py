"""Assignment of images to batches and of batches to processes."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from datasets.coco import CocoDetection, collate
from models.errors import UserError
from util.config import Config
from util.distributed import rank, world_size


class EpochBatches(Sampler[list[int]]):
    """The indices of each of this process's batches in an epoch.

    The data set, in training shuffled by the seed and `epoch` alone, is split into batches that are
    dealt to the processes in turn, so batches do not depend on the number of processes. In training
    all processes get the same multiple of `group` batches and a remainder is dropped; in evaluation
    every image occurs once. The first `start` batches are skipped.
    """

    def __init__(self, size: int, batch_size: int, train: bool, seed: int = 0, group: int = 1):
        self.size, self.batch_size, self.train, self.seed = size, batch_size, train, seed
        self.epoch = self.start = 0
        self.total = math.ceil((math.ceil(size / batch_size) - rank()) / world_size())
        if train:
            self.total = size // (batch_size * world_size() * group) * group
            if self.total == 0 and world_size() == group == 1:
                self.total = 1  # one smaller batch

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.size)
        if self.train:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.size, generator=generator)
        batches = order.split(self.batch_size)[rank() :: world_size()]
        for batch in batches[self.start : self.total]:
            yield batch.tolist()


def build_loader(dataset: CocoDetection, cfg: Config, train: bool) -> DataLoader:
    """Batches (NestedTensor, targets). UserError if a training set is too small for one step."""
    group = cfg.accumulate if train else 1
    size = cfg.batch_size if train else cfg.eval_batch_size
    batches = EpochBatches(len(dataset), size, train, cfg.seed, group)
    if train and not batches.total:
        step = f"one step of {group} batches of {cfg.batch_size} in {world_size()} processes"
        raise UserError(f"batch_size: {len(dataset)} training images are too few for {step}")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=cfg.num_workers > 0,
        generator=torch.Generator().manual_seed(cfg.seed),
    )
