"""Anchor DETR (Wang et al. 2022), and with denoising.

A query is a point of the image, which stays where it is in all layers, and one of a few learned
patterns, its content. Every point has every pattern, so that it can find several objects.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FeedForward, MultiheadAttention, additive_mask
from .backbones import Backbone
from .deformable_detr import InputProjection
from .detector import Detector, Encoded, Queries
from .dn_components import inverse_sigmoid
from .errors import UserError
from .heads import box_head, class_head
from .nested_tensor import NestedTensor
from .options import DetectorOptions, ModelOptions
from .position_encoding import anchor_embedding, sine_embedding
from .recompute import run
from .transformer import Decoded


class Pixels(NamedTuple):
    """A feature map's axes, x and y: positions (B, 1, W, D) and (B, H, 1, D), additive masks of
    the padding (B, 1, 1, W) and (B, 1, 1, H)."""

    positions: tuple[Tensor, ...]
    masks: tuple[Any, ...]


class RowColumnAttention(MultiheadAttention):
    """Row-column decoupled attention (section 3.4): a pixel's weight is the product of a weight for
    its x, among the means of the columns, and one for its y, among the means of the rows. As
    released, padding counts in the means."""

    def __init__(self, options: ModelOptions):
        super().__init__(options, num_inputs=5)

    def forward(  # type: ignore[override]
        self, content: Tensor, positions: tuple[Tensor, ...], memory: Tensor, pixels: Pixels
    ) -> Tensor:
        """content (B, N, D) at positions x and y, each (B, N, D), memory (B, H, W, D) ->
        (B, N, D)."""
        inputs = [content + position for position in positions]
        for axis, position in zip((1, 2), pixels.positions, strict=True):
            inputs.append((memory.mean(axis, keepdim=True) + position).flatten(1, 2))
        parts = self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5)
        projected = map(F.linear, [*inputs, memory], *parts)
        *heads, value = (self.split_heads(x.flatten(1, -2)) for x in projected)
        value = value.unflatten(2, memory.shape[1:3])  # (B, heads, H, W, d)
        last, first = (
            self.dropout((q @ k.mT / q.shape[-1] ** 0.5 + m).softmax(-1))
            for q, k, m in zip(heads[:2], heads[2:], pixels.masks, strict=True)
        )
        # The longer side first, which needs less memory; an exported graph is for both cases.
        if not torch.compiler.is_exporting() and memory.shape[1] < memory.shape[2]:
            first, last, value = last, first, value.transpose(2, 3)
        summed = (first @ value.flatten(3)).unflatten(-1, value.shape[3:])
        out = (last[..., None, :] @ summed).squeeze(-2)  # (B, heads, N, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class NormedFeedForward(FeedForward):
    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.norm2 = nn.LayerNorm(options.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.feed_forward(x))


class EncoderLayer(nn.Module):
    def __init__(self, options: ModelOptions):
        super().__init__()
        self.self_attn = RowColumnAttention(options)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.ffn = NormedFeedForward(options)

    def forward(self, x: Tensor, pixels: Pixels) -> Tensor:
        """x (B, H, W, D) -> the same."""
        positions = tuple(position.expand_as(x).flatten(1, 2) for position in pixels.positions)
        attended = self.self_attn(x.flatten(1, 2), positions, x, pixels)
        return self.ffn(self.norm1(x + self.ffn.dropout(attended.view_as(x))))


class DecoderLayer(nn.Module):
    def __init__(self, options: ModelOptions):
        super().__init__()
        self.cross_attn = RowColumnAttention(options)
        self.norm1 = nn.LayerNorm(options.hidden_dim)
        self.self_attn = MultiheadAttention(options)
        self.norm2 = nn.LayerNorm(options.hidden_dim)
        self.ffn = NormedFeedForward(options)

    def forward(
        self, x: Tensor, pos: Tensor, mask: Tensor | None, positions: tuple, *pixels: Any
    ) -> Tensor:
        """x (B, N, D), its position (B, N, D) for self-attention, the mask of that, and what
        cross-attention takes."""
        located = x + pos
        x = self.norm2(x + self.ffn.dropout(self.self_attn(located, located, x, mask)))
        x = self.norm1(x + self.ffn.dropout(self.cross_attn(x, positions, *pixels)))
        return self.ffn(x)


class AnchorTransformer(nn.Module):
    """Encoder, decoder, queries and heads, under the released names and with the released initial
    weights: the layers start as copies of one."""

    def __init__(self, options: DetectorOptions):
        super().__init__()
        dim, layers, self.recompute = options.hidden_dim, options.dec_layers, options.use_checkpoint
        repeat = lambda layer, n: nn.ModuleList(copy.deepcopy(layer) for _ in range(n))
        self.encoder_layers = repeat(EncoderLayer(options), options.enc_layers)
        self.decoder_layers = repeat(DecoderLayer(options), layers)
        self.pattern = nn.Embedding(options.num_patterns, dim)
        if options.spatial_prior == "learned":
            self.position = nn.Embedding(options.num_queries, 2)
            nn.init.uniform_(self.position.weight)
        else:
            side = round(math.sqrt(options.num_queries))
            centres = (torch.arange(side) + 0.5) / side
            self.register_buffer("grid", torch.cartesian_prod(centres, centres), persistent=False)
        self.adapt_pos2d, self.adapt_pos1d = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(2)
        )
        self.class_embed = nn.ModuleList([class_head(options)] * layers)  # one for all layers
        self.bbox_embed = nn.ModuleList([head := box_head(options)] * layers)
        *_, bias = head.parameters()
        nn.init.constant_(bias[2:], -2)  # initially small boxes

    def embed_axes(self, *coordinates: Tensor) -> tuple[Tensor, ...]:
        """x (...) and y (...) in [0, 1] -> positions (..., D)."""
        weight = self.pattern.weight
        sines = (sine_embedding(2 * math.pi * c.float(), weight.shape[1]) for c in coordinates)
        return tuple(self.adapt_pos1d(sine.to(weight.dtype)) for sine in sines)

    def encode(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Pixels]:
        """x (B, H, W, D), mask (B, H, W), True on padding -> memory (B, H, W, D), its pixels."""
        across, down = axes = mask[:, 0], mask[:, :, 0]
        positions = self.embed_axes(axis_centres(across)[:, None], axis_centres(down)[:, :, None])
        pixels = Pixels(positions, tuple(additive_mask(m[:, None, None], x) for m in axes))
        for layer in self.encoder_layers:
            x = run(layer, self.recompute, x, pixels)
        return x, pixels

    def decode(
        self, x: Tensor, points: Tensor, blocked: Tensor | None, memory: Tensor, pixels: Pixels
    ) -> Decoded:
        """Content x (B, N, D), points (B, N, 2) in [0, 1], blocked (N, N)."""
        position = self.adapt_pos2d(anchor_embedding(points, x.shape[-1] // 2))
        queries = position, additive_mask(blocked, x), self.embed_axes(*points.unbind(-1))
        layers = []
        for layer in self.decoder_layers:
            x = run(layer, self.recompute, x, *queries, memory, pixels)
            layers.append(x)
        states = torch.stack(layers)
        offsets = self.bbox_embed[0](states)
        boxes = (offsets + F.pad(inverse_sigmoid(points, eps=1e-5), (0, 2))).sigmoid()
        return Decoded(states, boxes, points.detach().expand(len(states), -1, -1, -1))


def axis_centres(padded: Tensor) -> Tensor:
    """The padding along an axis (B, N) -> coordinates (B, N) of the pixels' centres; the image
    without its padding is from 0 to 1."""
    count = (~padded).cumsum(1)
    return (count - 0.5) / count[:, -1:]


class AnchorDETR(Detector):
    """Anchor DETR; of the backbone's feature maps it uses the last."""

    implied = {"num_patterns": 3}

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        super().check(options)
        name = options.modelname
        if options.num_patterns < 1:
            raise UserError(f"num_patterns: {name} needs at least 1; published models have 3")
        selects = options.query_selection != "static" or options.look_forward_twice
        if selects or options.random_refpoints_xy:
            names = "query_selection, look_forward_twice, random_refpoints_xy"
            raise UserError(f"{names}: {name} has none of them; leave them out")

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.backbone = backbone
        projections = InputProjection(options, self.num_channels[-1:])
        self.input_proj = nn.ModuleList(list(projections)[:1])
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.transformer = AnchorTransformer(options)

    @property
    def image_backbone(self) -> nn.Module:
        return self.backbone

    @property
    def encoder_layers(self) -> nn.ModuleList:
        return self.transformer.encoder_layers

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.transformer.decoder_layers

    def encode(self, images: NestedTensor) -> Encoded:
        features = self.backbone(images)
        last = features[-1]
        x = self.input_proj[0](last.tensors).permute(0, 2, 3, 1)
        memory, pixels = self.transformer.encode(x, last.mask)
        return Encoded(features, memory.flatten(1, 2), (memory, pixels))

    def queries(self, encoded: Encoded) -> Queries:
        """Their positions are points (B, Q, 2) in [0, 1]: all of them for each pattern."""
        transformer, size = self.transformer, (encoded.memory.shape[0], -1, -1)
        points = transformer.grid if hasattr(transformer, "grid") else transformer.position.weight
        patterns = transformer.pattern.weight
        content = patterns.repeat_interleave(len(points), dim=0).expand(size)
        return Queries(content, points.repeat(len(patterns), 1).expand(size), outputs={})

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        return self.transformer.decode(content, anchors, blocked, *encoded.tokens)

    def classify(self, states: Tensor) -> Tensor:
        return self.transformer.class_embed[0](states)


class DNAnchorDETR(AnchorDETR):
    """Anchor DETR with denoising; at inference the same. A noised box becomes a query at its
    centre, its size is left to the decoder; its content is the label embedding with the indicator,
    plus a pattern: an object has the next one in every group. So all patterns are side by side in a
    group, as among matching queries, and learn from all objects without more queries."""

    has_denoising = True

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.label_enc = nn.Embedding(options.num_labels + 1, options.hidden_dim - 1)
        self.label_enc.requires_grad_(options.use_dn)

    def make_denoising(self, options: DetectorOptions) -> Callable:
        return partial(self.with_patterns, super().make_denoising(options))

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """(N, 4) -> points (N, 2)."""
        return boxes[:, :2]

    def with_patterns(self, prepare: Callable, *known: object) -> tuple:
        """`prepare(*known)`, with the patterns added to the content of denoising queries."""
        content, points, blocked, dn = prepare(*known)
        place = torch.arange(dn.num_queries, device=content.device)
        group_size = max(dn.num_queries // dn.num_groups, 1)
        turn = place % group_size + place // group_size
        patterns = self.transformer.pattern(turn % self.transformer.pattern.num_embeddings)
        content = content + F.pad(patterns, (0, 0, 0, content.shape[1] - len(place)))
        return content, points, blocked, dn
