"""Checkpoint files: written atomically, found again after a crash."""

import contextlib
import glob
import logging
import os
import random
import re
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from models import weights
from models.download import local_file
from models.errors import UserError
from models.weights import (
    load_weights,  # noqa: F401  part of the documented interface
    new_file,
    not_saved,
)

logger = logging.getLogger(__name__)

# What a run can be resumed from: not checkpoint_best*, not *_nonfinite.
CANDIDATE = re.compile(r"checkpoint(\d{4,}|_previous_\d+)?\.pth")


def read_checkpoint(path: str | os.PathLike, verify: bool = True) -> dict:
    """`models.weights.read_checkpoint` for a file or a URL."""
    return weights.read_checkpoint(local_file(path), verify)


def _copy(path: Path, target: Path) -> None:
    """Make the file available under a second name: by a hard link, which costs nothing, or by a
    copy if the file system has no hard links. UserError if neither works."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)  # with the modification time, which identifies the newest
        os.replace(temporary, target)
    except OSError as error:
        raise not_saved(target, error) from error


def _keep_previous(path: Path, number: int) -> None:
    """Make way for a new `path`: shift it and its `number` predecessors by one."""
    names = [path.with_name(f"{path.stem}_previous_{i}{path.suffix}") for i in range(1, number + 1)]
    for older, newer in pairwise(reversed(names)):
        if newer.exists():
            os.replace(newer, older)
    if names and path.exists():
        _copy(path, names[0])


def save_checkpoint(
    path: str | os.PathLike, state: dict, keep: int = 1, copies: Sequence[str] = ()
) -> None:
    """Write `state` to `path` so that a crash at any moment leaves either the old or the new file.

    keep: the number of files kept; older ones become `checkpoint_previous_1.pth` and so on.
    copies: further names of the new file, in the same directory.
    UserError for file-system errors (disk full, directory gone, no permission); TypeError if
    `state` contains types that `read_checkpoint` refuses (a numpy scalar, a Path, ...), so that
    this fails at the first save, not at the resume. Either error leaves the old file intact.
    """
    path = Path(path)
    with new_file(path) as temporary:
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of killed processes
            stale.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # data must be on disk before the rename
        try:
            read_checkpoint(temporary, verify=False)
        except UserError as error:
            raise TypeError(f"{path}: not saved, as it could not be read back: {error}") from error
        _keep_previous(path, keep - 1)
    with contextlib.suppress(OSError):  # unsupported on some network file systems
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    for name in copies:
        _copy(path, path.with_name(name))


def latest_checkpoint(output_dir: str | os.PathLike) -> tuple[Path, dict] | None:
    """Path and contents of the checkpoint to resume a run from, or None: the latest by modification
    time, then name, of `checkpoint.pth`, its predecessors and `checkpointNNNN.pth`. Those that
    cannot be read or have non-finite weights ("nonfinite": True) are skipped with a warning."""
    candidates = []
    for path in Path(output_dir).glob("checkpoint*.pth"):
        if CANDIDATE.fullmatch(path.name):
            with contextlib.suppress(OSError):  # just removed, or a dangling link
                candidates.append((path.stat().st_mtime_ns, path.name, path))
    for *_, path in sorted(candidates, reverse=True):
        try:
            state = read_checkpoint(path)
            if state.get("nonfinite"):
                raise UserError(f"{path}: contains non-finite weights")
            return path, state
        except UserError as error:
            logger.warning("skipping a checkpoint, trying the previous one: %s", error)
    return None


def rng_state() -> dict:
    """This process's RNG states, in types that `read_checkpoint` accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Restore the states from `rng_state`, on the GPUs as far as they exist."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
