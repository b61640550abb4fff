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
    """K selected tokens per image: features (B, K, D), anchors (B, K, 4) before the sigmoid, index
    (B, K) among all S tokens; and the encoder heads' predictions for all tokens: logits (B, S, C)
    and boxes (B, S, 4) before the sigmoid."""

    features: Tensor
    anchors: Tensor
    logits: Tensor
    boxes: Tensor
    index: Tensor

    def of_selected(self, tensor: Tensor) -> Tensor:
        """(B, S, n) -> (B, K, n)."""
        return take(tensor, self.index)


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
) -> Selection:
    """The `num_queries` tokens of memory (B, S, D) with the highest `score(logits)`. UserError if
    an image has fewer tokens.
    """
    if memory.shape[1] < num_queries:
        raise UserError(
            f"num_queries: {num_queries} queries cannot be selected from the {memory.shape[1]} "
            "tokens of the images; use fewer queries or larger images"
        )
    anchors, usable = proposals(tokens)
    features = project(memory.masked_fill(~usable, 0))
    logits = class_head(features)
    boxes = box_head(features) + anchors
    index = score(logits).topk(num_queries, dim=1).indices
    return Selection(take(features, index), take(boxes, index), logits, boxes, index)
