"""The assignment of targets to queries that costs least (DETR, Carion et al. 2020, section 3.1)."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from .classes import Classes
from .dn_components import generalized_box_iou, image_of_targets

Problem = tuple[Tensor, Tensor, Sequence[dict[str, Tensor]]]


class HungarianMatcher:
    """Matches predictions to the targets of their image.

    The cost is the weighted sum of the classification cost of `classes`, the L1 distance and the
    negated GIoU. Only pairs within an image are computed, on the predictions' device.
    Non-finite predictions are the last to be matched.
    """

    def __init__(self, cost_class: float, cost_bbox: float, cost_giou: float, classes: Classes):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.classes = classes

    def __call__(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh -> (L, N) int64.

        N counts the targets of all images in their order; an entry is the query that a target is
        matched to, or -1 for targets without a query, in an image with more targets than queries.
        """
        return self.match([(logits, boxes, targets)])[0]

    @torch.no_grad()
    def match(self, problems: Sequence[Problem]) -> list[Tensor]:
        """As a call for each (logits, boxes, targets), but the costs of all, and the assignments,
        are copied from and to the device together."""
        costs = [self.cost(*problem) for problem in problems]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu()
        matched, parts = [], on_host.split([cost.numel() for cost in costs])
        for part, cost, (_, _, targets) in zip(parts, costs, problems, strict=True):
            counts = [len(t["labels"]) for t in targets]
            of_images = part.view(cost.shape).split(counts, dim=1)
            matched.append(torch.cat([solve(x) for x in of_images], dim=1).flatten())
        sizes = [x.numel() for x in matched]
        on_device = torch.cat(matched).to(costs[0].device, non_blocking=True).split(sizes)
        return [x.view(cost.shape[:2]) for x, cost in zip(on_device, costs, strict=True)]

    def cost(self, logits: Tensor, boxes: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """The finite costs (L, N, Q) of all pairs of a target and a query of its image."""
        labels, target_boxes = (torch.cat([t[k] for t in targets]) for k in ("labels", "boxes"))
        image = image_of_targets(targets)
        pairs = boxes[:, image].float(), target_boxes.float()[:, None]
        corners = (box_convert(b, "cxcywh", "xyxy") for b in pairs)
        cost = (
            self.cost_class * self.classes.cost(logits, image, labels)
            + self.cost_bbox * (pairs[0] - pairs[1]).abs().sum(-1)
            - self.cost_giou * generalized_box_iou(*corners)
        )
        return cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)


def solve(costs: Tensor) -> Tensor:
    """Costs (L, n, Q) of an image's targets -> the query of each, (L, n), or -1."""
    matched = torch.full(costs.shape[:2], -1)
    for row, cost in zip(matched, costs.numpy(), strict=True):
        objects, queries = linear_sum_assignment(cost)
        row[torch.from_numpy(objects)] = torch.from_numpy(queries)
    return matched
