"""The assignment of targets to queries that costs least (DETR, Carion et al. 2020, section 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .dn_components import box_cxcywh_to_xyxy, by_layer, generalized_box_iou


class HungarianMatcher:
    """Matches every decoder layer's predictions to the targets, all layers in one go.

    The cost is the weighted sum of the focal term (positive minus negative), the L1 distance and
    the negated GIoU. Only pairs within an image are computed, on the predictions' device; they
    travel to the CPU once. Non-finite predictions are the last to be matched.
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
        matched to, or -1 for those left over where an image has more targets than queries.
        """
        counts = [len(t["labels"]) for t in targets]
        matched = torch.full((len(logits), sum(counts)), -1)
        if sum(counts) == 0:
            return matched.to(logits.device)
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        target_boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)
        cost = self.cost(logits.float(), boxes.float(), labels, target_boxes.float())
        cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
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
        giou = generalized_box_iou(
            box_cxcywh_to_xyxy(boxes)[:, :, :, None], box_cxcywh_to_xyxy(target_boxes)[:, None]
        )
        return (
            self.cost_class * (positive - negative)
            + self.cost_bbox * torch.cdist(boxes, target_boxes[None], p=1)
            - self.cost_giou * giou
        )


class MatchingLog:
    """Collects, over a data set and for each decoder layer, how far anchors are from the targets
    that they are matched to, and how stable the matching is from one epoch to the next (DN-DETR,
    section 3).

    `previous` are the `matches` of the epoch before: {image id: (L, Q) int16}, the index of the
    target that a query is matched to, or -1.
    """

    def __init__(self, matcher: HungarianMatcher, previous: dict[int, Tensor] | None = None):
        self.matcher, self.previous = matcher, previous or {}
        self.matches: dict[int, Tensor] = {}
        self.distance, self.num_matched = 0.0, 0  # sum (L,) and number of L1 distances

    @torch.no_grad()
    def update(self, outputs: dict, targets: Sequence[dict]) -> None:
        """What the detector returned and its targets, which here need their "image_id"."""
        layers = [*outputs["aux_outputs"], outputs]
        logits, boxes = (torch.stack([x[k] for x in layers]) for k in ("pred_logits", "pred_boxes"))
        matched = self.matcher(logits, boxes, targets).split([len(t["boxes"]) for t in targets], 1)
        layer = torch.arange(len(layers), device=boxes.device)[:, None]
        for image, (query, target) in enumerate(zip(matched, targets, strict=True)):
            anchors = outputs["anchors"][layer, image, query.clamp(min=0)]
            distance = (anchors - target["boxes"]).abs().sum(-1) * (query >= 0)  # (L, n)
            self.distance += distance.double().sum(1).cpu()
            self.num_matched += int((query[0] >= 0).sum())
            objects = torch.full((len(layers), logits.shape[2] + 1), -1, dtype=torch.int16)
            numbers = torch.arange(query.shape[1], dtype=torch.int16).expand(query.shape)
            objects.scatter_(1, query.cpu() % objects.shape[1], numbers)  # -1: the spare column
            self.matches[int(target["image_id"])] = objects[:, :-1]

    @property
    def found(self) -> tuple[dict[int, Tensor], Tensor | float, int]:
        """What `join` takes from a process: matches, sum and number of distances."""
        return self.matches, self.distance, self.num_matched

    def join(self, parts: Sequence[tuple]) -> None:
        """Take over what the logs of several processes have `found`."""
        matches, distances, numbers = zip(*parts, strict=True)
        self.matches = {k: v for part in matches for k, v in part.items()}
        self.distance, self.num_matched = sum(distances), sum(numbers)

    def summary(self) -> dict[str, float]:
        """Means by decoder layer, named as the losses are: `anchor_distance`, L1 in fractions of
        the image, over objects; `matching_instability`, the queries whose target is another one
        than in the epoch before, over images, where there was one."""
        means = {}
        if self.num_matched:
            means["anchor_distance"] = self.distance / self.num_matched
        both = [id_ for id_ in self.matches if id_ in self.previous]
        if both:
            changed = [self.matches[id_] != self.previous[id_] for id_ in both]
            means["matching_instability"] = torch.stack(changed).sum(2).double().mean(0)
        return {name: value.item() for name, value in by_layer(means).items()}
