"""Weights from files into models: no code run from a file, and all of the weights or none."""

import contextlib
import json
import os
import pickle
import re
import stat
import uuid
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from .backbones import Backbone, efficientnet_lite, find_backbone
from .backbones.timm_model import PREFIX
from .class_map import ClassMap
from .errors import UserError

NAMES_SHOWN = 20
STEP_COUNTER = "num_batches_tracked"  # of BatchNorm; frozen norms and old files have none
ZIP_HEAD, PICKLE_HEAD = b"PK\x03\x04", b"\x80"  # torch.save's format, and its format before 1.6
CLASS_ROWS = re.compile(r"class_embed\.(\d+\.)?(weight|bias)$|(^|\.)label_enc\.weight$")
QUERY_ROWS = re.compile(r"(^|\.)(tgt_embed|refpoint_embed|query_embed|position)\.weight$")
METADATA = {"config", "class_map", "epoch"}  # entries of a safetensors file beside the weights


class Placeholder:
    """Stands for an object of a class that a checkpoint may not hold; its contents are dropped."""

    def __init__(self, *args: Any): ...
    def __setstate__(self, state: Any): ...
    def __setitem__(self, key: Any, value: Any): ...


def read_checkpoint(
    path: str | os.PathLike, verify: bool = True, drop_objects: bool = False
) -> dict:
    """The dict in a file of any torch.save since PyTorch 0.4, its tensors on the CPU, or the same
    entries from a safetensors file of `write_checkpoint`; of others, "model" alone.

    Nothing in the file is executed: only tensors, plain containers and argparse.Namespace are
    built. UserError if the file is missing, damaged, no checkpoint, or contains anything else;
    with `drop_objects`, a `Placeholder` takes the place of anything else.
    `verify` compares checksums, which torch does not: an incomplete download would load. Tensors
    are memory-mapped where the format allows, so that unused ones take no memory; replacing the
    file in the meantime is safe, writing into it is not.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise UserError(f"{path}: is a directory or no regular file; name the file itself")
        with open(path, "rb") as file:
            start = file.read(9)
        head = start[:4]
        if start[8:] == b"{":  # after the length of the header
            return _read_safetensors(path)
        if not head:
            raise UserError(f"{path}: is empty; copy or download it again")
        if not head.startswith((ZIP_HEAD, PICKLE_HEAD)):
            raise UserError(f"{path}: not a checkpoint; name a .pth or .safetensors file")
        mmap = head == ZIP_HEAD
        if verify and mmap:
            with zipfile.ZipFile(path) as archive:
                # All checksums are zero where torch.save was told to compute none.
                if any(record.CRC for record in archive.infolist()) and (bad := archive.testzip()):
                    raise ValueError(f"wrong checksum of {bad}")
        allowed: list[Any] = [Namespace, *(_placeholders(path) if drop_objects and mmap else [])]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is reported below
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


def _placeholders(path: str | os.PathLike) -> list[type]:
    """A subclass of Placeholder under the name of every class and function that the file uses."""
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
    split = [name.rpartition(".") for name in names]
    return [type(name, (Placeholder,), {"__module__": module}) for module, _, name in split]


def _read_safetensors(path: str | os.PathLike) -> dict:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        entries = {key: json.loads(metadata[key]) for key in METADATA & metadata.keys()}
        return {"model": {name: file.get_tensor(name) for name in file.keys()}, **entries}  # noqa: SIM118


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any], file_format: str = "") -> None:
    """Write a checkpoint as "pth" or "safetensors", by default as the name of the file says, so
    that at any moment the file is the old or the new one. UserError if the file system fails.

    A safetensors file has the weights, under one name each, and the other entries of METADATA.
    """
    with new_file(path) as temporary, open(temporary, "xb") as file:
        if (file_format or path.suffix[1:]) == "safetensors":
            state = checkpoint["model"].items()
            unique = {(t.data_ptr(), t.shape): (n, t.contiguous()) for n, t in state}
            entries = {key: json.dumps(checkpoint[key]) for key in METADATA & checkpoint.keys()}
            file.write(safetensors.torch.save(dict(unique.values()), entries))
        else:
            torch.save(dict(checkpoint), file)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a checkpoint to, which takes its place at the end. After an
    error it is removed and the old file is intact; UserError if the file system caused it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise not_saved(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def not_saved(path: Path, error: Exception) -> Exception:
    """A UserError if the file system caused `error`, else `error` itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save wraps a failed write in a RuntimeError
    if cause is None:
        return error
    remedy = "check that the directory exists, is writable and has space left"
    return UserError(f"{path}: checkpoint not saved: {cause.strerror or cause}; {remedy}")


@dataclass
class LoadReport:
    """The result of `load_weights`: the number of names in the model that were set, and the names
    that were not.

    `mismatched` entries are "name: reason", with both shapes; `ignored` are names in the file.
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
    source: the name of a dict in error messages; that of a file is its path.
    strict: if a name is missing, unexpected or has another shape, nothing is loaded, and the
        UserError lists all of these. Otherwise what fits is loaded and the rest is reported.

    One name is enough for a tensor that the model lists under several (shared heads); names that
    disagree about its value are mismatched.
    """
    if isinstance(path_or_dict, Mapping):
        checkpoint = path_or_dict
    else:
        source, checkpoint = os.fspath(path_or_dict), read_checkpoint(path_or_dict)
    theirs = state_dict_of(checkpoint, source)
    state = model.state_dict(keep_vars=True)  # the tensors themselves: shared ones are identical
    ours = _without_prefix(state)
    keywords = tuple(ignore)
    is_ignored = lambda name: any(keyword in name for keyword in keywords)
    # A shared tensor is ignored under all of its names, or another one would still load it.
    kept = {id(tensor) for name, tensor in ours.items() if is_ignored(name)}
    fits: dict[int, Tensor] = {}
    seen, report = set(kept), LoadReport()
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


def state_dict_of(checkpoint: Mapping, source: str) -> Mapping[str, Tensor]:
    """The weights in a checkpoint, called `source` in errors; for the places see `load_weights`."""
    entries = (checkpoint.get(key) for key in ("model", "ema_model", "state_dict"))
    state = next((entry for entry in entries if isinstance(entry, Mapping)), checkpoint)
    pairs = state.items()
    if not pairs or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in pairs):
        places = "under 'model', 'ema_model' or 'state_dict', or as names and tensors alone"
        raise UserError(f"{source}: holds no weights; they are expected {places}")
    renamed = {}  # torchvision's released Faster R-CNN has names from before its version 0.13
    for name, value in _without_prefix(state).items():
        name = re.sub(r"(\.fpn\.(inner|layer)_blocks\.\d)\.(?=weight|bias)", r"\1.0.", name)
        renamed[re.sub(r"^rpn\.head\.conv\.(?=weight|bias)", "rpn.head.conv.0.0.", name)] = value
    return renamed


def with_matched_rows(
    state: Mapping[str, Tensor], model: nn.Module, ours: ClassMap, theirs: ClassMap
) -> dict[str, Tensor]:
    """`state`, the weights of a detector for the classes `theirs`, as those of `model` for `ours`.

    Class heads and label embeddings get a row for every label of `model`: the file's where it has a
    class of that name, otherwise the model's own. What follows the labels' rows, such as the
    softmax's no object, is the last one of both. Of learned queries, the first are the file's.
    """
    adapted = dict(state)
    for name, own in model.state_dict().items():
        value = state.get(name)
        if value is None or value.shape[1:] != own.shape[1:]:
            continue
        if CLASS_ROWS.search(name):
            rows = ours.labels_in(theirs)
            if len(own) > ours.num_classes and len(value) > theirs.num_classes:
                rows[len(own) - 1] = len(value) - 1
        elif QUERY_ROWS.search(name):
            rows = {i: i for i in range(min(len(own), len(value)))}
        else:
            continue
        adapted[name] = own.to(value, copy=True)
        adapted[name][list(rows)] = value[list(rows.values())]
    return adapted


def num_classes_of(checkpoint: Mapping, class_loss: str = "focal") -> int | None:
    """The number of labels of the detector in a checkpoint: the rows of its class head, of which
    with `class_loss` "softmax" the last is no label's, and of a Faster R-CNN the first."""
    for name, tensor in state_dict_of(checkpoint, "the checkpoint").items():
        if re.search(r"(^|\.)(class_embed\.(0\.)?|box_predictor\.cls_score\.)weight$", name):
            return len(tensor) - int(class_loss == "softmax" or "cls_score" in name)
    return None


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the "module." that DistributedDataParallel puts before every name."""
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _equal(a: Tensor, b: Tensor) -> bool:
    """Of two tensors of one shape; NaN equals NaN here."""
    return a.data_ptr() == b.data_ptr() or torch.equal(*(t.double().nan_to_num() for t in (a, b)))


def load_backbone(backbone: Backbone, name: str, path: str = "", directory: str = "") -> None:
    """Load pretrained weights into a backbone, from a local file or from torchvision or timm.

    `name` is the backbone's in the registry; for a Swin or a ConvNeXt the file that its authors
    published is searched for in `directory`, for timm's EfficientNet-Lite an installed package.
    Other tensors in the file, such as the classifier, are ignored. UserError if there is no file,
    if the download fails, and if a tensor of the backbone is not in the file or has another shape.
    """
    released_file = find_backbone(name).weights_file
    body: Any = getattr(backbone, "body", backbone)
    source: Mapping[str, Tensor]
    remedy = "name a local file with --backbone_weights"
    path = path or (os.path.join(directory, released_file) if released_file else "")
    path = path or efficientnet_lite.installed_file(name)
    ours = body.state_dict()
    try:
        if released_file and not os.path.exists(path):
            remedy = "put its authors' file into --backbone_dir, name one with --backbone_weights"
            raise FileNotFoundError(f"{path} is not there")
        # Checked before timm reads it, whose older versions execute what is in a pickle.
        only_timm = name.startswith(PREFIX) and path.endswith((".safetensors", ".npz"))
        checkpoint = read_checkpoint(path) if path and not only_timm else {}
        if efficientnet_lite.NAME.match(name) and efficientnet_lite.STEM in checkpoint:
            source = efficientnet_lite.timm_names(checkpoint, ours)
        elif name.startswith(PREFIX):
            options: dict[str, Any] = {"out_indices": body.feature_info.out_indices}
            options["pretrained_cfg_overlay"] = {"file": path} if path else None
            options |= {"pretrained": True, "features_only": True}
            create = partial(timm.create_model, name.removeprefix(PREFIX), **options)
            source = create().state_dict()
            # What timm does not find in a file stays random: other values in another model.
            with torch.random.fork_rng(devices=[]):
                again = create().state_dict()
            source = {k: v for k, v in source.items() if torch.equal(v, again[k])}
        elif path:
            source = state_dict_of(checkpoint, path)
        else:
            source = torchvision.models.get_model(name, weights="IMAGENET1K_V1").state_dict()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        problem = f"backbone: no pretrained weights for {name} ({reason})"
        remedy += ", or train without with --no_pretrained_backbone"
        raise UserError(f"{problem}; {remedy}") from error
    # The feature maps' norms and pyramid were added for detection; a classifier's file has none.
    found = {k: v for k, v in ours.items() if released_file and re.match(r"(norm\d|fpn)\.", k)}
    found |= {k: v for k, v in source.items() if k in ours}
    load_weights(body, found, source=path or f"pretrained {name}")
