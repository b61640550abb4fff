"""Checkpoints of transformers, detrex and MMDetection as this project's, and this project's as
transformers' and the authors'. A module for each; none of these projects is imported.

transformers and, in part, MMDetection clamp boxes at 1e-5 before the inverse sigmoid, models here
at 1e-3, except for Deformable DETR: predictions differ where a side or coordinate is less than a
thousandth of the image.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from ..class_map import COCO, COCO_NUM_CLASSES, ClassMap
from ..errors import UserError
from ..registry import find_model
from ..weights import METADATA, num_classes_of, read_checkpoint, state_dict_of
from .common import STEMS, assemble

SOURCES = ("transformers", "detrex", "mmdet", "released", "dn_dino")


def read(
    path: Path,
    source: str = "auto",
    config: dict[str, Any] | None = None,
    ema: bool = False,
    bgr: bool = False,
) -> dict[str, Any]:
    """A checkpoint of this project ("model", "config", "class_map") from one of any of `SOURCES`.

    config: option values that the file does not tell.
    ema: of a checkpoint of this project, the averaged weights. bgr: its images were BGR. UserError
    for a file that is of none of these projects, or of a model that this project does not have.
    """
    checkpoint = {} if path.is_dir() else read_checkpoint(path, drop_objects=True)
    try:
        if source == "auto":
            source = project_of(checkpoint) if checkpoint else "transformers"
        if ema and not checkpoint.get("ema_model"):
            raise UserError("it holds no averaged weights (ema_model); leave out --ema")
        if source == "dn_dino":
            converted = own(checkpoint, ema)
            converted["config"] |= config or {}
        elif source == "released":
            if config is None:
                raise UserError("it holds no config; name the one it was trained with, by -c or -m")
            count = num_classes_of(checkpoint, config.get("class_loss", "focal")) or 1
            class_map = ClassMap.of_count(count)
            first = find_model(config["modelname"]).detector.first_id
            if first and first + count == COCO_NUM_CLASSES:
                rows = [{"id": i, "name": name} for i, name in COCO.items()]
                class_map = ClassMap.identity(rows, count, first)
            converted = assemble(state_dict_of(checkpoint, "it"), config, class_map)
        else:
            project = import_module(f".{source}", __package__)
            converted = project.read(path, checkpoint, config or {})
        if bgr:
            weights = converted["model"]
            if not (stems := [name for name in STEMS if name in weights]):
                raise UserError("--bgr is supported for ResNets and Swin Transformers")
            weights[stems[0]] = weights[stems[0]].flip(1)
    except UserError as e:
        raise UserError(f"{path}: not converted: {e}") from e
    return converted


def own(checkpoint: dict[str, Any], ema: bool) -> dict[str, Any]:
    """What a checkpoint of this project holds beside the state of its run."""
    if missing := {"model", "config", "class_map"} - checkpoint.keys():
        raise UserError(f"it holds no {', '.join(sorted(missing))}; see --from")
    kept = {key: checkpoint[key] for key in METADATA & checkpoint.keys()}
    return {"model": checkpoint["ema_model" if ema else "model"], **kept}


def project_of(checkpoint: dict[str, Any]) -> str:
    """Whose checkpoint it is, by its entries and names."""
    if {"config", "class_map"} <= checkpoint.keys():
        return "dn_dino"
    names = state_dict_of(checkpoint, "it").keys()
    marks = {"transformers": "model.", "detrex": "transformer.encoder.layers.0.attentions."}
    marks |= {"mmdet": "bbox_head."}
    return next((p for p, m in marks.items() if any(n.startswith(m) for n in names)), "released")
