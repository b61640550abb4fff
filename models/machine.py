"""The processor or GPU that a program runs on."""

import os
import platform
import re
import resource
from pathlib import Path
from time import perf_counter

import torch

from .errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The named device, by default this process's GPU, or the CPU. UserError if it is unusable."""
    if not name and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("", "cuda"):
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"  # Slurm may show only one
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: {name} cannot be used: {str(e).splitlines()[0]}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seconds(device: torch.device) -> float:
    """A clock that is read when all work on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def peak_memory_mb() -> float:
    """Peak memory in MB: of the GPU if one was used, else of this process."""
    if on_gpu := torch.cuda.max_memory_allocated():
        return on_gpu / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def describe_machine(device: str) -> dict:
    """The name and memory of the processor, or of the GPU if `device` is \"cuda\"; threads."""
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        cpuinfo = Path("/proc/cpuinfo")  # Linux
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        model = re.search(r"model name\s*: (.*)", text)
        name = model[1] if model else platform.processor()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_GiB": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
