"""Downloads of files given by URL."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from tqdm import tqdm

from .errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 2**20
TIMEOUT = 60  # seconds without data


def local_file(path: str | os.PathLike) -> Path:
    """The path itself, or the downloaded file if it is a URL."""
    is_url = re.match(r"https?://", os.fspath(path))
    return download(os.fspath(path)) if is_url else Path(path)


def download(url: str) -> Path:
    """The file at `url`, downloaded once into torch.hub's cache, by the first process that needs
    it. UserError if the file does not exist, the connection breaks or the disk is full."""
    name = os.path.basename(urlsplit(url).path) or "checkpoint.pth"
    key = hashlib.sha256(url.encode()).hexdigest()[:8]  # many files are called checkpoint.pth
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{name}"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                logger.info("downloading %s to %s", url, path)
                part = path.with_name(f".{path.name}.part")
                _fetch(url, part)
                os.replace(part, path)
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url}: not downloaded ({reason}); check the URL and try again") from error
    return path


def _fetch(url: str, path: Path) -> None:
    with urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
        total = response.length
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = path.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"cut off after {size} of {total} bytes")
