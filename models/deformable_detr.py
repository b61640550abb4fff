"""DETRs on several feature levels with deformable attention: DAB-Deformable-DETR (Liu et al. 2022),
DN-Deformable-DETR (Li et al. 2022) and DINO (Zhang et al. 2022). What they differ in are the heads,
where queries come from, and the denoising; encoder and decoder are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

from .attention import init_transformer
from .backbone import Backbone, resize_mask
from .dab_detr import DABDETR, box_head, class_head, outputs_of_layers, put_denoising_in_front
from .deformable_transformer import DeformableDecoder, DeformableEncoder, Tokens
from .dn_components import with_indicator
from .position_encoding import SinePositionEncoding
from .query_selection import Selection, select_queries


def clones(module: nn.Module, number: int, share: bool) -> nn.ModuleList:
    """The same module `number` times, or copies of it."""
    return nn.ModuleList(module if share else copy.deepcopy(module) for _ in range(number))


class InputProjection(nn.ModuleList):
    """Feature maps of the backbone, and smaller ones made from the last, to one width.

    Members are 1x1 convolutions, then 3x3 ones of stride 2, each with GroupNorm.
    """

    def __init__(self, num_channels: Sequence[int], num_levels: int, dim: int):
        convs = [nn.Conv2d(channels, dim, kernel_size=1) for channels in num_channels]
        channels = num_channels[-1]
        while len(convs) < num_levels:
            convs.append(nn.Conv2d(channels, dim, kernel_size=3, stride=2, padding=1))
            channels = dim
        for conv in convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        super().__init__(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in convs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = [project(x) for project, x in zip(self, features, strict=False)]
        last = features[-1]
        for project in list(self)[len(features) :]:
            last = project(last)
            levels.append(last)
        return levels


class DeformableTransformer(nn.Module):
    """Encoder, decoder and, where queries are selected among the encoder's tokens, its output."""

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        num_levels: int,
        dim: int,
        selects_tokens: bool,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if selects_tokens:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
        init_transformer(self)
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))


def encode(model: nn.Module, images: NestedTensor) -> tuple[Tensor, Tokens]:
    """Images -> memory (B, S, D) of all feature levels, and what the levels are."""
    features = model.backbone[0](images)
    levels = model.input_proj([feature.tensors for feature in features])
    masks = [feature.mask for feature in features]
    masks += [resize_mask(images.mask, x) for x in levels[len(masks) :]]
    positions = [model.backbone[1](mask) for mask in masks]
    tokens = Tokens.of_levels(levels, masks, positions, model.transformer.level_embed)
    return model.transformer.encoder(tokens), tokens


class DeformableEncoderDABDETR(DABDETR):
    """DAB-DETR's or DN-DETR's queries and dense decoder over a deformable encoder's levels."""

    def encode(self, images: NestedTensor) -> tuple[Sequence[Tensor], ...]:
        memory, tokens = encode(self, images)
        areas = [height * width for height, width in tokens.sizes]
        allowed = ~tokens.mask[:, None, None]
        return memory.split(areas, 1), tokens.pos.split(areas, 1), allowed.split(areas, -1)


class DeformableDETR(nn.Module):
    """Attributes keep the released names, so that released checkpoints load as they are."""

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: SinePositionEncoding,
        transformer: DeformableTransformer,
        hidden_dim: int,
        num_levels: int,
        num_classes: int,
        num_queries: int,
        selection: str,
        is_dino: bool,
        shares_heads: tuple[bool, bool, bool, bool],
        label_rows: int | None,
        prepare_denoising: Callable | None,
    ):
        """`selection`: "static", "pure" or "mixed", see `query_selection`. `is_dino`: the encoder's
        heads apart from the decoder's, tokens picked by their best class, label embeddings of full
        width. `shares_heads`: whether decoder layers share their class head and their box head, and
        whether the encoder's are theirs. `label_rows`: classes that denoising embeds, None without.
        `prepare_denoising`: one of `dn_components`' with its noise set, None to train without.
        """
        super().__init__()
        self.transformer = transformer
        self.input_proj = InputProjection(backbone.num_channels, num_levels, hidden_dim)
        self.backbone = nn.ModuleList([backbone, position_encoding])
        self.num_queries, self.selection, self.is_dino = num_queries, selection, is_dino
        self.prepare_denoising = prepare_denoising
        self.make_heads(hidden_dim, num_classes, shares_heads)
        self.make_queries(hidden_dim, label_rows)

    def make_heads(self, dim: int, num_classes: int, shares: tuple[bool, ...]) -> None:
        decoder = self.transformer.decoder
        selects = self.selection != "static"
        number = len(decoder.layers) + int(selects and not self.is_dino)
        self.class_embed = clones(class_head(dim, num_classes), number, shares[0])
        self.bbox_embed = clones(box_head(dim), number, shares[1])
        decoder.bbox_embed = self.bbox_embed
        if self.is_dino or selects:
            decoder.class_embed = self.class_embed
        if self.is_dino and selects:
            own = copy.deepcopy
            pick = lambda module, shared: module if shared else own(module)
            self.transformer.enc_out_class_embed = pick(self.class_embed[0], shares[2])
            self.transformer.enc_out_bbox_embed = pick(self.bbox_embed[0], shares[3])

    def make_queries(self, dim: int, label_rows: int | None) -> None:
        self.label_enc = None
        if label_rows is not None:
            self.label_enc = nn.Embedding(label_rows + 1, dim if self.is_dino else dim - 1)
        if self.selection == "static":
            # With label embeddings, DN-DETR's content leaves room for the indicator.
            width = dim if self.label_enc is None else self.label_enc.embedding_dim
            self.tgt_embed = nn.Embedding(self.num_queries, width)
            self.refpoint_embed = nn.Embedding(self.num_queries, 4)
        elif self.selection == "mixed":
            self.transformer.tgt_embed = nn.Embedding(self.num_queries, dim)

    def select(self, memory: Tensor, tokens: Tokens) -> Selection:
        transformer = self.transformer
        if self.is_dino:
            heads = transformer.enc_out_class_embed, transformer.enc_out_bbox_embed
            score = lambda logits: logits.amax(-1)
        else:  # the heads after the last layer's; class 0 stands for "an object"
            heads = self.class_embed[-1], self.bbox_embed[-1]
            score = lambda logits: logits[..., 0]
        project = lambda x: transformer.enc_output_norm(transformer.enc_output(x))
        return select_queries(memory, tokens, project, *heads, self.num_queries, score)

    def queries(self, batch_size: int, selected: Selection | None) -> tuple[Tensor, Tensor]:
        """Content (B, Q, D) and anchors (B, Q, 4) before the sigmoid."""
        if selected is None:
            dim = self.transformer.level_embed.shape[1]
            content = with_indicator(self.tgt_embed.weight, dim, 0.0).expand(batch_size, -1, -1)
            return content, self.refpoint_embed.weight.expand(batch_size, -1, -1)
        anchors = selected.anchors.detach()
        if self.selection == "pure":
            return selected.features.detach(), anchors
        return self.transformer.tgt_embed.weight.expand(batch_size, -1, -1), anchors

    def forward(
        self,
        images: NestedTensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict:
        """Images, normalised, as a batch (B, 3, H, W) with its mask or as a list of (3, H, W).

        Returns "pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) cxcywh in [0, 1] of the image
        without padding, "aux_outputs", the same of every layer but the last, and "anchors"
        (L, B, Q, 4), the boxes that the L layers refine; where queries are selected,
        "interm_outputs", the same of the selected tokens (DINO), or "enc_outputs", of all tokens.
        With targets, in training, also "dn", the denoising part.
        """
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        memory, tokens = encode(self, images)
        selected = None if self.selection == "static" else self.select(memory, tokens)
        queries = self.queries(len(memory), selected)
        content, anchors, allowed, dn = put_denoising_in_front(self, targets, *queries)
        states, boxes, anchors = self.transformer.decoder(content, anchors, memory, tokens, allowed)
        logits = torch.stack([f(x) for f, x in zip(self.class_embed, states, strict=False)])
        outputs = outputs_of_layers(logits, boxes, anchors, dn)
        if selected is not None and self.is_dino:
            outputs["interm_outputs"] = {
                "pred_logits": selected.of_selected(selected.logits),
                "pred_boxes": selected.anchors.sigmoid(),
            }
        elif selected is not None:
            outputs["enc_outputs"] = {
                "pred_logits": selected.logits,
                "pred_boxes": selected.boxes.sigmoid(),
            }
        return outputs
