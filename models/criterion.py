"""The losses of every decoder layer, and of the denoising part where there is one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .dn_components import box_losses, by_layer, compute_dn_loss
from .matcher import HungarianMatcher

TERMS = ("loss_ce", "loss_bbox", "loss_giou")


class SetCriterion(nn.Module):
    """Focal, L1 and GIoU loss after Hungarian matching, for all decoder layers at once.

    `dn_num_boxes` is "mean" where the denoising losses are divided like the others, and "process"
    where they are by the objects of this process alone.

    `weight_dict` names the losses that are trained, with their weights: `loss_ce`, `loss_bbox`,
    `loss_giou` for the last layer, `_0`, `_1`, ... for those before it, `_dn` for denoising,
    `_interm` or `_enc` for the encoder's tokens that queries are selected from.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        focal_alpha: float,
        dn_num_boxes: str = "process",
    ):
        super().__init__()
        self.matcher, self.weight_dict, self.focal_alpha = matcher, weight_dict, focal_alpha
        self.dn_num_boxes = dn_num_boxes

    def forward(
        self,
        outputs: dict,
        targets: Sequence[dict[str, Tensor]],
        num_boxes: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """What the detector returned and its targets -> {loss name: scalar}, not yet weighted.

        `num_boxes` is what the losses are divided by, those of denoising, with "mean", by so many
        in every group; by default the number of target boxes, at least 1. Processes that train
        together pass its mean over all of them.
        Beside the losses there are `class_error`, the matched queries whose best class is wrong
        (%), and `cardinality_error`, how far the number of confident queries is from the
        number of objects, both of the last layer, and the `dn_groups` and `dn_queries` of the
        step; all for reading only.
        """
        losses = self.matching_losses([*outputs["aux_outputs"], outputs], targets, num_boxes)
        if "interm_outputs" in outputs:  # DINO's selected tokens, as one more layer
            selected = self.matching_losses([outputs["interm_outputs"]], targets, num_boxes)
            losses |= {f"{name}_interm": selected[name] for name in TERMS}
        if "enc_outputs" in outputs:  # all tokens, told apart only from background
            objects = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            tokens = self.matching_losses([outputs["enc_outputs"]], objects, num_boxes)
            losses |= {f"{name}_enc": tokens[name] for name in TERMS}
        if dn := outputs.get("dn"):
            sizes = {"dn_groups": dn.num_groups, "dn_queries": dn.num_queries}
            losses |= {k: torch.full_like(losses["loss_ce"], n) for k, n in sizes.items()}
        dn_boxes = num_boxes if self.dn_num_boxes == "mean" else None
        return losses | compute_dn_loss(dn, self.focal_alpha, dn_boxes)

    def matching_losses(
        self,
        layers: Sequence[dict[str, Tensor]],
        targets: Sequence[dict[str, Tensor]],
        num_boxes: Tensor | float | None,
    ) -> dict[str, Tensor]:
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        query = self.matcher(logits, boxes, targets)  # (L, N)
        counts = [len(t["labels"]) for t in targets]
        labels = torch.cat([t["labels"] for t in targets])
        target_boxes = torch.cat([t["boxes"] for t in targets]).float()
        if num_boxes is None:
            num_boxes = max(len(labels), 1)

        image = torch.arange(len(targets)).repeat_interleave(torch.tensor(counts)).to(query.device)
        layer = torch.arange(len(logits), device=query.device)[:, None]
        matched = (query >= 0).float()
        query = query.clamp(min=0)
        onehot = torch.zeros_like(logits)
        onehot.index_put_((layer, image, query, labels), matched, accumulate=True)
        loss_ce = sigmoid_focal_loss(logits, onehot, self.focal_alpha)
        loss_bbox, loss_giou = box_losses(boxes[layer, image, query], target_boxes)
        sums = loss_ce.sum((1, 2, 3)), (loss_bbox * matched).sum(1), (loss_giou * matched).sum(1)
        losses = by_layer({k: total / num_boxes for k, total in zip(TERMS, sums, strict=True)})
        with torch.no_grad():
            hit = logits[-1, image, query[-1]].argmax(-1) == labels
            losses["class_error"] = 100 - 100 * hit.float().sum() / max(len(labels), 1)
            confident = (logits[-1].sigmoid().amax(-1) > 0.5).sum(1)
            excess = confident - torch.tensor(counts).to(confident)
            losses["cardinality_error"] = excess.abs().float().mean()
        return losses
