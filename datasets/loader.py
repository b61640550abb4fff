"""Batches: which images make up each, and which process takes it."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from datasets.coco import CocoDetection, collate
from models.errors import UserError
from util.config import Config
from util.distributed import rank, world_size


class EpochBatches(Sampler[list[int]]):
    """The indices of every batch of an epoch that falls to this process.

    The data set, in training shuffled by the seed and `epoch` alone, is cut into batches that the
    processes take in turn: a batch holds the same images however many they are. In training all
    processes get equally many, in groups of `group`, and a rest is left out; in evaluation every
    image comes once. The first `start` batches, done before, are passed over.
    """

    def __init__(self, size: int, batch_size: int, train: bool, seed: int = 0, group: int = 1):
        self.size, self.batch_size, self.train, self.seed = size, batch_size, train, seed
        self.epoch = self.start = 0
        mine = math.ceil((math.ceil(size / batch_size) - rank()) / world_size())
        if train:
            mine = size // (batch_size * world_size() * group) * group
            if mine == 0 and world_size() == group == 1:
                mine = 1  # a smaller one
        self.total = mine

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
    """Batches (NestedTensor, targets); UserError if a training set is too small for one step."""
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
