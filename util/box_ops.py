"""Box formats, generalized IoU, box losses and the inverse sigmoid that anchors are kept in."""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


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


def box_losses(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of paired cxcywh boxes (..., 4) that broadcast, both (...)."""
    giou = generalized_box_iou(box_cxcywh_to_xyxy(pred), box_cxcywh_to_xyxy(target))
    return (pred - target).abs().sum(-1), 1 - giou


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """log(x / (1 - x)), with x clamped to [0, 1] and both terms from below at `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
