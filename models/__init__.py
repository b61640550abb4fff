"""Detectors and losses: tensors in, tensors out."""

from __future__ import annotations

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
    from .backbone import Backbone
    from .criterion import SetCriterion
    from .dab_detr import DABDETR
    from .matcher import HungarianMatcher
    from .position_encoding import SinePositionEncoding
    from .postprocess import PostProcess
    from .transformer import Transformer

    backbone = Backbone(
        cfg.backbone,
        levels=[index + 1 for index in cfg.return_interm_indices],
        dilation=cfg.dilation,
        norm=cfg.batch_norm_type,
        freeze_stem=cfg.pretrained_backbone,
        trainable=cfg.lr_backbone > 0,
    )
    transformer = Transformer(
        cfg.hidden_dim,
        cfg.nheads,
        cfg.enc_layers,
        cfg.dec_layers,
        cfg.dim_feedforward,
        cfg.dropout,
        cfg.transformer_activation,
        cfg.num_patterns,
    )
    noise = {
        "num_groups": cfg.dn_number,
        "label_noise_ratio": cfg.dn_label_noise_ratio,
        "box_noise_scale": cfg.dn_box_noise_scale,
    }
    model = DABDETR(
        backbone,
        SinePositionEncoding(cfg.hidden_dim, cfg.pe_temperatureH, cfg.pe_temperatureW),
        transformer,
        cfg.hidden_dim,
        cfg.num_classes or COCO_CLASSES,
        cfg.num_queries,
        cfg.num_patterns,
        has_denoising=cfg.modelname == "dn_dab_detr",
        dn=noise if cfg.use_dn else None,
    )
    matcher = HungarianMatcher(
        cfg.set_cost_class, cfg.set_cost_bbox, cfg.set_cost_giou, cfg.focal_alpha
    )
    criterion = SetCriterion(matcher, loss_weights(cfg), cfg.focal_alpha)
    return model, criterion, PostProcess(cfg.num_select)


def loss_weights(cfg: Config) -> dict[str, float]:
    """{loss name: weight} of every loss that the config trains with."""
    terms = {
        "loss_ce": cfg.cls_loss_coef,
        "loss_bbox": cfg.bbox_loss_coef,
        "loss_giou": cfg.giou_loss_coef,
    }
    parts = ["", "_dn"] if cfg.use_dn else [""]
    layers = ["", *(f"_{i}" for i in range(cfg.dec_layers - 1) if cfg.aux_loss)]
    return {f"{k}{part}{layer}": w for layer in layers for part in parts for k, w in terms.items()}
