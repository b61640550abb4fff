"""DETR (Carion et al. 2020), and with denoising (Li et al. 2022).

Queries have no anchors: a query's position is a learned embedding that all decoder layers share,
and each layer predicts boxes without regard to the layer before.
"""

import torch
from torch import Tensor, nn

from .attention import MLP, FeedForward, MultiheadAttention, additive_mask
from .backbones import Backbone
from .detector import Detector, Encoded, Queries
from .dn_components import with_indicator
from .errors import UserError
from .heads import class_head
from .nested_tensor import NestedTensor
from .options import DetectorOptions, ModelOptions
from .position_encoding import SinePositionEncoding, anchor_embedding
from .recompute import run
from .transformer import Decoded, Encoder, Tokens, Transformer


class DecoderLayer(FeedForward):
    """Self-attention among queries, cross-attention to pixels, feed-forward, each with a norm after
    it. Positions are added to queries and keys, not to values."""

    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.self_attn = MultiheadAttention(options)
        self.multihead_attn = MultiheadAttention(options)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.norm2 = nn.LayerNorm(options.hidden_dim)
        self.norm3 = nn.LayerNorm(options.hidden_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        self_mask: Tensor | None,
        located_memory: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
    ) -> Tensor:
        located = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(located, located, x, self_mask)))
        attended = self.multihead_attn(x + query_pos, located_memory, memory, memory_mask)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class Decoder(nn.Module):
    """One norm for the outputs of all layers."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(options.dec_layers))
        self.norm = nn.LayerNorm(options.hidden_dim)
        self.recompute = options.use_checkpoint

    def forward(
        self, x: Tensor, query_pos: Tensor, blocked: Tensor | None, memory: Tensor, tokens: Tokens
    ) -> Tensor:
        """Content and positions of queries (B, N, D), the mask of their self-attention (N, N), True
        = blocked, memory (B, S, D), the encoder's input -> states (L, B, N, D)."""
        self_mask = additive_mask(blocked, x)
        located = memory + tokens.pos
        to_memory = located, memory, additive_mask(tokens.mask[:, None, None], x)
        states = []
        for layer in self.layers:
            x = run(layer, self.recompute, x, query_pos, self_mask, *to_memory)
            states.append(self.norm(x))
        return torch.stack(states)


class DenseDetector(Detector):
    """One feature level, dense attention, one class head."""

    has_masks = True

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        if options.query_selection != "static" or options.look_forward_twice:
            name = options.modelname
            raise UserError(f"query_selection, look_forward_twice: {name} has neither; use dino")
        super().check(options)

    def encode(self, images: NestedTensor) -> Encoded:
        features = self.backbone[0](images)
        last = features[-1]
        pos = self.backbone[1](last.mask).flatten(1, 2)
        content = self.input_proj(last.tensors).flatten(2).transpose(1, 2)
        tokens = Tokens(content, pos.to(content.dtype), last.mask.flatten(1))
        return Encoded(features, self.transformer.encoder(tokens), tokens)

    def classify(self, states: Tensor) -> Tensor:
        return self.class_embed(states)


class DETR(DenseDetector):
    """The content of all queries starts at zero."""

    implied = {"class_loss": "softmax", "transformer_activation": "relu"}

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        super().check(options)
        for name in ("num_patterns", "random_refpoints_xy"):
            if getattr(options, name):
                raise UserError(f"{name}: {options.modelname} has no anchors; use dab_detr")

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.hidden_dim = dim = options.hidden_dim
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(options)])
        self.input_proj = nn.Conv2d(self.num_channels[-1], dim, kernel_size=1)
        encoder = Encoder(options, scale_positions=False)
        self.transformer = Transformer(encoder, Decoder(options))
        self.class_embed = class_head(options)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(options.num_queries, dim)

    def initial_content(self) -> Tensor:
        """(1, D)."""
        return self.query_embed.weight.new_zeros(1, self.hidden_dim)

    def queries(self, encoded: Encoded) -> Queries:
        positions = self.query_embed.weight.expand(len(encoded.memory), -1, -1)
        return Queries(self.initial_content().expand_as(positions), positions, outputs={})

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        """`anchors` (B, N, D) are the queries' positions."""
        memory = encoded.memory, encoded.tokens
        states = self.transformer.decoder(content, anchors, blocked, *memory)
        return Decoded(states, self.bbox_embed(states).sigmoid(), anchors=None)


class DenoisingDETR(DETR):
    """DETR with denoising. The position of a denoising query is computed from its noised box; the
    content of all queries is a label embedding and the indicator that tells denoising queries, as
    in DN-DETR on anchors; `label_enc`'s last row is that of matching queries."""

    has_denoising = True
    label_enc: nn.Embedding

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        dim = options.hidden_dim
        self.label_enc = nn.Embedding(options.num_labels + 1, dim - 1)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2).requires_grad_(options.use_dn)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """(N, 4) -> positions (N, D)."""
        return self.ref_point_head(anchor_embedding(boxes, self.hidden_dim // 2))

    def initial_content(self) -> Tensor:
        return with_indicator(self.label_enc.weight[-1:], self.hidden_dim, 0.0)
