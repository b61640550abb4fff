"""Deformable DETR (Zhu et al. 2020), plain, with box refinement and in two stages, and with the
denoising of DN-DETR.

A query's position is an embedding that no decoder layer changes. Attention samples around its
reference: a point predicted from the embedding, which box refinement turns into a box, or, in two
stages and for denoising queries, a box from the start. The other models of several feature levels,
in `deformable_detr.py`, have DAB-DETR's queries instead.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MLP, additive_mask, xavier_matrices
from .backbones import Backbone
from .deformable_detr import DABDeformableDETR, DNDeformableDETR
from .deformable_transformer import DeformableDecoderLayer, LevelTokens
from .detector import Encoded, Queries
from .dn_components import inverse_sigmoid
from .errors import UserError
from .heads import box_head, class_head
from .options import DetectorOptions
from .position_encoding import sine_embedding
from .recompute import run
from .transformer import Decoded


class ReferenceDecoder(nn.Module):
    """Attends around references, which with `with_box_refine` are the boxes predicted by the layer
    before, and otherwise the same in all layers."""

    def __init__(self, options: DetectorOptions):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(options) for _ in range(options.dec_layers)
        )
        self.num_points, self.refines = options.dec_n_points, options.with_box_refine
        self.recompute = options.use_checkpoint

    def forward(
        self,
        content: Tensor,
        query_pos: Tensor,
        references: Tensor,
        is_point: Tensor,
        self_blocked: Tensor | None,
        memory: Tensor,
        tokens: LevelTokens,
        heads: Sequence[nn.Module],
    ) -> Decoded:
        """content, query_pos (B, N, D), references (B, N, 4) before the sigmoid, is_point (N,),
        True where only the first two coordinates are meant and the others are 0, self_blocked
        (N, N), True where self-attention is blocked, memory (B, S, D) and the layers' box heads ->
        the layers' outputs."""
        self_mask = additive_mask(self_blocked, content)
        ratios = tokens.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        # Sampling offsets around a point count pixels, as they do in a box of this size.
        size_of_point = 2 * self.num_points / tokens.spatial_shapes.flip(-1)  # (L, 2)
        x, anchors = content, references.sigmoid()
        states, boxes, refined = [], [], []
        for layer, head in zip(self.layers, heads, strict=False):
            scaled = anchors[:, :, None] * ratios
            size = torch.where(is_point[:, None, None], size_of_point, scaled[..., 2:])
            scaled = torch.cat([scaled[..., :2], size], dim=-1)
            x = run(layer, self.recompute, x, query_pos, scaled, self_mask, memory, tokens)
            states.append(x)
            boxes.append((head(x) + inverse_sigmoid(anchors, eps=1e-5)).sigmoid())
            refined.append(anchors.detach())
            if self.refines:
                anchors, is_point = boxes[-1].detach(), torch.zeros_like(is_point)
        return Decoded(torch.stack(states), torch.stack(boxes), torch.stack(refined))


class DeformableDETR(DABDeformableDETR):
    """Positions and contents are learned, or in two stages made from the boxes of the best tokens.

    The queries' `anchors` are (B, Q, D + 4): the positional query, and the reference before the
    sigmoid. Without refinement all decoder layers share one pair of heads.
    """

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        super().check(options)
        name = options.modelname
        if options.query_selection == "mixed" or options.look_forward_twice:
            problem = "query_selection mixed, look_forward_twice"
            raise UserError(f"{problem}: {name} has neither; use dn_dab_deformable_detr")
        if options.random_refpoints_xy:
            raise UserError(f"random_refpoints_xy: {name} predicts its reference points")
        if options.query_selection == "pure" and not options.with_box_refine:
            raise UserError(f"query_selection: {name} in two stages needs with_box_refine")

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.dim = options.hidden_dim
        if self.selection == "pure":
            dim, transformer = self.dim, self.transformer
            transformer.pos_trans = nn.Linear(2 * dim, 2 * dim)
            transformer.pos_trans_norm = nn.LayerNorm(2 * dim)
            xavier_matrices(transformer.pos_trans)

    def make_decoder(self, options: DetectorOptions) -> nn.Module:
        return ReferenceDecoder(options)

    def make_heads(self, options: DetectorOptions) -> None:
        if options.with_box_refine:
            return super().make_heads(options)
        self.class_embed = nn.ModuleList([class_head(options)] * options.dec_layers)
        self.bbox_embed = nn.ModuleList([box_head(options)] * options.dec_layers)
        nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2)  # initially small boxes

    def make_learned_queries(self, options: DetectorOptions) -> None:
        self.query_embed = nn.Embedding(options.num_queries, 2 * options.hidden_dim)
        points = self.transformer.reference_points = nn.Linear(options.hidden_dim, 2)
        xavier_matrices(points)
        nn.init.zeros_(points.bias)

    def queries(self, encoded: Encoded) -> Queries:
        batch_size, _, dim = encoded.memory.shape
        if self.selection == "static":
            position, content = self.query_embed.weight.split(dim, dim=-1)
            points = F.pad(self.transformer.reference_points(position), (0, 2))
            anchors = torch.cat([position, points], dim=-1).expand(batch_size, -1, -1)
            return Queries(content.expand(batch_size, -1, -1), anchors, outputs={})
        selected = self.select(encoded.memory, encoded.tokens)
        boxes = selected.anchors.detach()
        position, content = self.queries_of_boxes(boxes.sigmoid()).split(dim, dim=-1)
        anchors = torch.cat([position, boxes], dim=-1)
        return Queries(content, anchors, self.token_outputs(selected))

    def queries_of_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4), cxcywh in [0, 1] -> (..., 2 * D), positional query and content."""
        transformer = self.transformer
        return transformer.pos_trans_norm(transformer.pos_trans(box_embedding(boxes, self.dim)))

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        query_pos, references = anchors.split([content.shape[-1], 4], dim=-1)
        number = anchors.shape[1]  # denoising queries come first
        first_point = number - self.num_queries if self.selection == "static" else number
        is_point = torch.arange(number, device=anchors.device) >= first_point
        queries = content, query_pos, references, is_point, blocked
        return self.transformer.decoder(*queries, encoded.memory, encoded.tokens, self.bbox_embed)


def box_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Sine embedding of boxes (..., 4), cxcywh in [0, 1]: (..., 2 * dim), in order x, y, w, h."""
    return sine_embedding(2 * math.pi * boxes.float(), dim // 2).flatten(-2).to(boxes.dtype)


class DNOriginalDeformableDETR(DeformableDETR):
    """Deformable DETR with denoising, at inference the same.

    A denoising query has its noised box as reference, as content the label embedding and the
    indicator. Its positional query is `box_pos` of the box's sine embedding, in two stages that of
    matching queries.
    """

    has_denoising = True
    make_label_embedding = DNDeformableDETR.make_label_embedding

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        if self.selection == "static":
            self.box_pos = MLP(2 * self.dim, self.dim, self.dim, 2).requires_grad_(options.use_dn)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """(N, 4) -> anchors (N, D + 4)."""
        if self.selection == "static":
            position = self.box_pos(box_embedding(boxes, self.dim))
        else:
            position, _ = self.queries_of_boxes(boxes).chunk(2, dim=-1)
        return torch.cat([position, inverse_sigmoid(boxes, eps=1e-5)], dim=-1)
