"""From a detector's outputs to boxes in pixels."""

import torch
from torch import Tensor, nn

from util.box_ops import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Keeps the `num_select` best of all (query, class) pairs, by the class's sigmoid score."""

    def __init__(self, num_select: int):
        super().__init__()
        self.num_select = num_select

    def forward(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """sizes (B, 2): height and width, without padding, that boxes are wanted in.

        Returns for each image "scores" (k,), best first, "labels" (k,), "boxes" (k, 4) xyxy in
        pixels.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        num_classes = logits.shape[-1]
        scores = logits.sigmoid().flatten(1)
        scores, index = scores.topk(min(self.num_select, scores.shape[1]), dim=1)
        query, labels = index // num_classes, index % num_classes
        boxes = box_cxcywh_to_xyxy(boxes).gather(1, query[..., None].expand(-1, -1, 4))
        height, width = sizes.to(boxes).unbind(1)
        boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
        return [
            {"scores": s, "labels": c, "boxes": b}
            for s, c, b in zip(scores, labels, boxes, strict=True)
        ]
