"""Detectors on several feature levels with deformable attention: DAB-Deformable-DETR (Liu et al.
2022) and DN-Deformable-DETR (Li et al. 2022), the latter also with a dense decoder. DINO, in
`dino.py`, has the same encoder and decoder.
"""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attention import MLP, xavier_matrices
from .backbones import Backbone
from .dab_detr import DNDETR
from .deformable_transformer import (
    DeformableDecoder,
    DeformableEncoder,
    DeformableTransformer,
    LevelTokens,
)
from .detector import Detector, Encoded, LayerOutputs, Queries
from .dn_components import with_indicator
from .errors import UserError
from .heads import box_head, class_head, spread_centres
from .nested_tensor import NestedTensor, resize_mask
from .options import DetectorOptions
from .position_encoding import SinePositionEncoding
from .query_selection import Selection, select_queries
from .transformer import Decoded, Decoder, MultiLevelDecoderLayer


class InputProjection(nn.ModuleList):
    """The backbone's feature maps, and smaller ones made from the last, projected to one width.

    Members are 1x1 convolutions, then 3x3 ones of stride 2, each with GroupNorm of 32 groups, or of
    fewer where 32 do not divide the width or would have one channel each.
    """

    def __init__(self, options: DetectorOptions, num_channels: Sequence[int]):
        dim = options.hidden_dim
        convs = [nn.Conv2d(channels, dim, kernel_size=1) for channels in num_channels]
        channels = num_channels[-1]
        while len(convs) < options.num_feature_levels:
            convs.append(nn.Conv2d(channels, dim, kernel_size=3, stride=2, padding=1))
            channels = dim
        groups = min(math.gcd(32, dim), dim // 2)
        super().__init__(nn.Sequential(conv, nn.GroupNorm(groups, dim)) for conv in convs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = [project(x) for project, x in zip(self, features, strict=False)]
        last = features[-1]
        for project in list(self)[len(features) :]:
            last = project(last)
            levels.append(last)
        return levels


def encode_levels(model: Detector, images: NestedTensor) -> Encoded:
    """Backbone, input projection and deformable encoder over all feature levels."""
    features = model.backbone[0](images)
    levels = model.input_proj([feature.tensors for feature in features])
    masks = [feature.mask for feature in features]
    masks += [resize_mask(images.mask, x) for x in levels[len(masks) :]]
    positions = [model.backbone[1](mask) for mask in masks]
    tokens = LevelTokens.of_levels(levels, masks, positions, model.transformer.level_embed)
    return Encoded(features, model.transformer.encoder(tokens), tokens)


class DeformableEncoderDNDETR(DNDETR):
    """DN-DETR's queries and dense decoder over the levels of a deformable encoder ("deformable
    encoder only").

    Its initial weights are the released ones and differ from the other models': the encoder's
    sampling offsets and attention weights and the patterns are Xavier-distributed, and the box head
    and the input projections keep PyTorch's defaults.
    """

    has_masks = False

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        xavier_matrices(self.transformer.encoder)
        if options.num_patterns:
            xavier_matrices(self.transformer.patterns)
        self.bbox_embed.layers[-1].reset_parameters()

    def make_transformer(self, options: DetectorOptions) -> tuple[nn.Module, nn.Module]:
        input_proj = InputProjection(options, self.num_channels)
        encoder, decoder = DeformableEncoder(options), Decoder(options, MultiLevelDecoderLayer)
        return input_proj, DeformableTransformer(options, encoder, decoder)

    encode = encode_levels

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        tokens = encoded.tokens
        areas = [height * width for height, width in tokens.sizes]
        memory = encoded.memory, tokens.pos, tokens.mask
        return self.transformer.decoder(content, anchors, blocked, *memory, areas)


class DABDeformableDETR(Detector):
    """A pair of heads for every decoder layer; queries that are learned, or selected among the
    encoder's tokens."""

    trains_all_tokens: ClassVar[bool] = True  # or only the selected ones

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        super().check(options)
        if options.num_patterns:
            name = options.modelname
            raise UserError(
                f"num_patterns: {name} has none; use a model with a dense decoder, dn_dab_detr"
            )
        if options.random_refpoints_xy and options.query_selection != "static":
            raise UserError(
                f"random_refpoints_xy: anchors are not learned with {options.query_selection} "
                "query_selection; use static"
            )

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.num_queries, self.selection = options.num_queries, options.query_selection
        decoder = self.make_decoder(options)
        self.transformer = DeformableTransformer(options, DeformableEncoder(options), decoder)
        self.input_proj = InputProjection(options, self.num_channels)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(options)])
        self.make_heads(options)
        self.label_enc = self.make_label_embedding(options)
        if self.selection == "static":
            self.make_learned_queries(options)
            if options.random_refpoints_xy:
                spread_centres(self.refpoint_embed)

    def make_decoder(self, options: DetectorOptions) -> nn.Module:
        return DeformableDecoder(options, final_norm=False, scale_queries=True)

    def make_heads(self, options: DetectorOptions) -> None:
        """The heads of the tokens that queries are selected among follow the last layer's."""
        selects = self.selection != "static"
        self.class_embed, self.bbox_embed = layer_heads(options, options.dec_layers + int(selects))
        if not (selects or options.dec_pred_bbox_embed_share):
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2)  # initially small boxes
        self.transformer.decoder.bbox_embed = self.bbox_embed
        if selects:
            self.transformer.decoder.class_embed = self.class_embed

    def make_label_embedding(self, options: DetectorOptions) -> nn.Embedding | None:
        """`label_enc`, which in these models only denoising uses."""
        return None

    def make_learned_queries(self, options: DetectorOptions) -> None:
        # With label embeddings, DN-DETR's content leaves room for the indicator.
        width = self.label_enc.embedding_dim if self.label_enc else options.hidden_dim
        self.tgt_embed = nn.Embedding(self.num_queries, width)
        self.refpoint_embed = nn.Embedding(self.num_queries, 4)

    encode = encode_levels

    def queries(self, encoded: Encoded) -> Queries:
        batch_size, _, dim = encoded.memory.shape
        if self.selection == "static":
            content = with_indicator(self.tgt_embed.weight, dim, 0.0).expand(batch_size, -1, -1)
            anchors = self.refpoint_embed.weight.expand(batch_size, -1, -1)
            return Queries(content, anchors, outputs={})
        selected = self.select(encoded.memory, encoded.tokens)
        content = selected.features.detach()  # pure selection
        if self.selection == "mixed":
            content = self.transformer.tgt_embed.weight.expand(batch_size, -1, -1)
        return Queries(content, selected.anchors.detach(), self.token_outputs(selected))

    def select(self, memory: Tensor, tokens: LevelTokens) -> Selection:
        project = lambda x: self.transformer.enc_output_norm(self.transformer.enc_output(x))
        score, train_all = self.token_score, self.trains_all_tokens
        heads = self.token_heads()
        return select_queries(memory, tokens, project, *heads, self.num_queries, score, train_all)

    def token_heads(self) -> tuple[nn.Module, nn.Module]:
        """The class head and the box head of the encoder's tokens."""
        return self.class_embed[-1], self.bbox_embed[-1]

    def token_score(self, logits: Tensor) -> Tensor:
        """Logits (B, S, C) -> (B, S), how likely a token is an object: that is class 0's meaning
        here."""
        return logits[..., 0]

    def token_outputs(self, selected: Selection) -> dict[str, LayerOutputs]:
        """All tokens are trained to distinguish objects from background."""
        outputs: LayerOutputs = {
            "pred_logits": selected.logits,
            "pred_boxes": selected.boxes.sigmoid(),
        }
        return {"enc_outputs": outputs}

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        memory, tokens = encoded.memory, encoded.tokens
        return self.transformer.decoder(content, anchors, blocked, memory, tokens)

    def classify(self, states: Tensor) -> Tensor:
        return torch.stack([f(x) for f, x in zip(self.class_embed, states, strict=False)])


class DNDeformableDETR(DABDeformableDETR):
    """DAB-Deformable-DETR with denoising."""

    has_denoising = True

    def make_label_embedding(self, options: DetectorOptions) -> nn.Embedding:
        """One number narrower than the transformer, which leaves room for the indicator."""
        label_enc = nn.Embedding(options.num_labels + 1, options.hidden_dim - 1)
        return label_enc.requires_grad_(options.use_dn)


def layer_heads(options: DetectorOptions, number: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """`number` class heads and box heads, initially equal: copies, or the same one where shared."""

    def repeat(head: nn.Linear | MLP, is_shared: bool) -> nn.ModuleList:
        return nn.ModuleList(head if is_shared else copy.deepcopy(head) for _ in range(number))

    class_heads = repeat(class_head(options), options.dec_pred_class_embed_share)
    return class_heads, repeat(box_head(options), options.dec_pred_bbox_embed_share)
