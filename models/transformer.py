"""DAB-DETR's dense encoder and decoder (Liu et al. 2022, sections 3 and 4), shared with DN-DETR.

Every query is an anchor box and a content vector. The anchor's sine embedding is what
cross-attention compares with the pixels, modulated by the anchor's width and height, and every
decoder layer refines the anchor. Layers are post-norm.
"""

import torch
from torch import Tensor, nn

from util.box_ops import inverse_sigmoid

from .attention import MLP, Attention, MultiheadAttention, activation
from .position_encoding import anchor_embedding


class FeedForward(nn.Module):
    """Mix-in of the residual feed-forward block; subclasses own the final norm, as released."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, act: str):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.activation = activation(act)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(FeedForward):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, act: str):
        super().__init__(dim, dim_feedforward, dropout, act)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, allowed: Tensor) -> Tensor:
        located = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x, allowed)))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Self-attention over pixels; the position encoding is scaled by the content at every layer."""

    def __init__(self, num_layers: int, dim: int, *layer_args):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, *layer_args) for _ in range(num_layers))
        self.query_scale = MLP(dim, dim, dim, 2)

    def forward(self, x: Tensor, pos: Tensor, allowed: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, pos * self.query_scale(x), allowed)
        return x


class DecoderLayer(FeedForward):
    """Self-attention among queries, cross-attention to pixels, feed-forward.

    In cross-attention, content and sine position are concatenated in each head, so that their
    similarities add up (Conditional DETR). Only the first layer adds the positional query to the
    content as well.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        act: str,
        is_first: bool,
    ):
        super().__init__(dim, dim_feedforward, dropout, act)
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = Attention(dim, num_heads, dropout)

        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if is_first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = Attention(dim, num_heads, dropout)

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
        memory: Tensor,
        pos: Tensor,
        attn_allowed: Tensor | None,
        memory_allowed: Tensor,
    ) -> Tensor:
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        attended = self.self_attn(query, key, self.sa_v_proj(x), attn_allowed)
        x = self.norm1(x + self.dropout(attended))

        query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
        key_pos = self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            query, key = query + self.ca_qpos_proj(query_pos), key + key_pos
        attended = self.cross_attn(
            self.concat_heads(query, self.ca_qpos_sine_proj(query_sine)),
            self.concat_heads(key, key_pos),
            self.ca_v_proj(memory),
            memory_allowed,
        )
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class Decoder(nn.Module):
    """Refines anchors layer by layer; `bbox_embed`, set by the detector, gives the refinements."""

    def __init__(self, num_layers: int, dim: int, *layer_args):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, *layer_args, is_first=i == 0) for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_anchor_head = MLP(dim, dim, 2, 2)

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
        memory: Tensor,
        pos: Tensor,
        attn_allowed: Tensor | None,
        memory_allowed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """content (B, Q, D) and anchors (B, Q, 4) before the sigmoid -> states (L, B, Q, D) and the
        boxes (L, B, Q, 4) that the layers predict, cxcywh in [0, 1]."""
        x, anchors = content, anchors.sigmoid()
        states, boxes = [], []
        for i, layer in enumerate(self.layers):
            # Attention sees refined anchors detached; the box that the loss sees does not, so as
            # released it also reaches the previous layer's refinement.
            fixed = anchors if i == 0 else anchors.detach()
            query_pos, query_sine = self.queries(x, fixed, is_first=i == 0)
            x = layer(x, query_pos, query_sine, memory, pos, attn_allowed, memory_allowed)
            states.append(self.norm(x))
            boxes.append((self.bbox_embed(states[-1]) + inverse_sigmoid(anchors)).sigmoid())
            if i + 1 < len(self.layers):
                anchors = (self.bbox_embed(x) + inverse_sigmoid(fixed)).sigmoid()
        return torch.stack(states), torch.stack(boxes)


class Transformer(nn.Module):
    """Encoder, decoder and, for models with several patterns, their content embeddings."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        enc_layers: int,
        dec_layers: int,
        dim_feedforward: int,
        dropout: float,
        act: str,
        num_patterns: int,
    ):
        super().__init__()
        layer_args = (num_heads, dim_feedforward, dropout, act)
        self.encoder = Encoder(enc_layers, dim, *layer_args)
        self.decoder = Decoder(dec_layers, dim, *layer_args)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        if num_patterns:
            self.patterns = nn.Embedding(num_patterns, dim)
