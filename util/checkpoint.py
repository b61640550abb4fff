"""Checkpoints: whole files or none on disk, no code run from a file, no weight loaded by half."""

import contextlib
import glob
import logging
import os
import pickle
import random
import re
import shutil
import stat
import uuid
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from util.download import download, is_url
from util.errors import UserError

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20
STEP_COUNTER = "num_batches_tracked"  # of BatchNorm: a frozen one has none, an old file neither
ZIP_HEAD, PICKLE_HEAD = b"PK\x03\x04", b"\x80"  # torch.save's format, and its format before 1.6
# What a run can be taken up from: not checkpoint_best*, not *_nonfinite.
CANDIDATE = re.compile(r"checkpoint(\d{4,}|_previous_\d+)?\.pth")

# Pretrained backbones: the files of their authors that the released code looks for.
RELEASED_FILES = {
    "swin_T_224_1k": "swin_tiny_patch4_window7_224.pth",
    "swin_B_224_22k": "swin_base_patch4_window7_224_22k.pth",
    "swin_B_384_22k": "swin_base_patch4_window12_384.pth",
    "swin_L_224_22k": "swin_large_patch4_window7_224_22k.pth",
    "swin_L_384_22k": "swin_large_patch4_window12_384_22k.pth",
    "convnext_xlarge_22k": "convnext_xlarge_22k_224.pth",
}


def copy_checkpoint(path: Path, other: Path) -> None:
    """Has the file under another name as well: by a hard link, which takes no time and no room, or
    where the file system has none by a copy."""
    temporary = other.with_name(f".{other.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)  # with its time, by which the newest is told
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
        copy_checkpoint(path, names[0])


def save_checkpoint(path: str | os.PathLike, state: dict, keep: int = 1) -> None:
    """Writes `state` to `path` so that a crash at any moment leaves the old file or the new one.

    keep: so many of the newest are kept, those before as `checkpoint_previous_1.pth` and so on.
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


def read_checkpoint(path: str | os.PathLike, verify: bool = True) -> dict:
    """The dict in `path`, a file or a URL, its tensors on the CPU; files of any torch.save since
    PyTorch 0.4.

    Nothing in the file is executed: only tensors, plain containers and argparse.Namespace are
    built. UserError where the file is missing, damaged (torch itself does not compare checksums:
    a download with a hole in it would load), no checkpoint, or wants anything else. Tensors are
    mapped from the file where its format allows, so that unused ones take no memory; replacing the
    file meanwhile does no harm, writing into it would. `verify` False leaves checksums out.
    """
    path = download(path) if is_url(path) else path
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise UserError(f"{path}: is a directory or no regular file; name the file itself")
        with open(path, "rb") as file:
            head = file.read(4)
        if not head:
            raise UserError(f"{path}: is empty; copy or download it again")
        if not head.startswith((ZIP_HEAD, PICKLE_HEAD)):
            raise UserError(f"{path}: not a checkpoint; name a file that torch.save wrote")
        mmap = head == ZIP_HEAD
        if verify and mmap:
            with zipfile.ZipFile(path) as archive:
                # torch.save leaves all checksums at zero where it is told to compute none.
                if any(record.CRC for record in archive.infolist()) and (bad := archive.testzip()):
                    raise ValueError(f"wrong checksum of {bad}")
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters about an odd file is said below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            kind = type(checkpoint).__name__
            raise UserError(f"{path}: holds a {kind}, not a dict; name a checkpoint file")
        return checkpoint
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        message = str(error)
        if wanted := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message):
            reason = f"it wants {wanted[1]}"
        else:  # torch's own reason is the last paragraph but one, between two of general advice
            reason = message.split("\n\n")[-2:][0].splitlines()[0]
        raise UserError(
            f"{path}: refused, nothing of it was executed: {reason}; a checkpoint may hold only "
            "tensors, plain containers and argparse.Namespace: ask its authors for such a file"
        ) from error
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}; check the path and its permissions") from error
    except Exception as error:  # a damaged file may raise anything: KeyError, OSError, ...
        reason = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0].strip(": ")
        problem = f"truncated, corrupt or not a checkpoint ({reason})"
        raise UserError(f"{path}: {problem}; copy or download it again") from error


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


@dataclass
class LoadReport:
    """What `load_weights` did: how many of the model's names are set, and all names that are not.

    `mismatched` entries are "name: reason", with both shapes; `ignored` are names of the file.
    """

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded: {self.loaded}"]
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            if names := getattr(self, kind):
                lines += [f"{kind}: {len(names)}", *(f"  {name}" for name in names[:NAMES_SHOWN])]
                if len(names) > NAMES_SHOWN:
                    lines.append(f"  ... and {len(names) - NAMES_SHOWN} more")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path_or_dict: str | os.PathLike | Mapping,
    *,
    strict: bool = True,
    ignore: Iterable[str] = (),
    source: str = "the state dict",
) -> LoadReport:
    """Copies a checkpoint's weights into `model`, converting their dtype to the model's.

    The state dict is the entry "model", "ema_model" or "state_dict", or the dict itself.
    ignore: every tensor with a name that contains one of these keeps the model's own values.
    source: what an error calls a dict; a file is called by its path.
    strict: any missing, unexpected or wrongly shaped name is a UserError that lists them, and the
        model stays as it was. Otherwise what fits is loaded and the rest reported.

    One name is enough for a tensor that the model lists under several (shared heads); names that
    disagree about its value are mismatched.
    """
    if isinstance(path_or_dict, Mapping):
        checkpoint = path_or_dict
    else:
        source, checkpoint = os.fspath(path_or_dict), read_checkpoint(path_or_dict)
    theirs = _without_prefix(_find_state_dict(checkpoint, source))
    state = model.state_dict(keep_vars=True)  # the tensors themselves: shared ones are identical
    ours = _without_prefix(state)
    keywords = tuple(ignore)
    is_ignored = lambda name: any(keyword in name for keyword in keywords)
    # A shared tensor is ignored under all of its names, else another one would still load it.
    kept = {id(tensor) for name, tensor in ours.items() if is_ignored(name)}
    seen, fits, report = set(kept), {}, LoadReport()
    for name, value in theirs.items():
        target = ours.get(name)
        seen.add(id(target))
        if id(target) in kept or is_ignored(name):
            report.ignored.append(name)
        elif target is None:
            if not name.endswith(STEP_COUNTER):
                report.unexpected.append(name)
        elif value.shape != target.shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(target.shape)} in the model"
            report.mismatched.append(f"{name}: {shapes}")
        elif not _equal(value, fits.setdefault(id(target), value)):
            report.mismatched.append(f"{name}: not shared in the file, shared in the model")
    missing = (name for name, tensor in ours.items() if id(tensor) not in seen)
    report.missing = [name for name in missing if not name.endswith(STEP_COUNTER)]
    if strict and (report.missing or report.unexpected or report.mismatched):
        problem = f"{source}: does not fit the model, nothing of it is used"
        remedy = "choose the config and the options it was trained with"
        raise UserError(f"{problem}; {remedy}\n{report}")
    fitting = {name: fits[id(tensor)] for name, tensor in state.items() if id(tensor) in fits}
    model.load_state_dict(fitting, strict=False)
    report.loaded = len(fitting)
    return report


def _find_state_dict(checkpoint: Mapping, source: str) -> Mapping[str, Tensor]:
    entries = (checkpoint.get(key) for key in ("model", "ema_model", "state_dict"))
    state = next((entry for entry in entries if isinstance(entry, Mapping)), checkpoint)
    pairs = state.items()
    if not pairs or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in pairs):
        places = "under 'model', 'ema_model' or 'state_dict', or as names and tensors alone"
        raise UserError(f"{source}: holds no weights; they are expected {places}")
    return state


def num_classes_of(checkpoint: Mapping) -> int | None:
    """The number of labels of the detector in a checkpoint: the rows of its class head."""
    for name, tensor in _find_state_dict(checkpoint, "the checkpoint").items():
        if re.search(r"(^|\.)class_embed\.(0\.)?weight$", name):
            return len(tensor)
    return None


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the "module." that DistributedDataParallel puts before every name."""
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _equal(a: Tensor, b: Tensor) -> bool:
    """Of two tensors of one shape; NaN equals NaN here."""
    return a.data_ptr() == b.data_ptr() or torch.equal(*(t.double().nan_to_num() for t in (a, b)))


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


def load_backbone(backbone: nn.Module, name: str, path: str = "", directory: str = "") -> None:
    """Put pretrained weights into a backbone, from a local file or from the network.

    `name` is one of torchvision's ResNets, timm/NAME, or a Swin or ConvNeXt by its released name,
    whose file, as its authors call it, is looked for in `directory`. What the file has beside the
    backbone's tensors, such as the classifier, is left out. UserError where there is no file, where
    the download fails, and where a tensor of the backbone is not in the file or has another shape.
    """
    released, remedy = name in RELEASED_FILES, "name a local file with --backbone_weights"
    body = backbone if released else backbone.body
    if released and not path:
        path = os.path.join(directory, RELEASED_FILES[name])
    try:
        if released and not os.path.exists(path):
            remedy = "put its authors' file into --backbone_dir, name one with --backbone_weights"
            raise FileNotFoundError(f"{path} is not there")
        if name.startswith("timm/"):
            import timm  # slow to import, and not needed to read a checkpoint

            options = {"features_only": True, "out_indices": body.feature_info.out_indices}
            options["pretrained_cfg_overlay"] = {"file": path} if path else None
            model = timm.create_model(name.removeprefix("timm/"), pretrained=True, **options)
            source = model.state_dict()
        elif path:
            source = _find_state_dict(read_checkpoint(path), path)
        else:
            import torchvision

            source = torchvision.models.get_model(name, weights="IMAGENET1K_V1").state_dict()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"backbone: no pretrained weights for {name} ({str(error).splitlines()[0]})"
        remedy += ", or train without with --no_pretrained_backbone"
        raise UserError(f"{problem}; {remedy}") from error
    ours = body.state_dict()
    # The norms of the feature maps came with detection; a classifier's file does not have them.
    found = {k: v for k, v in ours.items() if released and re.match(r"norm\d\.", k)}
    found |= {k: v for k, v in source.items() if k in ours}
    load_weights(body, found, source=path or f"pretrained {name}")
