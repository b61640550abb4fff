"""What a detector, its denoising and its losses can be told: every option's name, type, default,
meaning and limits. Names are those of the released code.

A run has more options; `util.config` adds them, and reads all of them from files and flags.
"""

import dataclasses
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from .class_map import COCO_NUM_CLASSES
from .errors import UserError, nearest


def option(
    default: Any, help: str, choices: Sequence[str] = (), low: float = -inf, high: float = inf
):
    """A field of the config; a number is at least `low` and at most `high`."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    """model"""

    modelname: str = option("dn_dab_detr", "which model; -m for short")
    backbone: str = option("resnet50", "a name listed below, or timm/NAME for any timm model")
    dilation: bool = option(False, "DC5: the last backbone stage keeps stride 16")
    batch_norm_type: str = option(
        "FrozenBatchNorm2d",
        "the backbone's normalisation; frozen statistics only suit pretrained weights",
        choices=["FrozenBatchNorm2d", "BatchNorm2d", "SyncBatchNorm"],
    )
    return_interm_indices: list[int] = option(
        [3], "backbone stages that are used, 0 (stride 4) to 3 (stride 32)", low=0, high=3
    )
    pretrained_backbone: bool = option(True, "begin with ImageNet weights, and freeze the stem")
    backbone_weights: str = option("", "local file of those weights, in place of the download")
    backbone_dir: str = option("", "directory of the Swin and ConvNeXt authors' files")
    backbone_freeze_keywords: list[str] = option(
        [], "freeze the backbone's parameters with one of these in their names"
    )
    use_checkpoint: bool = option(False, "Swin, ConvNeXt: save memory, computing blocks twice")
    hidden_dim: int = option(256, "width of the transformer, D", low=8)
    nheads: int = option(8, "attention heads", low=1)
    enc_layers: int = option(6, "encoder layers", low=0)
    dec_layers: int = option(6, "decoder layers", low=1)
    dim_feedforward: int = option(2048, "width of the feed-forward blocks", low=1)
    dropout: float = option(0.0, "dropout in the transformer", low=0, high=0.99)
    transformer_activation: str = option(
        "prelu", "activation of the feed-forward blocks", choices=["prelu", "relu", "gelu"]
    )
    num_queries: int = option(300, "queries, Q: the most objects found in an image", low=1)
    num_patterns: int = option(0, "dense decoders: content embeddings of every anchor", low=0)
    random_refpoints_xy: bool = option(False, "learned anchors start all over the image")
    pe_temperatureH: float = option(20, "position encoding's temperature for y", low=1e-6)
    pe_temperatureW: float = option(20, "position encoding's temperature for x", low=1e-6)
    num_classes: int | None = option(
        None, "labels, C; by default what the checkpoint or the data say, 91 for COCO", low=1
    )
    pe_offset: float = option(0, "shift of the pixel counts that the position encoding embeds")
    num_feature_levels: int = option(
        4, "feature levels of deformable models; those the backbone lacks are made smaller", low=1
    )
    enc_n_points: int = option(4, "points that deformable encoder layers sample a level", low=1)
    dec_n_points: int = option(4, "points that deformable decoder layers sample a level", low=1)
    query_selection: str = option(
        "static",
        "queries of deformable models: static, learned; pure, from the encoder's tokens; mixed, "
        "anchors from tokens and learned content",
        choices=["static", "pure", "mixed"],
    )
    look_forward_twice: bool = option(False, "a layer's box trains the layer before it, too")
    dec_pred_class_embed_share: bool = option(False, "one class head for all decoder layers")
    dec_pred_bbox_embed_share: bool = option(False, "one box head for all decoder layers")
    two_stage_class_embed_share: bool = option(False, "DINO: encoder and decoder share class heads")
    two_stage_bbox_embed_share: bool = option(False, "DINO: encoder and decoder share box heads")
    num_select: int = option(300, "detections kept of an image", low=1)
    nms_iou_threshold: float = option(
        -1, "IoU above which NMS, over all classes, drops the worse detection; -1: no NMS", high=1
    )


@dataclass
class DenoisingOptions:
    """denoising (DN-DETR, DINO)"""

    use_dn: bool = option(False, "train with denoising queries")
    contrastive: bool = option(
        False, "add objects moved too far, to be rejected; noise moves corners (DINO)"
    )
    dn_number: int = option(
        5,
        "denoising groups; from 100 on, roughly the number of denoising queries instead; DINO "
        "doubles it; 0: no denoising",
        low=0,
    )
    dn_labelbook_size: int | None = option(
        None, "DINO: labels that denoising can embed; by default num_classes", low=1
    )
    dn_label_noise_ratio: float = option(0.2, "part of the labels drawn anew", low=0, high=1)
    dn_box_noise_scale: float = option(0.4, "box noise, 1 reaching the box's own edge", low=0)
    dn_num_boxes: str = option(
        "process",
        "what divides denoising losses: the objects of the process itself, as in DN-DETR, or their "
        "mean over all processes, as in DINO",
        choices=["process", "mean"],
    )


@dataclass
class LossOptions:
    """matching and losses"""

    set_cost_class: float = option(2.0, "matching cost of the class", low=0)
    set_cost_bbox: float = option(5.0, "matching cost of the L1 distance", low=0)
    set_cost_giou: float = option(2.0, "matching cost of the GIoU", low=0)
    cls_loss_coef: float = option(1.0, "weight of the focal loss", low=0)
    bbox_loss_coef: float = option(5.0, "weight of the L1 loss", low=0)
    giou_loss_coef: float = option(2.0, "weight of the GIoU loss", low=0)
    focal_alpha: float = option(0.25, "alpha of the focal loss", low=0, high=1)
    aux_loss: bool = option(True, "losses on every decoder layer, not on the last alone")
    interm_loss_coef: float = option(
        1.0, "weight of the losses on the encoder tokens that queries are selected from", low=0
    )
    no_interm_box_loss: bool = option(False, "no box losses on those tokens")


@dataclass
class DetectorOptions(LossOptions, DenoisingOptions, ModelOptions):
    """Everything that `build_model` reads. UserError where an option is outside its limits, where
    two do not fit together, and where the model does not have what is asked of it."""

    def __post_init__(self):
        from .backbones import find_backbone  # these two need the options above
        from .registry import find_model

        for f in dataclasses.fields(self):
            check_limits(f, getattr(self, f.name))
        self.use_dn = self.use_dn and self.dn_number > 0
        backbone = find_backbone(self.backbone)
        if self.dilation and not backbone.can_dilate:
            has = f"{self.backbone} has no dilated last stage (DC5), resnet50 has"
            raise UserError(f"dilation: {has}")
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            wanted = f"a multiple of 4 and of nheads, {self.nheads}"
            raise UserError(f"hidden_dim: {self.hidden_dim} is not {wanted}")
        if not self.return_interm_indices:
            raise UserError("return_interm_indices needs at least one number")
        book, labels = self.dn_labelbook_size, self.num_classes
        if self.use_dn and book and labels and book < labels:
            raise UserError(
                f"dn_labelbook_size: {book} is less than the {labels} labels of num_classes"
            )
        if self.num_feature_levels < len(self.return_interm_indices):
            few = f"less than the {len(self.return_interm_indices)} levels of return_interm_indices"
            raise UserError(f"num_feature_levels: {self.num_feature_levels} is {few}")
        find_model(self.modelname).detector.check(self)

    @property
    def num_labels(self) -> int:
        """`num_classes`, whose None stands for COCO's 91."""
        return self.num_classes or COCO_NUM_CLASSES

    @classmethod
    def of(cls, values: Mapping[str, Any], **overrides: Any) -> "DetectorOptions":
        """The options among `values`, which may hold a run's other options; `overrides` win."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names} | overrides)


def check_limits(f: dataclasses.Field, value: Any) -> None:
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    for v in value if isinstance(value, list) else [value]:
        if choices and v not in choices:
            known = f"{', '.join(choices)}{nearest(v, choices)}"
            raise UserError(f"{f.name}: {v!r} is not one of {known}")
        if isinstance(v, int | float) and not low <= v <= high:
            wrong = f"more than {high}" if v > high else f"less than {low}"
            raise UserError(f"{f.name}: {v} is {wrong}")


def read_assignments(
    path: Path, merge: Callable[[dict, dict, Path], dict] = lambda base, own, path: base | own
) -> dict[str, Any]:
    """The assignments of a config file, over those of the file or files that its `_base_` names,
    the later of which win.

    `merge` combines what the base files say with what the file at `path` says itself. Raises
    UserError where a file is missing or does not run.
    """
    try:
        assigned = runpy.run_path(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except Exception as e:
        raise UserError(f"{path}: not a config file: {type(e).__name__}: {e}") from e
    bases = assigned.get("_base_", [])
    values: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        values |= read_assignments(path.parent / base, merge)
    own = {name: value for name, value in assigned.items() if not name.startswith("_")}
    return merge(values, own, path)
