"""Processes that train together: how they connect, what they exchange, their seeds."""

import os
import random
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import UserError


def join_processes(world_size: int, rank: int, dist_url: str, timeout_minutes: float) -> int:
    """Connect to the other processes of the run, if there are any; returns the local rank.

    RANK, LOCAL_RANK and WORLD_SIZE, which torchrun and run_with_submitit.py set, take precedence
    over the arguments. GPU tensors are exchanged with NCCL, others with Gloo; if a process hangs or
    dies, the others stop after `timeout_minutes`. UserError if the processes cannot connect.
    """
    rank = int(os.environ.get("RANK", rank))
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    gpus = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", rank % gpus if gpus else rank))
    if world_size == 1:
        return local_rank
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(backend, dist_url, timeout, world_size, rank)
    except (ValueError, RuntimeError) as e:  # torch's own errors are RuntimeErrors
        reason = str(e).splitlines()[0]
        raise UserError(
            f"world_size: process {rank} of {world_size} cannot connect to the others through "
            f"{dist_url}: {reason}; use torchrun, or a --dist_url that all processes can reach"
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
    """The sum of a tensor over all processes, in place and bit-identical in all of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list:
    """The picklable `value` of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_rank0(value: Any) -> list | None:
    """As `gather`, but only on rank 0; the others get None."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def on_rank0(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 only; all processes return its result or raise its UserError."""
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


def once_per_node(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `function` in one process of each node; all processes of the node get its result, whose
    arrays are then read-only and share their memory. All processes raise the first error.

    A node is one machine with one directory for temporary files, where the arrays are stored until
    all processes have mapped them into memory. Other values are pickled.
    """
    if world_size() == 1:
        return function()
    place = os.stat(tempfile.gettempdir())
    nodes = gather((socket.gethostname(), uuid.getnode(), place.st_dev, place.st_ino))
    leader, small, error = nodes.index(nodes[rank()]), {}, None
    with tempfile.TemporaryDirectory() as directory:
        if rank() == leader:
            try:
                small = function()
                for key in [k for k, value in small.items() if isinstance(value, np.ndarray)]:
                    np.save(f"{directory}/{key}.npy", small.pop(key))
            except (UserError, OSError) as e:  # OSError: no space
                error = str(e)
        outcomes = gather((error, small, directory))
        for error, _, _ in outcomes:
            if error is not None:
                raise UserError(error)
        _, small, directory = outcomes[leader]
        for file in Path(directory).iterdir():
            small[file.stem] = np.asarray(np.load(file, mmap_mode="r"))
        gather(None)  # before the files are removed
    return small


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
