"""Detectors and losses: tensors in, tensors out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from util.config import Config

    from .criterion import SetCriterion
    from .postprocess import PostProcess

COCO_CLASSES = 91  # COCO's category ids are its labels; the unused ones stay empty


def build_model(cfg: Config) -> tuple[nn.Module, SetCriterion, PostProcess]:
    """Build the detector, its losses and its post-processing from a config.

    `cfg.num_classes` None stands for COCO's 91. The weights are random; pretrained ones are the
    caller's business (`util.checkpoint`).
    """
    # Imported here, so that `models.dn_components` comes without everything else.
    from .criterion import SetCriterion
    from .dab_detr import DABDETR
    from .deformable_detr import DeformableDETR, DeformableEncoderDABDETR
    from .matcher import HungarianMatcher
    from .postprocess import PostProcess

    cfg = dataclasses.replace(cfg, num_classes=cfg.num_classes or COCO_CLASSES)
    dense = {
        "dab_detr": DABDETR,
        "dn_dab_detr": DABDETR,
        "dn_dab_deformable_detr_deformable_encoder_only": DeformableEncoderDABDETR,
    }
    model = dense.get(cfg.modelname, DeformableDETR)(cfg, build_backbone(cfg))
    matcher = HungarianMatcher(
        cfg.set_cost_class, cfg.set_cost_bbox, cfg.set_cost_giou, cfg.focal_alpha
    )
    criterion = SetCriterion(matcher, loss_weights(cfg), cfg.focal_alpha, cfg.dn_num_boxes)
    return model, criterion, PostProcess(cfg.num_select, cfg.nms_iou_threshold)


def build_backbone(cfg: Config) -> nn.Module:
    """What gives the feature maps of `cfg.return_interm_indices`, frozen as far as cfg says."""
    from .backbone import Backbone
    from .convnext import CONVNEXTS, ConvNeXt
    from .swin import SWINS, Swin

    levels = [index + 1 for index in cfg.return_interm_indices]
    families = dict.fromkeys(SWINS, Swin) | dict.fromkeys(CONVNEXTS, ConvNeXt)
    if family := families.get(cfg.backbone):
        backbone = family(cfg.backbone, levels, cfg.use_checkpoint)
    else:
        backbone = Backbone(cfg, levels)
    for name, parameter in backbone.named_parameters():
        keywords = (keyword in name for keyword in cfg.backbone_freeze_keywords)
        if cfg.lr_backbone == 0 or any(keywords):
            parameter.requires_grad_(False)
    return backbone


def loss_weights(cfg: Config) -> dict[str, float]:
    """{loss name: weight} of every loss. Without `aux_loss` those of the layers before the last
    weigh 0, so that these layers' own heads have a gradient, which DDP waits for."""
    terms = {
        "loss_ce": cfg.cls_loss_coef,
        "loss_bbox": cfg.bbox_loss_coef,
        "loss_giou": cfg.giou_loss_coef,
    }
    parts = ["", "_dn"] if cfg.use_dn else [""]
    weights = {f"{k}{part}": w for part in parts for k, w in terms.items()}
    for i in range(cfg.dec_layers - 1):
        layer = {f"{k}{part}_{i}": w for part in parts for k, w in terms.items()}
        weights |= layer if cfg.aux_loss else dict.fromkeys(layer, 0.0)
    if cfg.query_selection != "static":
        name = "_interm" if cfg.modelname == "dino" else "_enc"
        tokens = {f"{k}{name}": w * cfg.interm_loss_coef for k, w in terms.items()}
        if cfg.no_interm_box_loss:
            tokens |= dict.fromkeys((f"loss_bbox{name}", f"loss_giou{name}"), 0.0)
        weights |= tokens
    return weights
