"""The deformable encoder and decoder (Deformable DETR, Zhu et al. 2020), for every model of several
feature levels: DAB-Deformable-DETR, DN-Deformable-DETR and DINO. Layers are post-norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ops import MSDeformAttn
from util.config import Config

from .attention import MLP, FeedForward, MultiheadAttention, init_transformer
from .dn_components import inverse_sigmoid
from .position_encoding import anchor_embedding


@dataclass
class Tokens:
    """The pixels of all feature levels, one level after another: S in all.

    content, pos: (B, S, D); mask: (B, S), True on padding; sizes: (height, width) of each of L
    levels, spatial_shapes: (L, 2) the same as a tensor; level_start_index: (L,); valid_ratios:
    (B, L, 2), the part of a level's width and height that is not padding.
    """

    content: Tensor
    pos: Tensor
    mask: Tensor
    sizes: list[tuple[int, int]]
    spatial_shapes: Tensor
    level_start_index: Tensor
    valid_ratios: Tensor

    @classmethod
    def of_levels(
        cls,
        features: Sequence[Tensor],
        masks: Sequence[Tensor],
        positions: Sequence[Tensor],
        level_embed: Tensor,
    ) -> Tokens:
        """features (B, D, H, W), masks (B, H, W), positions (B, H, W, D), level_embed (L, D)."""
        sizes = [tuple(mask.shape[1:]) for mask in masks]
        shapes = torch.tensor(sizes)
        areas = shapes.prod(1)
        starts = areas.cumsum(0) - areas
        shapes, starts = shapes.to(level_embed.device), starts.to(level_embed.device)
        content = torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1)
        pos = [p.flatten(1, 2) + e for p, e in zip(positions, level_embed, strict=True)]
        pos = torch.cat(pos, dim=1).to(content.dtype)
        mask = torch.cat([m.flatten(1) for m in masks], dim=1)
        valid = [torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], dim=-1) for m in masks]
        valid_ratios = torch.stack(valid, dim=1) / shapes.flip(-1)
        return cls(content, pos, mask, sizes, shapes, starts, valid_ratios)

    @property
    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last arguments of MSDeformAttn."""
        return self.spatial_shapes, self.level_start_index, self.mask

    def places(self) -> Tensor:
        """(B, S, 2): where each token is, (x, y) in fractions of its image without padding."""
        centres = []  # in pixels of the token's own level
        for height, width in self.sizes:
            y, x = torch.meshgrid(
                *(torch.arange(n, device=self.mask.device) + 0.5 for n in (height, width)),
                indexing="ij",
            )
            centres.append(torch.stack([x, y], dim=-1).flatten(0, 1))
        return torch.cat(centres) / self.per_token(self.spatial_shapes.flip(-1) * self.valid_ratios)

    def per_token(self, of_levels: Tensor) -> Tensor:
        """(..., L, n) -> (..., S, n): what belongs to each level, for each of its tokens."""
        sizes = self.spatial_shapes.prod(1)
        return of_levels.repeat_interleave(sizes, dim=-2, output_size=self.mask.shape[1])


def deformable_attention(cfg: Config, num_points: int) -> MSDeformAttn:
    return MSDeformAttn(cfg.hidden_dim, cfg.num_feature_levels, cfg.nheads, num_points)


class DeformableEncoderLayer(FeedForward):
    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.self_attn = deformable_attention(cfg, cfg.enc_n_points)
        self.norm1 = nn.LayerNorm(cfg.hidden_dim)
        self.norm2 = nn.LayerNorm(cfg.hidden_dim)

    def forward(self, x: Tensor, reference_points: Tensor, tokens: Tokens) -> Tensor:
        attended = self.self_attn(x + tokens.pos, reference_points, x, *tokens.levels)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feed_forward(x))


class DeformableEncoder(nn.Module):
    """Every pixel looks around its own place on all levels."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(cfg) for _ in range(cfg.enc_layers))

    def forward(self, tokens: Tokens) -> Tensor:
        """-> memory (B, S, D)."""
        reference_points = tokens.places()[:, :, None] * tokens.valid_ratios[:, None]
        x = tokens.content
        for layer in self.layers:
            x = layer(x, reference_points, tokens)
        return x


class DeformableDecoderLayer(FeedForward):
    """Self-attention among queries, deformable attention to the memory, feed-forward.

    The norms bear the released numbers, not those of their order: 2, 1, 3.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.self_attn = MultiheadAttention(cfg)
        self.cross_attn = deformable_attention(cfg, cfg.dec_n_points)
        self.norm1 = nn.LayerNorm(cfg.hidden_dim)
        self.norm2 = nn.LayerNorm(cfg.hidden_dim)
        self.norm3 = nn.LayerNorm(cfg.hidden_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        boxes: Tensor,
        attn_allowed: Tensor | None,
        memory: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        located = x + query_pos
        attended = self.self_attn(located, located, x, attn_allowed)
        x = self.norm2(x + self.dropout(attended))
        attended = self.cross_attn(x + query_pos, boxes, memory, *tokens.levels)
        x = self.norm1(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class DeformableDecoder(nn.Module):
    """Refines anchors layer by layer; `bbox_embed`, set by the detector, has a head for each layer.

    In DINO layer outputs are normalised once more before the heads; in the others the content
    scales the positional query from the second layer on. With `look_forward_twice` a layer's box
    also trains the layer before, whose anchor it refines (DINO, section 3.5).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        dim, is_dino = cfg.hidden_dim, cfg.modelname == "dino"
        self.layers = nn.ModuleList(DeformableDecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.norm = nn.LayerNorm(dim) if is_dino else None
        self.query_scale = None
        if not is_dino:
            self.query_scale = MLP(dim, dim, dim, 2).requires_grad_(cfg.dec_layers > 1)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.look_forward_twice = cfg.look_forward_twice

    def forward(
        self,
        content: Tensor,
        anchors: Tensor,
        attn_allowed: Tensor | None,
        memory: Tensor,
        tokens: Tokens,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """content (B, Q, D) and anchors (B, Q, 4) before the sigmoid -> states (N, B, Q, D) of the
        N layers, the boxes (N, B, Q, 4) that they predict and the anchors (N, B, Q, 4) that they
        refine, detached, both cxcywh in [0, 1]."""
        ratios = tokens.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        x = content
        anchors = previous = anchors.sigmoid()
        states, boxes, refined = [], [], []
        for i, (layer, head) in enumerate(zip(self.layers, self.bbox_embed, strict=False)):
            scaled = anchors[:, :, None] * ratios
            query_pos = self.ref_point_head(anchor_embedding(scaled[:, :, 0], x.shape[-1] // 2))
            if self.query_scale is not None and i > 0:
                query_pos = query_pos * self.query_scale(x)
            x = layer(x, query_pos, scaled, attn_allowed, memory, tokens)
            refinement = head(x)
            states.append(x)
            if self.norm is not None:
                states[-1] = self.norm(x)
            seen = refinement if self.norm is None else head(states[-1])
            boxes.append((seen + inverse_sigmoid(previous)).sigmoid())
            refined.append(anchors.detach())
            following = (refinement + inverse_sigmoid(anchors)).sigmoid()
            anchors = following.detach()
            previous = following if self.look_forward_twice else anchors
        return torch.stack(states), torch.stack(boxes), torch.stack(refined)


class DeformableTransformer(nn.Module):
    """Deformable encoder and any decoder; where queries are selected among the encoder's tokens,
    what projects these, and in mixed selection the content that queries learn."""

    def __init__(self, cfg: Config, encoder: DeformableEncoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if cfg.query_selection != "static":
            self.enc_output = nn.Linear(cfg.hidden_dim, cfg.hidden_dim)
            self.enc_output_norm = nn.LayerNorm(cfg.hidden_dim)
        if cfg.query_selection == "mixed":
            self.tgt_embed = nn.Embedding(cfg.num_queries, cfg.hidden_dim)
        init_transformer(self)
        self.level_embed = nn.Parameter(torch.randn(cfg.num_feature_levels, cfg.hidden_dim))
