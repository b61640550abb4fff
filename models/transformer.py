"""DAB-DETR's dense encoder and decoder (Liu et al. 2022, sections 3 and 4), shared with DN-DETR.

Every query is an anchor box and a content vector. The anchor's sine embedding is what
cross-attention compares with the pixels, modulated by the anchor's width and height, and every
decoder layer refines the anchor. Layers are post-norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.config import Config

from .attention import MLP, Attention, FeedForward, MultiheadAttention, init_transformer
from .dn_components import inverse_sigmoid
from .position_encoding import anchor_embedding


class EncoderLayer(FeedForward):
    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.self_attn = MultiheadAttention(cfg)
        self.norm1 = nn.LayerNorm(cfg.hidden_dim)
        self.norm2 = nn.LayerNorm(cfg.hidden_dim)

    def forward(self, x: Tensor, pos: Tensor, allowed: Tensor) -> Tensor:
        located = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x, allowed)))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Self-attention over pixels; the position encoding is scaled by the content at every layer."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.enc_layers))
        self.query_scale = MLP(cfg.hidden_dim, cfg.hidden_dim, cfg.hidden_dim, 2)

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

    def __init__(self, cfg: Config, is_first: bool):
        super().__init__(cfg)
        dim = cfg.hidden_dim
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = Attention(cfg)

        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if is_first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = Attention(cfg)

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
        attn_allowed: Tensor | None,
        memory: Tensor,
        pos: Tensor,
        memory_allowed: Tensor,
    ) -> Tensor:
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        attended = self.self_attn(query, key, self.sa_v_proj(x), attn_allowed)
        x = self.norm1(x + self.dropout(attended))

        sine = self.ca_qpos_sine_proj(query_sine)
        located = self.ca_qcontent_proj(x)
        if self.ca_qpos_proj is not None:
            located = located + self.ca_qpos_proj(query_pos)
        located = self.concat_heads(located, sine)
        attended = self.attend_to_memory(located, memory, pos, memory_allowed, query)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))

    def attend_to_memory(
        self, located: Tensor, memory: Tensor, pos: Tensor, allowed: Tensor, query: Tensor
    ) -> Tensor:
        """located (B, Q, 2 * D), memory and pos (B, S, D), query of the self-attention (B, Q, D)
        -> (B, Q, D)."""
        key, key_pos = self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            key = key + key_pos
        key = self.concat_heads(key, key_pos)
        return self.cross_attn(located, key, self.ca_v_proj(memory), allowed)


class MultiLevelDecoderLayer(DecoderLayer):
    """Attends to each of several feature levels apart; the self-attention's query weighs them."""

    def __init__(self, cfg: Config, is_first: bool):
        super().__init__(cfg, is_first)
        self.cross_attn.out_proj = nn.Identity()
        self.ca_out_v_proj = nn.Linear(cfg.hidden_dim, cfg.hidden_dim)
        nn.init.zeros_(self.ca_out_v_proj.bias)
        self.lvl_attn = nn.Linear(cfg.hidden_dim, cfg.num_feature_levels)

    def attend_to_memory(
        self,
        located: Tensor,
        memory: Sequence[Tensor],
        pos: Sequence[Tensor],
        allowed: Sequence[Tensor],
        query: Tensor,
    ) -> Tensor:
        """As for one level, with a list of levels each for memory, pos and allowed."""
        attend = super().attend_to_memory
        levels = [
            attend(located, *level, query) for level in zip(memory, pos, allowed, strict=True)
        ]
        weights = self.lvl_attn(query).softmax(-1)
        return (self.ca_out_v_proj(torch.stack(levels, dim=-2)) * weights[..., None]).sum(-2)


class Decoder(nn.Module):
    """Refines anchors layer by layer; `bbox_embed`, set by the detector, gives the refinements."""

    def __init__(self, cfg: Config, layer: type[DecoderLayer] = DecoderLayer):
        super().__init__()
        dim = cfg.hidden_dim
        self.layers = nn.ModuleList(layer(cfg, is_first=i == 0) for i in range(cfg.dec_layers))
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2).requires_grad_(cfg.dec_layers > 1)
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
        attn_allowed: Tensor | None,
        memory: Tensor,
        pos: Tensor,
        memory_allowed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """content (B, Q, D) and anchors (B, Q, 4) before the sigmoid -> states (L, B, Q, D), the
        boxes (L, B, Q, 4) that the layers predict and the anchors (L, B, Q, 4) that they refine,
        detached, both cxcywh in [0, 1]."""
        x, anchors = content, anchors.sigmoid()
        states, boxes, seen = [], [], []
        for i, layer in enumerate(self.layers):
            # Attention sees refined anchors detached; the box that the loss sees does not, so as
            # released it also reaches the previous layer's refinement.
            fixed = anchors if i == 0 else anchors.detach()
            query_pos, query_sine = self.queries(x, fixed, is_first=i == 0)
            x = layer(x, query_pos, query_sine, attn_allowed, memory, pos, memory_allowed)
            states.append(self.norm(x))
            seen.append(anchors.detach())
            boxes.append((self.bbox_embed(states[-1]) + inverse_sigmoid(anchors)).sigmoid())
            if i + 1 < len(self.layers):
                anchors = (self.bbox_embed(x) + inverse_sigmoid(fixed)).sigmoid()
        return torch.stack(states), torch.stack(boxes), torch.stack(seen)


class Transformer(nn.Module):
    """Encoder and decoder, under the released names."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        init_transformer(self)
