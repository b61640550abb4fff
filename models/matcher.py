"""The assignment of targets to queries that costs least (DETR, Carion et al. 2020, section 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from .dn_components import generalized_box_iou


class HungarianMatcher:
    """Matches every decoder layer's predictions to the targets, all layers in one go.

    The cost is the weighted sum of the focal term (positive minus negative), the L1 distance and
    the negated GIoU. Only pairs within an image are computed, on the predictions' device, and
    copied to the CPU once. Non-finite predictions are the last to be matched.
    """

    def __init__(self, cost_class: float, cost_bbox: float, cost_giou: float, focal_alpha: float):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh -> (L, N) int64.

        N counts the targets of all images in their order; an entry is the query that a target is
        matched to, or -1 for targets without a query, in an image with more targets than queries.
        """
        counts = [len(t["labels"]) for t in targets]
        matched = torch.full((len(logits), sum(counts)), -1)
        if sum(counts) == 0:
            return matched.to(logits.device)
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        target_boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)
        costs = self.cost(logits.float(), boxes.float(), labels, target_boxes.float())
        cost = costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
        start = 0
        for image, count in enumerate(counts):
            for layer in range(len(logits)):
                queries, objects = linear_sum_assignment(cost[layer, image, :, :count])
                matched[layer, start + torch.from_numpy(objects)] = torch.from_numpy(queries)
            start += count
        return matched.to(logits.device)

    def cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        """(L, B, Q, C), (L, B, Q, 4), (B, T), (B, T, 4) -> (L, B, Q, T)."""
        index = labels[None, :, None].expand(*logits.shape[:3], -1)
        x = logits.gather(-1, index)
        prob = x.sigmoid()
        positive = self.focal_alpha * (1 - prob) ** 2 * F.softplus(-x)
        negative = (1 - self.focal_alpha) * prob**2 * F.softplus(x)
        corners, target_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, target_boxes))
        giou = generalized_box_iou(corners[:, :, :, None], target_corners[:, None])
        return (
            self.cost_class * (positive - negative)
            + self.cost_bbox * torch.cdist(boxes, target_boxes[None], p=1)
            - self.cost_giou * giou
        )
