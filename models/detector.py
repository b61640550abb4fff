"""The forward pass that all detectors share, its intermediate results, the denoising queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor, nn

from .backbones import Backbone
from .dn_components import (
    Denoising,
    dn_post_process,
    inverse_sigmoid,
    prepare_for_cdn,
    prepare_for_dn,
)
from .errors import UserError
from .nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from .options import DetectorOptions
from .transformer import Decoded


@dataclass
class Encoded:
    """The images after backbone and encoder.

    features: the backbone's maps (B, C, H, W) and padding masks, finest first; memory: (B, S, D),
    the encoder's output; tokens: the encoder's input, its positions and mask, as the detector's
    transformer represents them.
    """

    features: list[NestedTensor]
    memory: Tensor
    tokens: Any


@dataclass
class Queries:
    """The decoder's Q queries: content (B, Q, D) and anchors (B, Q, 4) before the sigmoid, or a
    detector's other kind of positions, (B, Q, ...). `outputs` go into the detector's outputs: those
    of selected tokens."""

    content: Tensor
    anchors: Tensor
    outputs: dict[str, Any]


class LayerOutputs(TypedDict):
    """Predictions of a decoder layer, or of the encoder's tokens as queries."""

    pred_logits: Tensor  # (B, Q, C)
    pred_boxes: Tensor  # (B, Q, 4) cxcywh in [0, 1] of the image without padding


class Outputs(LayerOutputs, total=False):
    """The last layer's predictions, and further outputs of a detector of L decoder layers."""

    aux_outputs: list[LayerOutputs]  # of every layer but the last
    states: Tensor  # (L, B, Q, D) decoder states, from which the heads predict
    anchors: (
        Tensor  # (L, B, Q, 4) boxes, cxcywh, or points that the layers refine, if any, in [0, 1]
    )
    encoded: Encoded
    interm_outputs: LayerOutputs  # of the selected tokens (DINO)
    enc_outputs: LayerOutputs  # of all tokens (other models with query selection)
    dn: Denoising  # the denoising part, in training


class Detector(nn.Module):
    """A DETR. The attributes of its subclasses have the released names, so that released
    checkpoints load without translation. A subclass implements the four steps of `forward` and sets
    the class variables below.
    """

    implied: ClassVar[dict[str, Any]] = {}  # options with another default than in `options`
    has_denoising: ClassVar[bool] = False
    has_masks: ClassVar[bool] = False  # whether the mask head fits
    token_losses: ClassVar[str] = "_enc"  # suffix of the losses of selected tokens
    has_queries: ClassVar[bool] = True  # else regions, without matching (Faster R-CNN)
    first_id: ClassVar[int] = 0  # the category of label 0 in released checkpoints

    backbone: Any
    transformer: Any
    input_proj: Any
    class_embed: Any
    bbox_embed: Any
    label_enc: nn.Embedding | None  # of the labels that denoising restores

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__()
        self.num_channels, self.label_enc = backbone.num_channels, None
        self.prepare_denoising = self.make_denoising(options) if options.use_dn else None

    @classmethod
    def check(cls, options: DetectorOptions) -> None:
        """Raises UserError for options that this detector does not have."""
        if options.use_dn and not cls.has_denoising:
            name = options.modelname
            raise UserError(f"use_dn: {name} has no denoising part; use -m dn_{name}")
        if options.masks and not cls.has_masks:
            remedy = "use detr, dn_detr, dab_detr or dn_dab_detr"
            raise UserError(f"masks: {options.modelname} has no mask head; {remedy}")
        if options.class_loss == "softmax" and options.query_selection != "static":
            reason = "there are no scores to select tokens by"
            raise UserError(f"class_loss: with softmax {reason}; use static query_selection")

    def make_denoising(self, options: DetectorOptions) -> Callable:
        """`prepare_for_dn`, or the contrastive `prepare_for_cdn`, with the noise of the options."""
        number = options.dn_number
        settings = {**self.noise(options), "embed_boxes": self.embed_boxes}
        if not options.contrastive:
            return partial(prepare_for_dn, num_groups=number, **settings)
        labels = options.num_labels  # label_enc may have more rows
        return partial(prepare_for_cdn, num_denoising=number, num_classes=labels, **settings)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Noised boxes (N, 4), cxcywh in [0, 1] -> (N, ...), the `anchors` of their queries."""
        return inverse_sigmoid(boxes)

    @staticmethod
    def noise(options: DetectorOptions) -> dict[str, Any]:
        """The noise of the options, as `prepare_for_dn` and its companions take it."""
        ratio, scale = options.dn_label_noise_ratio, options.dn_box_noise_scale
        return {"label_noise_ratio": ratio, "box_noise_scale": scale}

    def compile_parts(self, **options: Any) -> None:
        """Compile the backbone and the encoder's layers in place, for images of any size; `options`
        are those of `torch.compile`. Parameter names and results stay as they are."""
        # Layers share their graph, which a compiled encoder would repeat.
        for part in (self.image_backbone, *self.encoder_layers):
            part.compile(dynamic=True, **options)

    def place(self, device: torch.device | str) -> Detector:
        """Move the detector to a device, with the layout of weights that is the fastest there."""
        self.to(device)
        if torch.device(device).type == "cpu":  # makes convolutions 10 to 20% faster
            self.image_backbone.to(memory_format=torch.channels_last)
        return self

    @property
    def image_backbone(self) -> nn.Module:
        """The backbone without the position encoding, which most released names put beside it."""
        return self.backbone[0]

    @property
    def encoder_layers(self) -> nn.ModuleList:
        return self.transformer.encoder.layers

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.transformer.decoder.layers

    def encode(self, images: NestedTensor) -> Encoded:
        raise NotImplementedError

    def queries(self, encoded: Encoded) -> Queries:
        """The matching queries."""
        raise NotImplementedError

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        """`blocked` (N, N) is the self-attention mask of all N queries, True = blocked."""
        raise NotImplementedError

    def classify(self, states: Tensor) -> Tensor:
        """The decoder layers' states (L, B, N, D) -> logits (L, B, N, C)."""
        raise NotImplementedError

    def forward(
        self,
        images: NestedTensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> Outputs:
        """Images, normalised, as a batch (B, 3, H, W) with its mask or as a list of (3, H, W).

        In training, targets, for each image "labels" (n,) and "boxes" (n, 4) cxcywh in [0, 1], add
        denoising queries, whose predictions are in the output's "dn" and nowhere else.
        """
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        encoded = self.encode(images)
        queries = self.queries(encoded)
        content, anchors, blocked, dn = queries.content, queries.anchors, None, None
        if self.training and targets is not None and self.prepare_denoising is not None:
            prepared = self.prepare_denoising(targets, self.label_enc, anchors, content)
            content, anchors, blocked, dn = prepared
        decoded = self.decode(content, anchors, blocked, encoded)
        logits, boxes = dn_post_process(self.classify(decoded.states), decoded.boxes, dn)
        layers: list[LayerOutputs] = [
            {"pred_logits": x, "pred_boxes": b} for x, b in zip(logits, boxes, strict=True)
        ]
        matching = slice(-logits.shape[2], None)
        outputs = queries.outputs | {
            **layers[-1],
            "aux_outputs": layers[:-1],
            "states": decoded.states[:, :, matching],
            "encoded": encoded,
        }
        if decoded.anchors is not None:
            outputs["anchors"] = decoded.anchors[:, :, matching]
        return cast(Outputs, outputs if dn is None else outputs | {"dn": dn})
