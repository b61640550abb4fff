"""Query denoising (DN-DETR, Li et al. 2022, section 4) for any DETR, and DINO's contrastive form
(Zhang et al. 2022, section 3.3).

Noised ground truth is put in front of the decoder's queries, in groups, and the decoder is trained
to restore it. These queries need no matching, so their targets are stable from the first step.

    content, anchors, attn_mask, dn = prepare_for_dn(targets, label_enc, anchors)
    logits, boxes = ...                                  # the decoder and its heads, as before
    logits, boxes = dn_post_process(logits, boxes, dn)   # only the matching part remains
    losses.update(compute_dn_loss(dn))                   # loss_ce_dn, loss_bbox_dn, ... for dn only

`prepare_for_cdn` instead of the first adds negatives: boxes with more noise, classified as
background. Queries need not be boxes: `embed_boxes` turns noised boxes into whatever a detector
uses as positions. This file needs only torch and torchvision, so it can be copied into another
project; it works on any device and in any dtype. The losses, the generalized IoU and the inverse
sigmoid are used by the whole project.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """log(x / (1 - x)), with x clamped to [0, 1] and both terms from below at `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


@dataclass
class Assignment:
    """The assignment of queries to N objects, and the predictions of L decoder layers.

    `to_label`, (image, query), are the queries trained to predict `labels`, `to_box` those trained
    to predict `boxes`, usually the same. All other queries are background, or, if `supervised` is
    given, those in it.
    """

    to_label: tuple[Tensor, Tensor]  # (N,) or (L, N) int64
    labels: Tensor  # (N,) int64
    to_box: tuple[Tensor, Tensor]  # (N,) or (L, N) int64
    boxes: Tensor  # (N, 4) cxcywh in [0, 1]
    supervised: Tensor | None = None  # (B, Q) bool
    found: Tensor | None = None  # (L, N), 0 for an object without a query, else 1
    pred_logits: Tensor = field(init=False)  # (L, B, Q, C)
    pred_boxes: Tensor = field(init=False)  # (L, B, Q, 4) cxcywh in [0, 1]

    @cached_property
    def predicted_boxes(self) -> Tensor:
        """(L, N, 4) float32, the predictions of `boxes`."""
        index = layers_of(self.pred_boxes), *self.to_box
        return self.pred_boxes[index].float()


@dataclass
class Denoising(Assignment):
    """The denoising queries of a batch; N counts groups * objects. `dn_post_process` fills in the
    predictions.

    noised_at, noised: image and query (K,), and boxes (K, 4), cxcywh in [0, 1], of the queries that
    are made from objects; with contrastive denoising K is 2 * N.
    """

    supervised: Tensor
    num_groups: int = 1
    noised_at: tuple[Tensor, Tensor] = field(init=False)
    noised: Tensor = field(init=False)

    @property
    def num_queries(self) -> int:
        """P, the length of the denoising part."""
        return self.supervised.shape[1]

    def divisor(self, num_boxes: float | None = None) -> float:
        """The losses are divided by `num_boxes` x groups, by default by the number of objects."""
        return max(len(self.labels), 1) if num_boxes is None else num_boxes * self.num_groups


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


def add_corner_noise(boxes: Tensor, scale: float, negative: bool) -> Tensor:
    """Move the corners by up to `scale` * (w, h) / 2 each way; negatives by once to twice that.

    Boxes (N, 4), cxcywh in [0, 1]; moved corners are clamped to [0, 1].
    """
    reach = (boxes[:, 2:] / 2).repeat(1, 2) * scale
    distance = torch.rand_like(boxes) + float(negative)
    sign = 2.0 * torch.randint_like(boxes, 2) - 1
    corners = box_convert(boxes, "cxcywh", "xyxy") + sign * distance * reach
    return box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")


def group_mask(num_groups: int, group_size: int, num_matching: int, device: torch.device) -> Tensor:
    """The self-attention mask (P + Q, P + Q), bool, True = blocked: rows are queries, columns keys.

    A denoising group is visible only to itself, because it would reveal the ground truth to the
    matching part and to the other groups. The matching part is visible to all.
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
    embed_boxes: Callable[[Tensor], Tensor] = inverse_sigmoid,
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
        num_groups: the number of groups; from 100 on, about the number of queries in all groups.
        embed_boxes: noised boxes (N, 4), cxcywh in [0, 1], to positions (N, ...), for a detector
            whose `anchors` are something else, (B, Q, ...); by default the inverse sigmoid.

    Returns:
        content (B, P + Q, D), anchors (B, P + Q, 4) before the sigmoid, the self-attention mask
        (P + Q, P + Q), True = blocked, and what `compute_dn_loss` needs. The mask is None if
        nothing was added; at inference, so is the last. A batch without objects has P = 0, a
        zero loss, and still gives `label_enc` a gradient, which DDP waits for.
    """
    batch_size, num_matching = anchors.shape[:2]
    width = label_enc.embedding_dim
    if content is None:
        content = with_indicator(label_enc.weight[-1], width + 1, 0.0)
        content = content.expand(batch_size, num_matching, -1)
    if targets is None:
        return content, anchors, None, None

    group_size = max(len(t["labels"]) for t in targets)
    num_groups = denoising_groups(num_groups, group_size)
    labels, boxes, where = _repeat(targets, num_groups, group_size, anchors)
    supervised = _true_at(where, batch_size, num_groups * group_size)
    dn = Denoising(where, labels, where, boxes, supervised, num_groups=num_groups)
    noisy_labels = add_label_noise(labels, label_enc.num_embeddings - 1, label_noise_ratio)
    known = label_enc(noisy_labels), add_box_noise(boxes, box_noise_scale)
    return _put_in_front(content, anchors, known, where, dn, embed_boxes)


def prepare_for_cdn(
    targets: Sequence[dict[str, Tensor]],
    label_enc: nn.Embedding,
    anchors: Tensor,
    content: Tensor,
    *,
    num_denoising: int = 200,
    label_noise_ratio: float = 0.5,
    box_noise_scale: float = 1.0,
    num_classes: int | None = None,
    embed_boxes: Callable[[Tensor], Tensor] = inverse_sigmoid,
) -> tuple[Tensor, Tensor, Tensor | None, Denoising]:
    """Put contrastive denoising queries in front: every group has each object twice, as a positive,
    with little noise, which is to be restored, and as a negative, which is background.

    Arguments and results are those of `prepare_for_dn`, but:
        num_denoising: about the number of queries. As released, numbers from 100 on are divided by
            twice the largest object count of the batch to give the number of groups, at least 1;
            smaller ones ARE the number of groups, which can be very many queries.
        label_noise_ratio: half of it is the probability that a label is redrawn.
        num_classes: labels to draw from; by default one fewer than label_enc has rows.
    """
    largest = max(len(t["labels"]) for t in targets)
    num_groups = denoising_groups(num_denoising, 2 * largest)
    labels, boxes, positive = _repeat(targets, num_groups, 2 * largest, anchors)
    image, query = positive
    # As released, the unused queries of images with fewer objects are background, too.
    size = len(anchors), num_groups * 2 * largest
    supervised = torch.ones(size, dtype=torch.bool, device=anchors.device)
    dn = Denoising(positive, labels, positive, boxes, supervised, num_groups=num_groups)
    num_classes = num_classes or label_enc.num_embeddings - 1
    noisy_labels = add_label_noise(labels.repeat(2), num_classes, label_noise_ratio / 2)
    noisy_boxes = [add_corner_noise(boxes, box_noise_scale, negative) for negative in (False, True)]
    known = label_enc(noisy_labels), torch.cat(noisy_boxes)
    where = image.repeat(2), torch.cat([query, query + largest])
    return _put_in_front(content, anchors, known, where, dn, embed_boxes)


def prepare_for_cdn_of_dn_detr(
    targets: Sequence[dict[str, Tensor]],
    label_enc: nn.Embedding,
    anchors: Tensor,
    content: Tensor,
    *,
    num_denoising: int = 100,
    label_noise_ratio: float = 0.2,
    box_noise_scale: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor | None, Denoising]:
    """Contrastive denoising as in DN-DETR's code: like `prepare_for_cdn`, but negatives have the
    label embedding of matching queries, and the code was written for one image per process.

    Every image lists its objects and then their negatives; the lists are concatenated over the
    images, and the first half of the whole gets little noise, the second half much. With one image
    these are the objects and the negatives. With more, a negative in the first half has its box
    restored, and an object in the second half keeps its label as target but not as embedding. The
    released figures come from this code.
    """
    counts = [len(t["labels"]) for t in targets]
    num_groups = denoising_groups(num_denoising, 2 * max(counts))
    doubled = [
        {k: t[k].repeat(2, *[1] * (t[k].dim() - 1)) for k in ("labels", "boxes")} for t in targets
    ]
    group_size, device = 2 * max(counts), anchors.device
    labels, boxes, where = _repeat(doubled, num_groups, group_size, anchors)
    is_object = torch.cat([torch.arange(2 * n) < n for n in counts]).repeat(num_groups)
    is_near = (torch.arange(2 * sum(counts)) < sum(counts)).repeat(num_groups)
    (image, query), supervised = where, _true_at(where, len(anchors), num_groups * group_size)
    at = [flags.nonzero()[:, 0].to(device, non_blocking=True) for flags in (is_object, is_near)]
    to_label, to_box = ((image[i], query[i]) for i in at)
    dn = Denoising(to_label, labels[at[0]], to_box, boxes[at[1]], supervised, num_groups=num_groups)
    is_object, is_near = (flags.to(device, non_blocking=True) for flags in (is_object, is_near))
    background_label = label_enc.num_embeddings - 1
    noisy_labels = add_label_noise(labels, background_label, label_noise_ratio)
    noisy_labels = noisy_labels.masked_fill(~(is_object & is_near), background_label)
    near, far = (add_corner_noise(boxes, box_noise_scale, negative) for negative in (False, True))
    known = label_enc(noisy_labels), torch.where(is_near[:, None], near, far)
    return _put_in_front(content, anchors, known, where, dn)


def denoising_groups(number: int, group_size: int) -> int:
    """The number of groups of `group_size` queries that together have about `number` queries, at
    least 1; as released, a number under 100 is the number of groups itself."""
    if number >= 100:
        number //= max(group_size, 1)
    return max(number, 1)


def _repeat(
    targets: Sequence[dict[str, Tensor]], num_groups: int, group_size: int, anchors: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Labels (N,) and boxes (N, 4) of all objects, repeated for each group, and where they are, in
    the first places of each group: image (N,) and query (N,)."""
    counts = [len(t["labels"]) for t in targets]
    labels = torch.cat([t["labels"] for t in targets]).repeat(num_groups)
    boxes = torch.cat([t["boxes"] for t in targets]).to(anchors.dtype).repeat(num_groups, 1)
    place = torch.cat([torch.arange(n) for n in counts])
    query = (place + group_size * torch.arange(num_groups)[:, None]).flatten()
    image = image_of_targets(targets).repeat(num_groups)
    return labels, boxes, (image, query.to(anchors.device, non_blocking=True))


def image_of_targets(targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """(N,) int64, the number of each target's image in the batch, on the targets' device."""
    counts = torch.tensor([len(t["labels"]) for t in targets])
    image = torch.arange(len(targets)).repeat_interleave(counts)
    return image.to(targets[0]["labels"].device, non_blocking=True)


def _true_at(where: tuple[Tensor, Tensor], *size: int) -> Tensor:
    """A bool tensor that is True only at `where`."""
    flags = torch.zeros(size, dtype=torch.bool, device=where[0].device)
    flags[where] = True
    return flags


def _put_in_front(
    content: Tensor,
    anchors: Tensor,
    known: tuple[Tensor, Tensor],
    where: tuple[Tensor, Tensor],
    dn: Denoising,
    embed_boxes: Callable[[Tensor], Tensor] = inverse_sigmoid,
) -> tuple[Tensor, Tensor, Tensor | None, Denoising]:
    """Known label embeddings and boxes as queries before the matching ones, and the mask."""
    batch_size, num_matching, dim = content.shape
    dn.noised_at, dn.noised = where, known[1]
    dn_content = content.new_zeros(batch_size, dn.num_queries, dim)
    dn_content[where] = with_indicator(known[0], dim, 1.0).to(content.dtype)
    dn_anchors = anchors.new_zeros(batch_size, dn.num_queries, *anchors.shape[2:])
    dn_anchors[where] = embed_boxes(known[1]).to(anchors.dtype)
    content = torch.cat([dn_content, content], dim=1)
    anchors = torch.cat([dn_anchors, anchors], dim=1)
    if dn.num_queries == 0:
        return content, anchors, None, dn
    group_size = dn.num_queries // dn.num_groups
    return content, anchors, group_mask(dn.num_groups, group_size, num_matching, anchors.device), dn


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


def compute_dn_loss(
    dn: Denoising | None, focal_alpha: float = 0.25, num_boxes: float | None = None
) -> dict[str, Tensor]:
    """Focal, L1 and GIoU loss of the denoising queries of each decoder layer, divided by
    `num_boxes` x groups; `num_boxes` is by default the number of objects.

    Named `loss_ce_dn`, `loss_bbox_dn`, `loss_giou_dn` for the last layer, with `_0`, `_1`, ... for
    those before it; weighted like the matching losses (1, 5, 2). Empty without `dn`.
    """
    if dn is None:
        return {}
    sums = {"ce": focal_loss(dn, focal_alpha), "bbox": l1_loss(dn), "giou": giou_loss(dn)}
    return by_layer({f"loss_{k}_dn": total / dn.divisor(num_boxes) for k, total in sums.items()})


def focal_loss(assignment: Assignment, alpha: float = 0.25) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), (L,), summed over queries and classes."""
    logits = assignment.pred_logits.float()
    background = focal_term(logits, 1 - alpha)
    if assignment.supervised is not None:
        background = background * assignment.supervised[..., None]
    # All classes of a query are background, except for its label.
    index = layers_of(logits), *assignment.to_label, assignment.labels
    labelled = logits[index]
    excess = focal_term(-labelled, alpha) - focal_term(labelled, 1 - alpha)
    return background.sum((1, 2, 3)) + _sum_found(excess, assignment)


def focal_term(logits: Tensor, weight: float) -> Tensor:
    """The sigmoid focal loss of logits whose classes are background; of others, that of -logits."""
    return weight * logits.sigmoid() ** 2 * F.softplus(logits)


def l1_loss(assignment: Assignment) -> Tensor:
    """L1 distance of the cxcywh boxes, (L,), summed over objects."""
    distance = (assignment.predicted_boxes - assignment.boxes.float()).abs().sum(-1)
    return _sum_found(distance, assignment)


def giou_loss(assignment: Assignment) -> Tensor:
    """1 - GIoU, (L,), summed over objects."""
    pairs = assignment.predicted_boxes, assignment.boxes.float()
    giou = generalized_box_iou(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in pairs))
    return _sum_found(1 - giou, assignment)


def _sum_found(losses: Tensor, assignment: Assignment) -> Tensor:
    """(L, N) -> (L,), over the objects that have a query."""
    return (losses if assignment.found is None else losses * assignment.found).sum(1)


def layers_of(predictions: Tensor) -> Tensor:
    """(L, ...) -> (L, 1), the layers' numbers, to index the predictions with."""
    return torch.arange(len(predictions), device=predictions.device)[:, None]


def by_layer(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: (L,)} -> {name: last layer's, name_0: first layer's, ...}, the released names."""
    named = {}
    for name, values in losses.items():
        *auxiliary, named[name] = values.unbind()
        named.update({f"{name}_{i}": value for i, value in enumerate(auxiliary)})
    return named


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019) of corner boxes (..., 4) that broadcast, -> (...).

    Pairs: equal shapes. All against all: `boxes1[:, None], boxes2[None]`. Boxes without area give
    -1 to 0 and NaN gives NaN; nothing is asserted.
    """
    x1, y1, x2, y2 = boxes1.unbind(-1)
    u1, v1, u2, v2 = boxes2.unbind(-1)
    tiny = torch.finfo(boxes1.dtype).tiny
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    intersection = width * (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
    hull = (torch.maximum(x2, u2) - torch.minimum(x1, u1)) * (
        torch.maximum(y2, v2) - torch.minimum(y1, v1)
    )
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
