"""The deformable encoder and decoder (Deformable DETR, Zhu et al. 2020), for every model of several
feature levels: DAB-Deformable-DETR, DN-Deformable-DETR and DINO. Layers are post-norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import MLP, FeedForward, MultiheadAttention, additive_mask, init_transformer
from .deformable_attention import MSDeformAttn
from .dn_components import inverse_sigmoid
from .options import ModelOptions
from .position_encoding import anchor_embedding
from .recompute import run
from .transformer import Decoded


@dataclass
class LevelTokens:
    """The pixels of L feature levels, one level after another: S in all.

    content, pos: (B, S, D); mask: (B, S), True on padding; sizes: (height, width) of each level,
    spatial_shapes: (L, 2) the same as a tensor; level_start_index: (L,); valid_ratios: (B, L, 2),
    the part of a level's width and height that is not padding.
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
    ) -> LevelTokens:
        """features (B, D, H, W), masks (B, H, W), positions (B, H, W, D), level_embed (L, D)."""
        sizes = [(mask.shape[1], mask.shape[2]) for mask in masks]
        shapes = torch.tensor(sizes)
        areas = shapes.prod(1)
        starts = areas.cumsum(0) - areas
        device = level_embed.device
        shapes, starts = (x.to(device, non_blocking=True) for x in (shapes, starts))
        content = torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1)
        located = [p.flatten(1, 2) + e for p, e in zip(positions, level_embed, strict=True)]
        pos = torch.cat(located, dim=1).to(content.dtype)
        mask = torch.cat([m.flatten(1) for m in masks], dim=1)
        valid = [torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], dim=-1) for m in masks]
        valid_ratios = torch.stack(valid, dim=1) / shapes.flip(-1)
        return cls(content, pos, mask, sizes, shapes, starts, valid_ratios)

    @property
    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last arguments of MSDeformAttn."""
        return self.spatial_shapes, self.level_start_index, self.mask

    def locations(self) -> Tensor:
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
        """(..., L, n) -> (..., S, n): every level's values, repeated for its tokens."""
        levels = zip(of_levels.split(1, dim=-2), self.sizes, strict=True)
        repeated = [x.expand(*x.shape[:-2], h * w, -1) for x, (h, w) in levels]
        return torch.cat(repeated, dim=-2)


def deformable_attention(options: ModelOptions, num_points: int) -> MSDeformAttn:
    return MSDeformAttn(options.hidden_dim, options.num_feature_levels, options.nheads, num_points)


class DeformableEncoderLayer(FeedForward):
    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.self_attn = deformable_attention(options, options.enc_n_points)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.norm2 = nn.LayerNorm(options.hidden_dim)

    def forward(self, x: Tensor, reference_points: Tensor, tokens: LevelTokens) -> Tensor:
        attended = self.self_attn(x + tokens.pos, reference_points, x, *tokens.levels)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feed_forward(x))


class DeformableEncoder(nn.Module):
    """Every pixel samples around its own location on all levels."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(options) for _ in range(options.enc_layers)
        )
        self.recompute = options.use_checkpoint

    def forward(self, tokens: LevelTokens) -> Tensor:
        """-> memory (B, S, D)."""
        reference_points = tokens.locations()[:, :, None] * tokens.valid_ratios[:, None]
        x = tokens.content
        for layer in self.layers:
            x = run(layer, self.recompute, x, reference_points, tokens)
        return x


class DeformableDecoderLayer(FeedForward):
    """Self-attention among queries, deformable attention to the memory, feed-forward.

    The norms have their released numbers, which are not those of their order: 2, 1, 3.
    """

    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.self_attn = MultiheadAttention(options)
        self.cross_attn = deformable_attention(options, options.dec_n_points)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.norm2 = nn.LayerNorm(options.hidden_dim)
        self.norm3 = nn.LayerNorm(options.hidden_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        boxes: Tensor,
        self_mask: Tensor | None,
        memory: Tensor,
        tokens: LevelTokens,
    ) -> Tensor:
        located = x + query_pos
        attended = self.self_attn(located, located, x, self_mask)
        x = self.norm2(x + self.dropout(attended))
        attended = self.cross_attn(x + query_pos, boxes, memory, *tokens.levels)
        x = self.norm1(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class DeformableDecoder(nn.Module):
    """Refines anchors layer by layer; `bbox_embed`, set by the detector, has a head for each layer.

    With `final_norm` the heads see normalised states; with `scale_queries` the content scales the
    positional query from the second layer on. DINO has the former, the others the latter. With
    `look_forward_twice` the loss of a layer's box also trains the layer before, whose output it
    refines (DINO, section 3.5).
    """

    bbox_embed: nn.ModuleList

    def __init__(self, options: ModelOptions, final_norm: bool, scale_queries: bool):
        super().__init__()
        dim = options.hidden_dim
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(options) for _ in range(options.dec_layers)
        )
        self.norm = nn.LayerNorm(dim) if final_norm else None
        self.query_scale = None
        if scale_queries:
            self.query_scale = MLP(dim, dim, dim, 2).requires_grad_(options.dec_layers > 1)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.look_forward_twice = options.look_forward_twice
        self.recompute = options.use_checkpoint

    def forward(
        self,
        content: Tensor,
        anchors: Tensor,
        self_blocked: Tensor | None,
        memory: Tensor,
        tokens: LevelTokens,
    ) -> Decoded:
        """content (B, Q, D), anchors (B, Q, 4) before the sigmoid, self_blocked (N, N), True where
        self-attention is blocked, memory (B, S, D) -> the layers' outputs."""
        self_mask = additive_mask(self_blocked, content)
        ratios = tokens.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        x = content
        anchors = previous = anchors.sigmoid()
        states, boxes, refined = [], [], []
        for i, (layer, head) in enumerate(zip(self.layers, self.bbox_embed, strict=False)):
            scaled = anchors[:, :, None] * ratios
            query_pos = self.ref_point_head(anchor_embedding(scaled[:, :, 0], x.shape[-1] // 2))
            if self.query_scale is not None and i > 0:
                query_pos = query_pos * self.query_scale(x)
            x = run(layer, self.recompute, x, query_pos, scaled, self_mask, memory, tokens)
            offset = predicted_offset = head(x)
            state = x
            if self.norm is not None:  # the next anchors come from x, the prediction from the norm
                state = self.norm(x)
                predicted_offset = head(state)
            states.append(state)
            boxes.append((predicted_offset + inverse_sigmoid(previous)).sigmoid())
            refined.append(anchors.detach())
            following = (offset + inverse_sigmoid(anchors)).sigmoid()
            anchors = following.detach()
            # Look forward twice: the next prediction starts from anchors that are not detached.
            previous = following if self.look_forward_twice else anchors
        return Decoded(torch.stack(states), torch.stack(boxes), torch.stack(refined))


class DeformableTransformer(nn.Module):
    """Deformable encoder and any decoder. If queries are selected among the encoder's tokens, also
    the projection of the tokens, and for mixed selection the learned content of the queries."""

    def __init__(self, options: ModelOptions, encoder: DeformableEncoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if options.query_selection != "static":
            self.enc_output = nn.Linear(options.hidden_dim, options.hidden_dim)
            self.enc_output_norm = nn.LayerNorm(options.hidden_dim)
        if options.query_selection == "mixed":
            self.tgt_embed = nn.Embedding(options.num_queries, options.hidden_dim)
        init_transformer(self)
        self.level_embed = nn.Parameter(torch.randn(options.num_feature_levels, options.hidden_dim))
