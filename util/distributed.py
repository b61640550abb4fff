"""Processes that train together: how they find each other, what they exchange, their seeds."""

import os
import random
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import UserError

T = TypeVar("T")


def join_processes(world_size: int, rank: int, dist_url: str, timeout_minutes: float) -> int:
    """Join the other processes of the run, if there are any; returns this one's local rank.

    torchrun and run_with_submitit.py tell the numbers by RANK, LOCAL_RANK and WORLD_SIZE, which go
    before the arguments. GPU tensors are exchanged by NCCL, others by Gloo; one that hangs or dies
    ends the others after `timeout_minutes`. UserError where the processes do not find each other.
    """
    rank = int(os.environ.get("RANK", rank))
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    gpus = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", rank % gpus if gpus else rank))
    if world_size == 1:
        return local_rank
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=rank,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except (ValueError, RuntimeError) as e:  # torch's own errors are RuntimeErrors
        reason = str(e).splitlines()[0]
        raise UserError(
            f"world_size: process {rank} of {world_size} does not find the others through "
            f"{dist_url}: {reason}; start them with torchrun, or name a --dist_url that all reach"
        ) from e
    return local_rank


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape, the same bits in every process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list:
    """Every process's `value`, which has to be picklable, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: Any) -> list | None:
    """As `gather`, but in the first process alone; the others get None."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def by_first(function: Callable[[], T]) -> T:
    """What `function` gives in the first process, in all of them, and so with its UserError."""
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as e:
            outcome[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The named device, or without a name this process's GPU where there is one, else the CPU.

    UserError if it cannot be used.
    """
    if not name and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("", "cuda"):
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"  # Slurm may show one each
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: {name} cannot be used here: {str(e).splitlines()[0]}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
