"""The losses of all decoder layers, of the tokens that queries are selected from, of denoising."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .classes import Classes, SigmoidClasses, classes_of
from .detector import LayerOutputs, Outputs
from .dn_components import Assignment, by_layer, giou_loss, image_of_targets, l1_loss
from .masks import dice_loss, mask_loss, matched_masks
from .matcher import HungarianMatcher
from .options import LossOptions

Targets = Sequence[dict[str, Tensor]]


@dataclass
class Matching(Assignment):
    """The matcher's assignment and its source, for losses that need more than logits and boxes:
    the outputs of each layer, for the last one those of the whole detector, and the targets."""

    layers: Sequence[LayerOutputs] = ()
    targets: Targets = ()

    masks = cached_property(matched_masks)  # which several losses use


@dataclass(frozen=True)
class LossTerm:
    """A loss: its name in `weight_dict`, the option with its weight, the function that computes it
    from an assignment, (L,), and the parts it applies to: the decoder's matching queries, those of
    its last layer alone, (1,), the tokens that queries are selected from, denoising queries. A part
    other than denoising gives a `Matching`. Unless it `is_mean`, the loss is then divided by the
    number of objects.
    """

    name: str
    weight_option: str
    compute: Callable[[Any], Tensor]
    parts: tuple[str, ...] = ("decoder", "tokens", "denoising")
    is_mean: bool = False


def standard_terms(options: LossOptions) -> list[LossTerm]:
    """The losses of all published models."""
    classes = classes_of(options)
    return [
        LossTerm("loss_ce", "cls_loss_coef", classes.loss, is_mean=classes.is_mean),
        LossTerm("loss_bbox", "bbox_loss_coef", l1_loss),
        LossTerm("loss_giou", "giou_loss_coef", giou_loss),
    ]


# For the last layer alone, and for targets that have masks.
MASK_TERMS = [
    LossTerm("loss_mask", "mask_loss_coef", mask_loss, ("last layer",)),
    LossTerm("loss_dice", "dice_loss_coef", dice_loss, ("last layer",)),
]


class SetCriterion(nn.Module):
    """The loss terms after Hungarian matching, for all decoder layers at once.

    Args:
        terms: the losses to compute; each lists the parts it applies to.
        weight_dict: {loss name: weight} of the losses that are trained: a term's name for the last
            decoder layer, with `_0`, `_1`, ... for those before it, `_dn` for denoising, `_interm`
            or `_enc` for the encoder's tokens that queries are selected from.
        dn_num_boxes: "mean" divides the denoising losses like the others, "process" by the number
            of objects in this process.
        classes: the meaning of the logits, for `cardinality_error`.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        terms: Sequence[LossTerm],
        weight_dict: dict[str, float],
        dn_num_boxes: str = "process",
        classes: Classes | None = None,
    ):
        super().__init__()
        self.classes = classes or SigmoidClasses()
        self.matcher, self.terms, self.weight_dict = matcher, list(terms), weight_dict
        self.dn_num_boxes = dn_num_boxes

    def forward(
        self, outputs: Outputs, targets: Targets, num_boxes: float | None = None
    ) -> dict[str, Tensor]:
        """The detector's outputs and its targets -> {loss name: scalar}, not yet weighted.

        Losses are divided by `num_boxes`, by default the number of target boxes, at least 1;
        denoising losses, with "mean", by num_boxes x groups. Processes that train together pass the
        mean over all of them.
        Besides the losses there are, for reading only, `class_error` (% of the matched queries
        whose best class is wrong) and `cardinality_error` (difference between the number of
        confident queries and the number of objects) of the last layer, and the `dn_groups` and
        `dn_queries` of the step.
        """
        if num_boxes is None:
            num_boxes = max(sum(len(t["labels"]) for t in targets), 1)
        parts = [("decoder", "", [*outputs["aux_outputs"], outputs], targets)]
        if "interm_outputs" in outputs:  # the selected tokens are trained as one more layer
            parts.append(("tokens", "_interm", [outputs["interm_outputs"]], targets))
        if "enc_outputs" in outputs:  # all tokens learn to tell objects, class 0, from background
            objects = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            parts.append(("tokens", "_enc", [outputs["enc_outputs"]], objects))
        losses: dict[str, Tensor] = {}
        matchings = self.assign([part[2:] for part in parts])
        for (part, suffix, *_), matching in zip(parts, matchings, strict=True):
            losses |= self.losses(matching, part, num_boxes, suffix)
        if "masks" in targets[0]:
            losses |= self.losses(matchings[0], "last layer", num_boxes)
        losses |= reading_figures(matchings[0], self.classes)
        if dn := outputs.get("dn"):
            sizes = {"dn_groups": dn.num_groups, "dn_queries": dn.num_queries}
            losses |= {k: torch.full_like(losses["loss_ce"], n) for k, n in sizes.items()}
            dn_boxes = num_boxes if self.dn_num_boxes == "mean" else None
            losses |= self.losses(dn, "denoising", dn.divisor(dn_boxes), "_dn")
        return losses

    def assign(self, parts: Sequence[tuple[Sequence[LayerOutputs], Targets]]) -> list[Matching]:
        """For each list of layers and its targets, the least-cost assignment of each layer's
        queries to the targets; all are found together."""
        problems = [(layers, *stack_layers(layers), targets) for layers, targets in parts]
        queries = self.matcher.match([problem[1:] for problem in problems])
        matchings = []
        for (layers, *predictions, targets), query in zip(problems, queries, strict=True):
            where = image_of_targets(targets), query.clamp(min=0)
            labels, boxes = (torch.cat([t[k] for t in targets]) for k in ("labels", "boxes"))
            found = (query >= 0).float()
            matching = Matching(where, labels, where, boxes, None, found, layers, targets)
            matching.pred_logits, matching.pred_boxes = predictions
            matchings.append(matching)
        return matchings

    def losses(
        self, assignment: Assignment, part: str, num_boxes: float, suffix: str = ""
    ) -> dict[str, Tensor]:
        """{loss name: scalar} of the terms that apply to `part`."""
        terms = [term for term in self.terms if part in term.parts]
        divided = lambda t: t.compute(assignment) / (1 if t.is_mean else num_boxes)
        return by_layer({t.name + suffix: divided(t) for t in terms})


def stack_layers(layers: Sequence[LayerOutputs]) -> tuple[Tensor, Tensor]:
    """Logits (L, B, Q, C) and boxes (L, B, Q, 4) of L layers, float32."""
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    return logits.float(), torch.stack([layer["pred_boxes"] for layer in layers]).float()


@torch.no_grad()
def reading_figures(matching: Matching, classes: Classes) -> dict[str, Tensor]:
    """`class_error` and `cardinality_error`; see `SetCriterion`."""
    logits, labels = matching.pred_logits[-1], matching.labels
    image, query = matching.to_label
    hit = logits[image, query[-1]].argmax(-1) == labels
    confident = classes.finds_object(logits).sum(1)
    counts = torch.tensor([len(t["labels"]) for t in matching.targets])
    excess = confident - counts.to(confident.device, non_blocking=True)
    return {
        "class_error": 100 - 100 * hit.float().sum() / max(len(labels), 1),
        "cardinality_error": excess.abs().float().mean(),
    }


def loss_weights(
    options: LossOptions,
    terms: Sequence[LossTerm],
    num_layers: int,
    with_denoising: bool,
    token_suffix: str,
) -> dict[str, float]:
    """{loss name: weight}, `SetCriterion.weight_dict`, for a decoder of `num_layers` layers.

    Without `aux_loss` the layers before the last have weight 0 instead of no loss, so that their
    own heads have a gradient, which DDP waits for. `token_suffix` is "" where no tokens are
    selected.
    """
    weight = {term.name: getattr(options, term.weight_option) for term in terms}
    of_part = lambda part: {t.name: weight[t.name] for t in terms if part in t.parts}
    layers = of_part("decoder")
    if with_denoising:
        layers |= {f"{name}_dn": w for name, w in of_part("denoising").items()}
    weights = dict(layers)
    for i in range(num_layers - 1):
        weights |= {f"{name}_{i}": w if options.aux_loss else 0.0 for name, w in layers.items()}
    weights |= of_part("last layer")
    if token_suffix:
        for name, w in of_part("tokens").items():
            is_dropped = options.no_interm_box_loss and name in ("loss_bbox", "loss_giou")
            coefficient = 0.0 if is_dropped else w * options.interm_loss_coef
            weights[f"{name}{token_suffix}"] = coefficient
    return weights
