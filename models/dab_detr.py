"""DAB-DETR (Liu et al. 2022) and DN-DETR (Li et al. 2022) on one feature level, dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

from .attention import MLP
from .backbone import Backbone
from .dn_components import Denoising, dn_post_process, with_indicator
from .position_encoding import SinePositionEncoding
from .transformer import Transformer


def class_head(dim: int, num_classes: int) -> nn.Linear:
    """A linear classifier that begins by calling everything background."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(dim: int) -> MLP:
    """The refinement of an anchor; begins at none."""
    head = MLP(dim, dim, 4, 3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def put_denoising_in_front(
    model: nn.Module, targets: Sequence[dict] | None, content: Tensor, anchors: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Denoising | None]:
    """Content, anchors, which query may see which (None: all) and the denoising part, in training
    with targets of a model that has denoising; without, the queries as they are."""
    if not model.training or model.prepare_denoising is None or targets is None:
        return content, anchors, None, None
    prepared = model.prepare_denoising(targets, model.label_enc, anchors, content)
    content, anchors, blocked, dn = prepared
    return content, anchors, None if blocked is None else ~blocked, dn


def outputs_of_layers(logits: Tensor, boxes: Tensor, anchors: Tensor, dn: Denoising | None) -> dict:
    """What a detector returns of the (L, B, P + Q, ...) that its decoder's layers say."""
    logits, boxes = dn_post_process(logits, boxes, dn)
    layers = [{"pred_logits": x, "pred_boxes": b} for x, b in zip(logits, boxes, strict=True)]
    anchors = anchors[:, :, -logits.shape[2] :]
    outputs = {**layers[-1], "aux_outputs": layers[:-1], "anchors": anchors}
    return outputs if dn is None else {**outputs, "dn": dn}


class DABDETR(nn.Module):
    """Anchors as queries, refined layer by layer; with `label_enc` the queries are DN-DETR's.

    Attributes keep the released names, so that released checkpoints load as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: SinePositionEncoding,
        input_proj: nn.Module,
        transformer: Transformer,
        hidden_dim: int,
        num_classes: int,
        num_queries: int,
        num_patterns: int,
        has_denoising: bool,
        prepare_denoising: Callable | None,
    ):
        """`has_denoising`: content comes from label embeddings, as in DN-DETR. `prepare_denoising`:
        one of `dn_components`' with its noise set, None to train without."""
        super().__init__()
        self.transformer = transformer
        self.class_embed = class_head(hidden_dim, num_classes)
        self.bbox_embed = box_head(hidden_dim)
        transformer.decoder.bbox_embed = self.bbox_embed
        self.refpoint_embed = nn.Embedding(num_queries, 4)
        self.input_proj = input_proj
        self.backbone = nn.ModuleList([backbone, position_encoding])
        self.label_enc = nn.Embedding(num_classes + 1, hidden_dim - 1) if has_denoising else None
        self.hidden_dim, self.num_patterns = hidden_dim, num_patterns
        self.prepare_denoising = prepare_denoising

    def encode(self, images: NestedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> memory and position encoding (B, S, D), and (B, 1, 1, S), False on padding."""
        features = self.backbone[0](images)[-1]
        pos = self.backbone[1](features.mask).flatten(1, 2)
        pixels = self.input_proj(features.tensors).flatten(2).transpose(1, 2)
        pos = pos.to(pixels.dtype)
        allowed = ~features.mask.flatten(1)[:, None, None, :]
        return self.transformer.encoder(pixels, pos, allowed), pos, allowed

    def queries(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Content (B, Q, D) and anchors (B, Q, 4) before the sigmoid; with P patterns the anchors
        stand P times in a row, each time with another content."""
        anchors = self.refpoint_embed.weight.repeat(max(self.num_patterns, 1), 1)
        if self.label_enc is None:
            content = anchors.new_zeros(len(anchors), self.hidden_dim)
        else:
            content = with_indicator(self.label_enc.weight[-1:], self.hidden_dim, 0.0)
            content = content.expand(len(anchors), -1)
        if self.num_patterns:
            patterns = self.transformer.patterns.weight
            content = content + patterns.repeat_interleave(len(self.refpoint_embed.weight), dim=0)
        return content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1)

    def forward(
        self,
        images: NestedTensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict:
        """Images, normalised, as a batch (B, 3, H, W) with its mask or as a list of (3, H, W).

        Returns "pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) cxcywh in [0, 1] of the image
        without padding, "aux_outputs", the same of every layer but the last, and "anchors"
        (L, B, Q, 4), the boxes that the L layers refine. With targets, in training, also "dn", the
        denoising part.
        """
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        memory, pos, pixel_allowed = self.encode(images)
        queries = self.queries(len(images.mask))
        content, anchors, allowed, dn = put_denoising_in_front(self, targets, *queries)
        states, boxes, anchors = self.transformer.decoder(
            content, anchors, memory, pos, allowed, pixel_allowed
        )
        return outputs_of_layers(self.class_embed(states), boxes, anchors, dn)
