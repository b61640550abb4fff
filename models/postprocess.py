"""From a detector's outputs to boxes in pixels."""

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from .classes import Classes


class PostProcess(nn.Module):
    """Keeps the `num_select` best by the scores of `classes`; with `nms_iou_threshold` above 0,
    these go through non-maximum suppression over all classes."""

    def __init__(self, num_select: int, nms_iou_threshold: float, classes: Classes):
        super().__init__()
        self.classes = classes
        self.num_select, self.nms_iou_threshold = num_select, nms_iou_threshold

    def forward(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """sizes (B, 2): the images' height and width, without padding, that boxes are scaled to.

        Returns for each image "scores" (k,), best first, "labels" (k,), "boxes" (k, 4) xyxy in
        pixels.
        """
        results = [
            {"scores": s, "labels": c, "boxes": b}
            for s, c, b in zip(*self.select(outputs, sizes), strict=True)
        ]
        if self.nms_iou_threshold <= 0:
            return results
        kept = [nms(r["boxes"], r["scores"], self.nms_iou_threshold) for r in results]
        return [{k: v[keep] for k, v in r.items()} for r, keep in zip(results, kept, strict=True)]

    def select(self, outputs: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, k), labels (B, k) and boxes (B, k, 4), before suppression."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        scores, query, labels = self.classes.best(logits, self.num_select)
        boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
        height, width = sizes.to(boxes).unbind(1)
        return scores, labels, boxes * torch.stack([width, height, width, height], dim=1)[:, None]
