"""Processes: how many, the device of each, and the random streams it starts with."""

import os
import random

import numpy as np
import torch

from .errors import UserError


def choose_device(name: str) -> torch.device:
    """The named device, or without a name a GPU where there is one. UserError if not usable."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: {name} cannot be used here: {str(e).splitlines()[0]}") from e
    return device


def refuse_many_processes() -> None:
    """UserError under torchrun: each process would train alone, over the other ones' files."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(f"WORLD_SIZE is {world_size}: only one process can train as yet")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
