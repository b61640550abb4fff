"""Instability of the matching and distances from anchors to targets (DN-DETR, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.criterion import stack_layers
from models.dn_components import by_layer
from models.matcher import HungarianMatcher


class MatchingLog:
    """Measures, for each decoder layer and over a data set, the distance from anchors, if there are
    any, to their matched targets and the change of the matching since the previous epoch.

    `previous`: the previous epoch's `matches`, {image id: (L, Q) int16}, the index of the target
    that each query is matched to, or -1.
    """

    def __init__(self, matcher: HungarianMatcher, previous: dict[int, Tensor] | None = None):
        self.matcher, self.previous = matcher, previous or {}
        self.matches: dict[int, Tensor] = {}
        self.distance, self.num_matched = 0.0, 0  # sum (L,) and count of L1 distances

    @torch.no_grad()
    def update(self, outputs: dict, targets: Sequence[dict]) -> None:
        """Add the detector's `outputs` for a batch; `targets` must have an "image_id"."""
        layers = [*outputs["aux_outputs"], outputs]
        logits, boxes = stack_layers(layers)
        matched = self.matcher(logits, boxes, targets).split([len(t["boxes"]) for t in targets], 1)
        layer = torch.arange(len(layers), device=boxes.device)[:, None]
        for image, (query, target) in enumerate(zip(matched, targets, strict=True)):
            if "anchors" in outputs:
                anchors = outputs["anchors"][layer, image, query.clamp(min=0)]
                aims = target["boxes"][:, : anchors.shape[-1]]  # centres, if the anchors are points
                distance = (anchors - aims).abs().sum(-1) * (query >= 0)  # (L, n)
                self.distance += distance.double().sum(1).cpu()
                self.num_matched += int((query[0] >= 0).sum())
            target_of = torch.full((len(layers), logits.shape[2] + 1), -1, dtype=torch.int16)
            indices = torch.arange(query.shape[1], dtype=torch.int16).expand(query.shape)
            # Unmatched targets have query -1, which is the additional last column.
            target_of.scatter_(1, query.cpu() % target_of.shape[1], indices)
            self.matches[int(target["image_id"])] = target_of[:, :-1]

    @property
    def found(self) -> tuple[dict[int, Tensor], Tensor | float, int]:
        """This process's input to `join`: matches, sum and count of distances."""
        return self.matches, self.distance, self.num_matched

    def join(self, parts: Sequence[tuple]) -> None:
        """Combine the `found` of several processes."""
        matches, distances, counts = zip(*parts, strict=True)
        self.matches = {k: v for part in matches for k, v in part.items()}
        self.distance, self.num_matched = sum(distances), sum(counts)

    def summary(self) -> dict[str, float]:
        """Means for each decoder layer, named like the losses: `anchor_distance`, L1 per object in
        fractions of the image; `matching_instability`, the number of queries per image whose target
        has changed since the previous epoch, if there was one."""
        means = {}
        if self.num_matched:
            means["anchor_distance"] = self.distance / self.num_matched
        common = self.matches.keys() & self.previous.keys()
        if common:
            changed = [self.matches[id_] != self.previous[id_] for id_ in common]
            means["matching_instability"] = torch.stack(changed).sum(2).double().mean(0)
        return {name: value.item() for name, value in by_layer(means).items()}
