"""Query selection (DINO, section 3.4).

Static: content and anchors are learned. Pure: both come from the encoder tokens with the highest
scores. Mixed, as in DINO: anchors come from those tokens, the content is learned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .deformable_transformer import LevelTokens
from .errors import UserError


@dataclass
class Selection:
    """K selected tokens per image: index (B, K) among all S tokens, features (B, K, D) and anchors
    (B, K, 4) before the sigmoid. And the encoder heads' predictions for the tokens that are
    trained, all or the selected ones: logits (B, S or K, C) and boxes (B, S or K, 4) before the
    sigmoid."""

    index: Tensor
    features: Tensor
    anchors: Tensor
    logits: Tensor
    boxes: Tensor


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """(B, S, n), (B, K) -> (B, K, n)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def proposals(tokens: LevelTokens) -> tuple[Tensor, Tensor]:
    """A box centred on each token, with sides 0.05 * 2^level.

    Returns (B, S, 4) before the sigmoid, infinite if the token is padding or a coordinate is
    outside (0.01, 0.99), and usable (B, S, 1), True if it is neither.
    """
    centre = tokens.locations()
    level = torch.arange(len(tokens.spatial_shapes), device=centre.device)
    side = tokens.per_token(0.05 * 2.0 ** level[:, None])  # (S, 1)
    boxes = torch.cat([centre, side.expand(*centre.shape)], dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~tokens.mask[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable, torch.inf), usable


def select_queries(
    memory: Tensor,
    tokens: LevelTokens,
    project: Callable[[Tensor], Tensor],
    class_head: Callable[[Tensor], Tensor],
    box_head: Callable[[Tensor], Tensor],
    num_queries: int,
    score: Callable[[Tensor], Tensor],
    train_all: bool,
) -> Selection:
    """The `num_queries` tokens of memory (B, S, D) with the highest `score(logits)`. UserError if
    an image has fewer tokens.

    Without `train_all` only the selected tokens' predictions are trained: those are made again
    after the selection, so that nothing is kept of the others for the backward pass.
    """
    if memory.shape[1] < num_queries:
        raise UserError(
            f"num_queries: {num_queries} queries cannot be selected from the {memory.shape[1]} "
            "tokens of the images; use fewer queries or larger images"
        )
    anchors, usable = proposals(tokens)
    with torch.set_grad_enabled(train_all and torch.is_grad_enabled()):
        features = project(memory.masked_fill(~usable, 0))
        logits = class_head(features)
    index = score(logits).topk(num_queries, dim=1).indices
    if train_all:
        boxes = box_head(features) + anchors
        return Selection(index, take(features, index), take(boxes, index), logits, boxes)
    features = project(take(memory, index).masked_fill(~take(usable, index), 0))
    boxes = box_head(features) + take(anchors, index)
    return Selection(index, features, boxes, class_head(features), boxes)
