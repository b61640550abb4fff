"""The detectors by the names that `-m` and a config's `modelname` have for them."""

from typing import NamedTuple

from .anchor_detr import AnchorDETR, DNAnchorDETR
from .backbones import find_backbone
from .dab_detr import DABDETR, DNDETR
from .deformable_detr import DABDeformableDETR, DeformableEncoderDNDETR, DNDeformableDETR
from .detector import Detector
from .detr import DETR, DenoisingDETR
from .dino import DINO, DINOOfDNDETR
from .errors import UserError, nearest
from .faster_rcnn import DenoisingFasterRCNN, FasterRCNN
from .options import DetectorOptions
from .original_deformable_detr import DeformableDETR, DNOriginalDeformableDETR


class ModelSpec(NamedTuple):
    """A detector's class, and the config file of its published settings, without `.py`."""

    detector: type[Detector]
    config: str


_ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"

MODELS = {
    "detr": ModelSpec(DETR, "detr_r50"),
    "dn_detr": ModelSpec(DenoisingDETR, "dn_detr_r50"),
    "dab_detr": ModelSpec(DABDETR, "dab_detr_r50"),
    "dn_dab_detr": ModelSpec(DNDETR, "dn_dab_detr_r50"),
    "dab_deformable_detr": ModelSpec(DABDeformableDETR, "dab_deformable_detr_r50"),
    "dn_dab_deformable_detr": ModelSpec(DNDeformableDETR, "dn_dab_deformable_detr_r50"),
    _ENCODER_ONLY: ModelSpec(DeformableEncoderDNDETR, f"{_ENCODER_ONLY}_r50_3pat"),
    "dn_dab_dino_deformable_detr": ModelSpec(DINOOfDNDETR, "dn_dab_dino_deformable_detr_r50"),
    "deformable_detr": ModelSpec(DeformableDETR, "deformable_detr_r50"),
    "dn_deformable_detr": ModelSpec(DNOriginalDeformableDETR, "dn_deformable_detr_r50"),
    "dino": ModelSpec(DINO, "dino_4scale_r50"),
    "anchor_detr": ModelSpec(AnchorDETR, "anchor_detr_r50_dc5"),
    "dn_anchor_detr": ModelSpec(DNAnchorDETR, "dn_anchor_detr_r50_dc5"),
    "faster_rcnn": ModelSpec(FasterRCNN, "faster_rcnn_r50_fpn"),
    "dn_faster_rcnn": ModelSpec(DenoisingFasterRCNN, "dn_faster_rcnn_r50_fpn"),
}


def check_options(options: DetectorOptions) -> None:
    """UserError if there is no such model or backbone, or if it does not support an option."""
    if not find_backbone(options.backbone).can_dilate and options.dilation:
        raise UserError(f"dilation: {options.backbone} has no dilated last stage; use resnet50")
    find_model(options.modelname).detector.check(options)


def find_model(name: str) -> ModelSpec:
    """UserError with the nearest name if there is no such model."""
    if name not in MODELS:
        known = f"{nearest(name, MODELS)} Known: {', '.join(MODELS)}"
        raise UserError(f"modelname: there is no model {name}{known}")
    return MODELS[name]
