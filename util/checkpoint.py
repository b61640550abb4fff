"""Checkpoint files: saved all or nothing, found again after a crash."""

import contextlib
import glob
import logging
import os
import random
import re
import shutil
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from models import weights
from models.errors import UserError
from models.weights import load_weights  # noqa: F401  part of the documented interface
from util.download import local_file

logger = logging.getLogger(__name__)

# What a run can be resumed from: not checkpoint_best*, not *_nonfinite.
CANDIDATE = re.compile(r"checkpoint(\d{4,}|_previous_\d+)?\.pth")


def read_checkpoint(path: str | os.PathLike, verify: bool = True) -> dict:
    """`models.weights.read_checkpoint` for a file or a URL."""
    return weights.read_checkpoint(local_file(path), verify)


def _copy(path: Path, other: Path) -> None:
    """Has the file under another name as well: by a hard link, which takes no time and no room, or
    where the file system has none by a copy."""
    temporary = other.with_name(f".{other.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)  # keeps the modification time: it identifies the newest
        os.replace(temporary, other)
    except OSError as error:
        raise _not_saved(other, error) from error


def _not_saved(path: Path, error: Exception) -> Exception:
    """The UserError that says so, or the error itself if it is none of the file system's."""
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save wraps a failed write into an error of its zip writer
    if cause is None:
        return error
    remedy = "check that the directory exists, is writable and has space left"
    return UserError(f"{path}: checkpoint not saved: {cause.strerror or cause}; {remedy}")


def _keep_previous(path: Path, number: int) -> None:
    """Makes room for a new `path`: what it and its `number` predecessors are moves on by one."""
    names = [path.with_name(f"{path.stem}_previous_{i}{path.suffix}") for i in range(1, number + 1)]
    for older, newer in pairwise(reversed(names)):
        if newer.exists():
            os.replace(newer, older)
    if names and path.exists():
        _copy(path, names[0])


def save_checkpoint(
    path: str | os.PathLike, state: dict, keep: int = 1, copies: Sequence[str] = ()
) -> None:
    """Writes `state` to `path` so that a crash at any moment leaves the old file or the new one.

    keep: so many of the newest are kept, those before as `checkpoint_previous_1.pth` and so on.
    copies: names in the same directory under which it is kept as well.
    UserError where the file system refuses (disk full, directory gone, no permission); TypeError
    where `state` holds what `read_checkpoint` would refuse (a numpy scalar, a Path, ...), which is
    better learnt at the first save than at the resume. The file before it stays whole in both.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed process
            stale.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the data must be on disk before the name points to it
        try:
            read_checkpoint(temporary, verify=False)
        except UserError as error:
            raise TypeError(f"{path}: not saved, it could not be read back: {error}") from error
        _keep_previous(path, keep - 1)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise _not_saved(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):  # some network file systems cannot; the file is whole anyway
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    for name in copies:
        _copy(path, path.with_name(name))


def latest_checkpoint(output_dir: str | os.PathLike) -> tuple[Path, dict] | None:
    """The newest good checkpoint of a run and what it holds, or None: what to resume from.

    Candidates are `checkpoint.pth`, those before it, and `checkpointNNNN.pth`, newest modification
    first, ties by name from the end. One that cannot be read is passed over with a warning, and so
    is one whose weights were not finite ("nonfinite": True).
    """
    candidates = []
    for path in Path(output_dir).glob("checkpoint*.pth"):
        if CANDIDATE.fullmatch(path.name):
            with contextlib.suppress(OSError):  # removed meanwhile, or a link to nowhere
                candidates.append((path.stat().st_mtime_ns, path.name, path))
    for *_, path in sorted(candidates, reverse=True):
        try:
            state = read_checkpoint(path)
            if state.get("nonfinite"):
                raise UserError(f"{path}: its weights are not finite")
            return path, state
        except UserError as error:
            logger.warning("passed over, the checkpoint before it is tried: %s", error)
    return None


def rng_state() -> dict:
    """This process's random states, in types that `read_checkpoint` accepts.

    Every process of a distributed run has its own: one process's must not be given to all.
    """
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Continues the random streams where `rng_state` took them, on the devices that are here."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)
