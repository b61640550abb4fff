"""The detectors by the names that `-m` and a config's `modelname` have for them."""

from typing import NamedTuple

from .dab_detr import DABDETR, DNDETR
from .deformable_detr import DABDeformableDETR, DeformableEncoderDNDETR, DNDeformableDETR
from .detector import Detector
from .dino import DINO, DINOOfDNDETR
from .errors import UserError, nearest


class ModelSpec(NamedTuple):
    """A detector's class, and the config file of its published settings, without `.py`."""

    detector: type[Detector]
    config: str


_ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"

MODELS = {
    "dab_detr": ModelSpec(DABDETR, "dab_detr_r50"),
    "dn_dab_detr": ModelSpec(DNDETR, "dn_dab_detr_r50"),
    "dab_deformable_detr": ModelSpec(DABDeformableDETR, "dab_deformable_detr_r50"),
    "dn_dab_deformable_detr": ModelSpec(DNDeformableDETR, "dn_dab_deformable_detr_r50"),
    _ENCODER_ONLY: ModelSpec(DeformableEncoderDNDETR, f"{_ENCODER_ONLY}_r50_3pat"),
    "dn_dab_dino_deformable_detr": ModelSpec(DINOOfDNDETR, "dn_dab_dino_deformable_detr_r50"),
    "dino": ModelSpec(DINO, "dino_4scale_r50"),
}


def find_model(name: str) -> ModelSpec:
    """UserError with the nearest name if there is no such model."""
    if name not in MODELS:
        known = f"{nearest(name, MODELS)} Known: {', '.join(MODELS)}"
        raise UserError(f"modelname: there is no model {name}{known}")
    return MODELS[name]
