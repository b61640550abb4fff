"""Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017), torchvision's, and with
denoising in its box head (Li et al. 2024). A background class, row 0, comes before the labels here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from .backbones import Backbone
from .detector import Detector
from .errors import UserError
from .nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from .options import DetectorOptions
from .postprocess import PostProcess

# The options that change something here. The widths are those of the pyramid and of the box head.
USED = {"modelname", "backbone", "batch_norm_type", "pretrained_backbone", "backbone_weights"}
USED |= {"backbone_dir", "backbone_freeze_keywords", "use_checkpoint", "num_classes", "num_select"}
USED |= {"nms_iou_threshold", "hidden_dim", "dim_feedforward", "cls_loss_coef", "bbox_loss_coef"}
USED |= {"num_regions", "use_dn", "dn_number", "dn_box_noise_scale"}
STRIDES = [4, 8, 16, 32]


def in_float32(module: nn.Module, inputs: Any, outputs: Sequence[Any]) -> tuple[Any, ...]:
    """A forward hook: from these outputs, and in their dtype, boxes in pixels are computed."""
    return tuple(x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in outputs)


class FasterRCNN(Detector):
    """Under torchvision's names, with its initial weights, sampling and losses."""

    implied = {"return_interm_indices": [0, 1, 2, 3], "dim_feedforward": 1024, "num_select": 100}
    implied |= {"bbox_loss_coef": 1.0}
    has_queries, first_id = False, 1
    denoise: Callable

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        super().check(options)
        for name, usual in (vars(DetectorOptions()) | cls.implied).items():
            if name not in USED and getattr(options, name) != usual:
                raise UserError(f"{name}: {options.modelname} makes no use of it; leave it out")

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        if getattr(backbone, "strides", STRIDES) != STRIDES:
            raise UserError(f"backbone: {options.backbone} has no strides {STRIDES}; use resnet50")
        dim, width = options.hidden_dim, options.dim_feedforward
        self.backbone, self.num_rows = backbone, options.num_labels + 1
        self.backbone.fpn = FeaturePyramidNetwork(backbone.num_channels, dim, LastLevelMaxPool())
        self.backbone.out_channels = dim
        parts = faster_rcnn.FasterRCNN(
            self.backbone,
            box_head=faster_rcnn.TwoMLPHead(dim * 7 * 7, width),
            box_predictor=faster_rcnn.FastRCNNPredictor(width, self.num_rows),
            box_batch_size_per_image=options.num_regions,
            box_detections_per_img=options.num_select,
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads
        # torchvision infers these from the first batch, which a resumed run does not see.
        self.roi_heads.box_roi_pool.scales = [1 / stride for stride in STRIDES]
        self.roi_heads.box_roi_pool.map_levels = initLevelMapper(2, 5)
        for head in (self.rpn.head, self.roi_heads.box_predictor):
            head.register_forward_hook(in_float32)

    @property
    def image_backbone(self) -> nn.Module:
        return self.backbone

    @property
    def encoder_layers(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone.fpn])

    def forward(self, images: Any, targets: Any = None) -> Any:
        """Images and targets as in `Detector`. In training {"losses": {name: scalar}}; else lists
        with an entry for each image, "scores" (k,), best first, "labels" (k,) and "boxes" (k, 4)
        xyxy in pixels, and "sizes" (B, 2), heights and widths without padding."""
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        sizes = torch.stack([(~images.mask).any(axis).sum(1) for axis in (2, 1)], dim=1)
        # Where a side is no multiple of the largest stride, torchvision misplaces anchors.
        height, width = (-side % STRIDES[-1] for side in images.mask.shape[1:])
        x = F.pad(images.tensors, (0, width, 0, height))
        maps = self.backbone(NestedTensor(x, F.pad(images.mask, (0, width, 0, height), value=True)))
        features = self.backbone.fpn({str(i): level.tensors for i, level in enumerate(maps)})
        features = {name: level.float() for name, level in features.items()}
        objects = targets and [
            {"labels": t["labels"] + 1, "boxes": in_pixels(t["boxes"], size)}
            for t, size in zip(targets, sizes, strict=True)
        ]
        image_sizes = [(h, w) for h, w in sizes.tolist()]
        proposals, losses = self.rpn(ImageList(x, image_sizes), features, objects)
        found, box_losses = self.roi_heads(features, proposals, image_sizes, objects)
        if not self.training:
            outputs = {key: [image[key] for image in found] for key in ("scores", "boxes")}
            return outputs | {"labels": [image["labels"] - 1 for image in found], "sizes": sizes}
        losses |= box_losses
        if self.prepare_denoising is not None and targets is not None:
            losses |= self.denoise(features, targets, sizes)
        return {"losses": losses}


class DenoisingFasterRCNN(FasterRCNN):
    """With denoising, which adds no parameters."""

    has_denoising = True

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Regions are the boxes as they are."""
        return boxes

    def denoise(
        self, features: dict[str, Tensor], targets: Any, sizes: Tensor
    ) -> dict[str, Tensor]:
        """The losses of noised boxes as further regions: class and box of the object that each was
        made from, whatever their IoU. Each weighs as much as a sampled region. There are no
        queries, so neither their content, a label, nor their self-attention mask is used."""
        none = features["0"].new_zeros(len(targets), 0, 4)
        no_labels = nn.Embedding.from_pretrained(none.new_zeros(self.num_rows, 0))
        queries = no_labels, none, none[..., :0]
        prepare: Any = self.prepare_denoising
        _, regions, _, dn = prepare(targets, *queries)
        boxes, labels = regions.clone(), torch.zeros_like(dn.supervised, dtype=torch.int64)
        boxes[dn.to_box], labels[dn.to_label] = dn.boxes, dn.labels + 1
        regions, boxes = (in_pixels(x, sizes[:, None]) for x in (regions, boxes))
        regions = torch.minimum(regions.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])
        # Unused places of a group have no area, nor has a region where the noise took all of it.
        used = (regions[..., 2:] - regions[..., :2]).amin(-1) >= self.rpn.min_size
        by_image = [region[keep] for region, keep in zip(regions, used, strict=True)]
        heads, labels = self.roi_heads, labels[used]
        pooled = heads.box_roi_pool(features, by_image, [])
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        codes = codes.view(len(labels), self.num_rows, 4)[torch.arange(len(labels)), labels]
        aims = heads.box_coder.encode_single(boxes[used], regions[used])
        number = len(targets) * heads.fg_bg_sampler.batch_size_per_image
        of_labels = F.cross_entropy(logits, labels, reduction="sum") / number
        of_boxes = F.smooth_l1_loss(codes, aims, beta=1 / 9, reduction="sum") / number
        return {"loss_classifier_dn": of_labels, "loss_box_reg_dn": of_boxes}


def in_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (..., 4), cxcywh in [0, 1], to xyxy in pixels of an image of `size` (..., 2),
    height and width."""
    return box_convert(boxes, "cxcywh", "xyxy") * torch.cat([size, size], dim=-1)[..., [1, 0, 3, 2]]


class RegionLosses(nn.Module):
    """In place of `SetCriterion`: hands on the detector's losses, of which evaluation has none."""

    def __init__(self, options: DetectorOptions):
        super().__init__()
        of_labels, of_boxes = options.cls_loss_coef, options.bbox_loss_coef
        self.weight_dict = {"loss_objectness": of_labels, "loss_rpn_box_reg": of_boxes}
        for suffix in ("", "_dn") if options.use_dn else ("",):
            self.weight_dict |= {f"loss_classifier{suffix}": of_labels}
            self.weight_dict |= {f"loss_box_reg{suffix}": of_boxes}

    def forward(self, outputs: dict, targets: Any, num_boxes: Any = None) -> dict[str, Tensor]:
        return outputs.get("losses", {})


class RegionPostProcess(PostProcess):
    """The detector has selected and suppressed; its boxes are scaled."""

    def select(self, outputs: Any, sizes: Tensor) -> tuple[Any, ...]:
        scale = (sizes / outputs["sizes"]).flip(1).repeat(1, 2)
        boxes = [box * factor for box, factor in zip(outputs["boxes"], scale, strict=True)]
        ranks = [torch.arange(len(scores)) for scores in outputs["scores"]]  # for want of queries
        return outputs["scores"], outputs["labels"], boxes, ranks
