"""How stable the matching is, and how far anchors are from their targets (DN-DETR, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.dn_components import by_layer
from models.matcher import HungarianMatcher


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
