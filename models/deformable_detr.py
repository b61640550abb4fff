"""DETRs on several feature levels with deformable attention: DAB-Deformable-DETR (Liu et al. 2022),
DN-Deformable-DETR (Li et al. 2022) and DINO (Zhang et al. 2022). What they differ in are the heads,
where queries come from, and the denoising; encoder and decoder are the same.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.config import Config
from util.nested_tensor import NestedTensor

from .attention import xavier_matrices
from .backbone import resize_mask
from .dab_detr import DABDETR
from .deformable_transformer import (
    DeformableDecoder,
    DeformableEncoder,
    DeformableTransformer,
    Tokens,
)
from .detector import Detector, box_head, class_head, spread_centres
from .dn_components import with_indicator
from .position_encoding import SinePositionEncoding
from .query_selection import Selection, select_queries
from .transformer import Decoder, MultiLevelDecoderLayer


def clones(module: nn.Module, number: int, share: bool) -> nn.ModuleList:
    """The same module `number` times, or copies of it."""
    return nn.ModuleList(module if share else copy.deepcopy(module) for _ in range(number))


class InputProjection(nn.ModuleList):
    """Feature maps of the backbone, and smaller ones made from the last, to one width.

    Members are 1x1 convolutions, then 3x3 ones of stride 2, each with GroupNorm of 32 groups, or of
    fewer where 32 do not divide the width or would have one channel each.
    """

    def __init__(self, cfg: Config, num_channels: Sequence[int]):
        dim = cfg.hidden_dim
        convs = [nn.Conv2d(channels, dim, kernel_size=1) for channels in num_channels]
        channels = num_channels[-1]
        while len(convs) < cfg.num_feature_levels:
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


def encode_levels(model: Detector, images: NestedTensor) -> tuple[Tensor, Tokens]:
    """Images -> memory (B, S, D) of all feature levels, and what the levels are."""
    features = model.backbone[0](images)
    levels = model.input_proj([feature.tensors for feature in features])
    masks = [feature.mask for feature in features]
    masks += [resize_mask(images.mask, x) for x in levels[len(masks) :]]
    positions = [model.backbone[1](mask) for mask in masks]
    tokens = Tokens.of_levels(levels, masks, positions, model.transformer.level_embed)
    return model.transformer.encoder(tokens), tokens


class DeformableEncoderDABDETR(DABDETR):
    """DAB-DETR's or DN-DETR's queries and dense decoder over a deformable encoder's levels.

    Its first weights are the released ones and unlike the other models': the encoder's sampling
    offsets and attention weights and the patterns are Xavier-distributed, and the box head and the
    input projections keep PyTorch's defaults.
    """

    def __init__(self, cfg: Config, backbone: nn.Module):
        super().__init__(cfg, backbone)
        xavier_matrices(self.transformer.encoder)
        if cfg.num_patterns:
            xavier_matrices(self.transformer.patterns)
        self.bbox_embed.layers[-1].reset_parameters()

    def make_transformer(self, cfg: Config, channels: list[int]) -> tuple[nn.Module, nn.Module]:
        input_proj, encoder = InputProjection(cfg, channels), DeformableEncoder(cfg)
        decoder = Decoder(cfg, MultiLevelDecoderLayer)
        return input_proj, DeformableTransformer(cfg, encoder, decoder)

    def encode(self, images: NestedTensor) -> tuple[Sequence[Tensor], ...]:
        memory, tokens = encode_levels(self, images)
        areas = [height * width for height, width in tokens.sizes]
        allowed = ~tokens.mask[:, None, None]
        return memory.split(areas, 1), tokens.pos.split(areas, 1), allowed.split(areas, -1)


class DeformableDETR(Detector):
    """A head for every decoder layer; queries that are learned, or selected among the tokens."""

    encode = encode_levels

    def __init__(self, cfg: Config, backbone: nn.Module):
        super().__init__(cfg)
        self.num_queries, self.selection = cfg.num_queries, cfg.query_selection
        self.is_dino = cfg.modelname == "dino"
        decoder = DeformableDecoder(cfg)
        self.transformer = DeformableTransformer(cfg, DeformableEncoder(cfg), decoder)
        self.input_proj = InputProjection(cfg, backbone.num_channels)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(cfg)])
        self.make_heads(cfg)
        self.make_queries(cfg)

    def make_heads(self, cfg: Config) -> None:
        """A pair for each decoder layer, and one for the tokens that queries are selected among:
        DINO has it apart, the others after the last layer's."""
        transformer, decoder = self.transformer, self.transformer.decoder
        selects = self.selection != "static"
        number = cfg.dec_layers + int(selects and not self.is_dino)
        self.class_embed = clones(class_head(cfg), number, cfg.dec_pred_class_embed_share)
        self.bbox_embed = clones(box_head(cfg), number, cfg.dec_pred_bbox_embed_share)
        if not (self.is_dino or selects or cfg.dec_pred_bbox_embed_share):
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2)  # begins with small boxes
        decoder.bbox_embed = self.bbox_embed
        if self.is_dino or selects:
            decoder.class_embed = self.class_embed
        if self.is_dino and selects:
            pick = lambda module, shared: module if shared else copy.deepcopy(module)
            shares = cfg.two_stage_class_embed_share, cfg.two_stage_bbox_embed_share
            transformer.enc_out_class_embed = pick(self.class_embed[0], shares[0])
            transformer.enc_out_bbox_embed = pick(self.bbox_embed[0], shares[1])

    def make_queries(self, cfg: Config) -> None:
        """What queries learn, and the embeddings of the labels, which denoising alone has here."""
        dim, self.label_enc = cfg.hidden_dim, None
        if self.is_dino:
            self.label_enc = nn.Embedding((cfg.dn_labelbook_size or cfg.num_classes) + 1, dim)
        elif cfg.modelname.startswith("dn_"):
            self.label_enc = nn.Embedding(cfg.num_classes + 1, dim - 1)
        if self.label_enc is not None:
            self.label_enc.requires_grad_(cfg.use_dn)
        if self.selection == "static":
            # With label embeddings, DN-DETR's content leaves room for the indicator.
            width = dim if self.label_enc is None else self.label_enc.embedding_dim
            self.tgt_embed = nn.Embedding(self.num_queries, width)
            self.refpoint_embed = nn.Embedding(self.num_queries, 4)
            if self.is_dino:
                xavier_matrices(self.tgt_embed)
                xavier_matrices(self.refpoint_embed)
            if cfg.random_refpoints_xy:
                spread_centres(self.refpoint_embed)

    def select(self, memory: Tensor, tokens: Tokens) -> Selection:
        transformer = self.transformer
        if self.is_dino:
            heads = transformer.enc_out_class_embed, transformer.enc_out_bbox_embed
            score = lambda logits: logits.amax(-1)
        else:  # class 0 stands for "an object"
            heads = self.class_embed[-1], self.bbox_embed[-1]
            score = lambda logits: logits[..., 0]
        project = lambda x: transformer.enc_output_norm(transformer.enc_output(x))
        return select_queries(memory, tokens, project, *heads, self.num_queries, score)

    def queries(
        self, batch_size: int, memory: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor, dict]:
        if self.selection == "static":
            dim = memory.shape[-1]
            content = with_indicator(self.tgt_embed.weight, dim, 0.0).expand(batch_size, -1, -1)
            return content, self.refpoint_embed.weight.expand(batch_size, -1, -1), {}
        selected = self.select(memory, tokens)
        name, logits, boxes = "enc_outputs", selected.logits, selected.boxes
        if self.is_dino:
            name, boxes = "interm_outputs", selected.anchors
            logits = selected.of_selected(logits)
        content = selected.features.detach()
        if self.selection == "mixed":
            content = self.transformer.tgt_embed.weight.expand(batch_size, -1, -1)
        outputs = {name: {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}}
        return content, selected.anchors.detach(), outputs

    def classify(self, states: Tensor) -> Tensor:
        return torch.stack([f(x) for f, x in zip(self.class_embed, states, strict=False)])
