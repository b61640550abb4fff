"""From a detector's outputs to boxes in pixels."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from .classes import Classes
from .masks import MaskOutputs


class PostProcess(nn.Module):
    """Keeps the `num_select` best by the scores of `classes`; with `nms_iou_threshold` above 0,
    these go through non-maximum suppression over all classes."""

    def __init__(self, num_select: int, nms_iou_threshold: float, classes: Classes):
        super().__init__()
        self.classes = classes
        self.num_select, self.nms_iou_threshold = num_select, nms_iou_threshold

    def forward(
        self, outputs: dict[str, Any], sizes: Tensor, min_score: float = 0.0
    ) -> list[dict[str, Tensor]]:
        """sizes (B, 2): the images' height and width, without padding, that boxes are scaled to.

        Returns for each image "scores" (k,), best first, "labels" (k,), "boxes" (k, 4) xyxy in
        pixels. If the detector has a mask head, there are also "masks" (k, height, width), bool,
        and only detections with a score of at least `min_score`.
        """
        results = []
        for i, columns in enumerate(zip(*self.select(outputs, sizes), strict=True)):
            result = dict(zip(("scores", "labels", "boxes", "query"), columns, strict=True))
            if self.nms_iou_threshold > 0:
                kept = nms(result["boxes"], result["scores"], self.nms_iou_threshold)
                result = {k: v[kept] for k, v in result.items()}
            if isinstance(outputs, MaskOutputs):
                kept = result["scores"] >= min_score
                result = {k: v[kept] for k, v in result.items()}
                size = sizes[i].int().tolist()
                result["masks"] = outputs.masks(i, result["query"], size)
            del result["query"]
            results.append(result)
        return results

    def select(self, outputs: dict[str, Any], sizes: Tensor) -> tuple[Tensor, ...]:
        """Scores (B, k), labels (B, k), boxes (B, k, 4) and queries (B, k), before suppression."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        scores, query, labels = self.classes.best(logits, self.num_select)
        boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
        height, width = sizes.to(boxes).unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)[:, None]
        return scores, labels, boxes * scale, query
