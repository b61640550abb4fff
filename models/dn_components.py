"""Query denoising (DN-DETR, Li et al. 2022, section 4), for this project's models and for any DETR.

Ground truth with noise is put in front of the decoder's queries, in groups, and the decoder is
trained to restore it; no matching is needed there, so the targets are stable from the first step.

    content, anchors, attn_mask, dn = prepare_for_dn(targets, label_enc, anchors)
    logits, boxes = ...                                  # the decoder and its heads, as before
    logits, boxes = dn_post_process(logits, boxes, dn)   # only the matching part is left
    losses.update(compute_dn_loss(dn))                   # loss_ce_dn, loss_bbox_dn, ... for dn only

Needs nothing of this package but `util.box_ops`, and runs on any device and in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from util.box_ops import box_losses, inverse_sigmoid


@dataclass
class Denoising:
    """What the denoising queries of a batch are made from. N counts groups * objects.

    Query `query[n]` of image `batch[n]` is to restore `labels[n]` and `boxes[n]`. `num_queries` is
    P, the length of the denoising part: groups times the largest object count of the batch.
    `dn_post_process` fills in what the decoder said about them.
    """

    num_groups: int
    num_queries: int
    batch: Tensor  # (N,) int64
    query: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    boxes: Tensor  # (N, 4) cxcywh in [0, 1]
    pred_logits: Tensor | None = None  # (L, B, P, C)
    pred_boxes: Tensor | None = None  # (L, B, P, 4)


def add_label_noise(labels: Tensor, num_classes: int, ratio: float) -> Tensor:
    """Replace each label with probability `ratio` by one drawn uniformly, which may be the same."""
    drawn = torch.randint_like(labels, num_classes)
    return torch.where(torch.rand(labels.shape, device=labels.device) < ratio, drawn, labels)


def add_box_noise(boxes: Tensor, scale: float) -> Tensor:
    """Shift centres by up to `scale` * (w, h) / 2 and change sizes by up to `scale` * (w, h).

    Both are uniform in both directions, so with a scale under 1 the centre stays inside the box.
    Boxes (N, 4), cxcywh in [0, 1], are clamped to [0, 1].
    """
    size = boxes[:, 2:]
    reach = torch.cat([size / 2, size], dim=1) * scale
    return (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)


def group_mask(num_groups: int, group_size: int, num_matching: int, device: torch.device) -> Tensor:
    """Who may not see whom, (P + Q, P + Q) bool, True = blocked, rows look at columns.

    Nobody outside a group sees its queries: not the matching part, to which they would give the
    answer away, nor another group. The groups see the matching part.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = F.pad(group, (0, num_matching), value=-1)
    return (group[:, None] != group[None, :]) & (group[None, :] >= 0)


def with_indicator(content: Tensor, dim: int, value: float) -> Tensor:
    """Append the indicator, 1 for denoising and 0 for matching, where the embedding leaves room."""
    return F.pad(content, (0, dim - content.shape[-1]), value=value)


def prepare_for_dn(
    targets: Sequence[dict[str, Tensor]] | None,
    label_enc: nn.Embedding,
    anchors: Tensor,
    content: Tensor | None = None,
    *,
    num_groups: int = 5,
    label_noise_ratio: float = 0.2,
    box_noise_scale: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor | None, Denoising | None]:
    """Put denoising queries in front of the matching queries.

    Args:
        targets: for each image "labels" (n,) and "boxes" (n, 4), cxcywh in [0, 1]; None at
            inference, which adds nothing.
        label_enc: C + 1 embeddings, the last for matching queries; D wide, or D - 1 to leave room
            for the indicator that tells denoising (1) from matching (0) queries.
        anchors: (B, Q, 4), the matching queries' anchors before the sigmoid.
        content: (B, Q, D), the matching queries' content; by default label_enc's last row with
            indicator 0, as in DN-DETR, which makes D one more than label_enc is wide.

    Returns:
        content (B, P + Q, D), anchors (B, P + Q, 4) before the sigmoid, the self-attention mask
        (P + Q, P + Q), True = blocked, and what `compute_dn_loss` needs. The mask is None where
        nothing was added; at inference, so is the latter. A batch without objects has P = 0, a
        zero loss, and still gives `label_enc` a gradient, which DDP waits for.
    """
    batch_size, num_matching = anchors.shape[:2]
    width = label_enc.embedding_dim
    if content is None:
        content = with_indicator(label_enc.weight[-1], width + 1, 0.0)
        content = content.expand(batch_size, num_matching, -1)
    if targets is None:
        return content, anchors, None, None

    counts = [len(t["labels"]) for t in targets]
    group_size = max(counts)
    device = anchors.device
    labels = torch.cat([t["labels"] for t in targets]).repeat(num_groups)
    boxes = torch.cat([t["boxes"] for t in targets]).to(anchors.dtype).repeat(num_groups, 1)
    image = torch.arange(batch_size).repeat_interleave(torch.tensor(counts))
    place = torch.cat([torch.arange(n) for n in counts])
    query = (place + group_size * torch.arange(num_groups)[:, None]).flatten().to(device)
    batch = image.repeat(num_groups).to(device)

    num_denoising = num_groups * group_size
    known = label_enc(add_label_noise(labels, label_enc.num_embeddings - 1, label_noise_ratio))
    known = with_indicator(known, content.shape[-1], 1.0).to(content.dtype)
    dn_content = content.new_zeros(batch_size, num_denoising, content.shape[-1])
    dn_content[batch, query] = known
    dn_anchors = anchors.new_zeros(batch_size, num_denoising, 4)
    dn_anchors[batch, query] = inverse_sigmoid(add_box_noise(boxes, box_noise_scale))
    return (
        torch.cat([dn_content, content], dim=1),
        torch.cat([dn_anchors, anchors], dim=1),
        group_mask(num_groups, group_size, num_matching, device) if num_denoising else None,
        Denoising(num_groups, num_denoising, batch, query, labels, boxes),
    )


def dn_post_process(logits: Tensor, boxes: Tensor, dn: Denoising | None) -> tuple[Tensor, Tensor]:
    """Split off the denoising part of (L, B, P + Q, C) and (L, B, P + Q, 4) predictions into `dn`.

    Returns the matching part, (L, B, Q, C) and (L, B, Q, 4); without `dn` the input as it is.
    """
    if dn is None:
        return logits, boxes
    split = [dn.num_queries, logits.shape[2] - dn.num_queries]
    dn.pred_logits, logits = logits.split(split, dim=2)
    dn.pred_boxes, boxes = boxes.split(split, dim=2)
    return logits, boxes


def compute_dn_loss(dn: Denoising | None, focal_alpha: float = 0.25) -> dict[str, Tensor]:
    """Focal, L1 and GIoU loss of the denoising queries, over their number, for each decoder layer.

    Named `loss_ce_dn`, `loss_bbox_dn`, `loss_giou_dn` for the last layer, with `_0`, `_1`, ... for
    those before it; weighted like the matching losses (1, 5, 2). Empty without `dn`.
    """
    if dn is None:
        return {}
    logits = dn.pred_logits[:, dn.batch, dn.query].float()  # (L, N, C)
    boxes = dn.pred_boxes[:, dn.batch, dn.query].float()
    onehot = F.one_hot(dn.labels, logits.shape[-1]).to(logits).expand_as(logits)
    loss_ce = sigmoid_focal_loss(logits, onehot, focal_alpha)
    loss_bbox, loss_giou = box_losses(boxes, dn.boxes.float())
    num = max(len(dn.labels), 1)
    return by_layer(
        {
            "loss_ce_dn": loss_ce.sum((1, 2)) / num,
            "loss_bbox_dn": loss_bbox.sum(1) / num,
            "loss_giou_dn": loss_giou.sum(1) / num,
        }
    )


def by_layer(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: (L,)} -> {name: last layer's, name_0: first layer's, ...}, the released names."""
    named = {}
    for name, values in losses.items():
        *auxiliary, named[name] = values.unbind()
        named.update({f"{name}_{i}": value for i, value in enumerate(auxiliary)})
    return named
