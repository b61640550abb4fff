"""DAB-DETR's dense encoder and decoder (Liu et al. 2022, sections 3 and 4), shared with DN-DETR.

Every query is an anchor box and a content vector. The anchor's sine embedding is what
cross-attention compares with the pixels, modulated by the anchor's width and height, and every
decoder layer refines the anchor. Layers are post-norm.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import (
    MLP,
    Attention,
    FeedForward,
    MultiheadAttention,
    additive_mask,
    init_transformer,
)
from .dn_components import inverse_sigmoid
from .options import ModelOptions
from .position_encoding import anchor_embedding
from .recompute import run


class Tokens(NamedTuple):
    """The S pixels of a feature map: content and pos (B, S, D), mask (B, S), True on padding."""

    content: Tensor
    pos: Tensor
    mask: Tensor


class Decoded(NamedTuple):
    """Outputs of the L layers of a decoder: states (L, B, Q, D), predicted boxes (L, B, Q, 4), and
    the anchors (L, B, Q, 4) or points (L, B, Q, 2) that they refine, if any, detached; cxcywh in
    [0, 1]."""

    states: Tensor
    boxes: Tensor
    anchors: Tensor | None


class EncoderLayer(FeedForward):
    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.self_attn = MultiheadAttention(options)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.norm2 = nn.LayerNorm(options.hidden_dim)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        located = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x, mask)))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Self-attention over pixels; with `scale_positions`, every layer scales the position encoding
    by the content."""

    def __init__(self, options: ModelOptions, scale_positions: bool = True):
        super().__init__()
        dim = options.hidden_dim
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(options.enc_layers))
        self.query_scale = MLP(dim, dim, dim, 2) if scale_positions else None
        self.recompute = options.use_checkpoint

    def forward(self, tokens: Tokens) -> Tensor:
        """-> memory (B, S, D)."""
        x = tokens.content
        mask = additive_mask(tokens.mask[:, None, None], x)
        for layer in self.layers:
            pos = tokens.pos if self.query_scale is None else tokens.pos * self.query_scale(x)
            x = run(layer, self.recompute, x, pos, mask)
        return x


class DecoderLayer(FeedForward):
    """Self-attention among queries, cross-attention to pixels, feed-forward.

    In cross-attention, content and sine position are concatenated in each head, so that their
    similarities add up (Conditional DETR). Only the first layer adds the positional query to the
    content as well.
    """

    def __init__(self, options: ModelOptions, is_first: bool):
        super().__init__(options)
        dim = options.hidden_dim
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = Attention(options)

        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if is_first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = Attention(options)

        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def concat_heads(self, content: Tensor, position: Tensor) -> Tensor:
        """Two (B, N, D) -> (B, N, 2 * D), content and position side by side within each head."""
        heads = (self.cross_attn.num_heads, -1)
        both = [content.unflatten(-1, heads), position.unflatten(-1, heads)]
        return torch.cat(both, dim=-1).flatten(2)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        query_sine: Tensor,
        self_mask: Tensor | None,
        memory: Tensor,
        pos: Tensor,
        memory_mask: Tensor | None,
        areas: Sequence[int],
    ) -> Tensor:
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        attended = self.self_attn(query, key, self.sa_v_proj(x), self_mask)
        x = self.norm1(x + self.dropout(attended))

        sine = self.ca_qpos_sine_proj(query_sine)
        located = self.ca_qcontent_proj(x)
        if self.ca_qpos_proj is not None:
            located = located + self.ca_qpos_proj(query_pos)
        key, key_pos = self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            key = key + key_pos
        pairs = self.concat_heads(located, sine), self.concat_heads(key, key_pos)
        value = self.ca_v_proj(memory)
        attended = self.attend_to_memory(*pairs, value, memory_mask, query, areas)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))

    def attend_to_memory(
        self,
        located: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query: Tensor,
        areas: Sequence[int],
    ) -> Tensor:
        """located (B, Q, 2 * D), key (B, S, 2 * D), value (B, S, D), query of the self-attention
        (B, Q, D) -> (B, Q, D). `areas`: the number of pixels of each feature level, S in all."""
        return self.cross_attn(located, key, value, mask)


class MultiLevelDecoderLayer(DecoderLayer):
    """Attends to each feature level separately; the self-attention's query weights the results."""

    def __init__(self, options: ModelOptions, is_first: bool):
        super().__init__(options, is_first)
        self.cross_attn.out_proj = nn.Identity()
        self.ca_out_v_proj = nn.Linear(options.hidden_dim, options.hidden_dim)
        nn.init.zeros_(self.ca_out_v_proj.bias)
        self.lvl_attn = nn.Linear(options.hidden_dim, options.num_feature_levels)

    def attend_to_memory(
        self,
        located: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query: Tensor,
        areas: Sequence[int],
    ) -> Tensor:
        masks = [None] * len(areas) if mask is None else mask.split(areas, -1)
        of_levels = zip(key.split(areas, 1), value.split(areas, 1), masks, strict=True)
        attended = torch.stack([self.cross_attn(located, *level) for level in of_levels], dim=-2)
        weights = self.lvl_attn(query).softmax(-1)
        return (self.ca_out_v_proj(attended) * weights[..., None]).sum(-2)


class Decoder(nn.Module):
    """Refines anchors layer by layer. The detector sets `bbox_embed`, the head that predicts the
    refinements."""

    bbox_embed: nn.Module

    def __init__(self, options: ModelOptions, layer: type[DecoderLayer] = DecoderLayer):
        super().__init__()
        dim = options.hidden_dim
        self.layers = nn.ModuleList(
            layer(options, is_first=i == 0) for i in range(options.dec_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2).requires_grad_(options.dec_layers > 1)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_anchor_head = MLP(dim, dim, 2, 2)
        self.recompute = options.use_checkpoint

    def queries(self, x: Tensor, anchors: Tensor, is_first: bool) -> tuple[Tensor, Tensor]:
        """Positional query and sine query, both (B, Q, D), of content x and anchors (B, Q, 4)."""
        dim = x.shape[-1]
        embedding = anchor_embedding(anchors, dim // 2)
        query_sine = embedding[..., :dim]
        if not is_first:
            query_sine = query_sine * self.query_scale(x)
        # Width- and height-modulated attention, DAB-DETR equation 6; the sine query is y, then x.
        reference_wh = self.ref_anchor_head(x).sigmoid()
        ratio_hw = (reference_wh / anchors[..., 2:]).flip(-1)
        query_sine = query_sine * ratio_hw.repeat_interleave(dim // 2, dim=-1)
        return self.ref_point_head(embedding), query_sine

    def forward(
        self,
        content: Tensor,
        anchors: Tensor,
        self_blocked: Tensor | None,
        memory: Tensor,
        pos: Tensor,
        memory_blocked: Tensor,
        areas: Sequence[int] = (),
    ) -> Decoded:
        """content (B, Q, D), anchors (B, Q, 4) before the sigmoid, memory and pos (B, S, D),
        self_blocked (N, N) and memory_blocked (B, S), True where attention is blocked, the number
        of pixels of each feature level -> the layers' outputs."""
        self_mask = additive_mask(self_blocked, content)
        to_memory = memory, pos, additive_mask(memory_blocked[:, None, None], content), areas
        x, anchors = content, anchors.sigmoid()
        states, boxes, refined = [], [], []
        for i, layer in enumerate(self.layers):
            # Attention uses the refined anchors detached, the predicted box does not: as in the
            # released code, its loss also trains the previous layer's refinement.
            fixed = anchors if i == 0 else anchors.detach()
            query_pos, query_sine = self.queries(x, fixed, is_first=i == 0)
            queries = x, query_pos, query_sine, self_mask
            x = run(layer, self.recompute, *queries, *to_memory)
            states.append(self.norm(x))
            refined.append(anchors.detach())
            boxes.append((self.bbox_embed(states[-1]) + inverse_sigmoid(anchors)).sigmoid())
            if i + 1 < len(self.layers):
                anchors = (self.bbox_embed(x) + inverse_sigmoid(fixed)).sigmoid()
        return Decoded(torch.stack(states), torch.stack(boxes), torch.stack(refined))


class Transformer(nn.Module):
    """Encoder and decoder, under the released names."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        init_transformer(self)
