"""What all detectors have in common: their heads, their denoising and their forward pass."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from util.config import Config
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

from .attention import MLP
from .dn_components import (
    dn_post_process,
    inverse_sigmoid,
    prepare_for_cdn,
    prepare_for_cdn_of_dn_detr,
    prepare_for_dn,
)


def class_head(cfg: Config) -> nn.Linear:
    """A linear classifier that begins by calling everything background."""
    head = nn.Linear(cfg.hidden_dim, cfg.num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(cfg: Config) -> MLP:
    """The refinement of an anchor; begins at none."""
    head = MLP(cfg.hidden_dim, cfg.hidden_dim, 4, 3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


@torch.no_grad()
def spread_centres(anchors: nn.Embedding) -> None:
    """Have learned anchors (Q, 4), which are kept before the sigmoid, begin anywhere in the image.
    They do train, as in the released code, whose option means to freeze their centres."""
    anchors.weight[:, :2] = inverse_sigmoid(torch.rand(anchors.num_embeddings, 2))


def denoising(cfg: Config) -> Callable | None:
    """What puts denoising queries in front of the others, with its noise set; None without."""
    if not cfg.use_dn:
        return None
    noise = {
        "label_noise_ratio": cfg.dn_label_noise_ratio,
        "box_noise_scale": cfg.dn_box_noise_scale,
    }
    # DINO's released code doubles the number that it is given.
    number = 2 * cfg.dn_number if cfg.modelname == "dino" else cfg.dn_number
    if not cfg.contrastive:
        return partial(prepare_for_dn, num_groups=number, **noise)
    if cfg.modelname == "dn_dab_dino_deformable_detr":
        return partial(prepare_for_cdn_of_dn_detr, num_denoising=number, **noise)
    noise["num_classes"] = cfg.num_classes  # label_enc may have more rows
    return partial(prepare_for_cdn, num_denoising=number, **noise)


class Detector(nn.Module):
    """A DETR whose queries are anchors. Attributes of its subclasses keep the released names, so
    that released checkpoints load as they are.

    They have `backbone`, the features and their position encoding; `transformer`; `label_enc`,
    embeddings of the labels that denoising restores, or None; and the methods below.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.prepare_denoising = denoising(cfg)

    def encode(self, images: NestedTensor) -> tuple:
        """What the decoder attends to: the last of its arguments, memory (B, S, D) first, or a list
        of levels of each."""
        raise NotImplementedError

    def queries(self, batch_size: int, *encoded) -> tuple[Tensor, Tensor, dict]:
        """Content (B, Q, D), anchors (B, Q, 4) before the sigmoid, and what else the detector
        returns, from what `encode` gave."""
        raise NotImplementedError

    def classify(self, states: Tensor) -> Tensor:
        """The decoder layers' (L, B, Q, D) -> logits (L, B, Q, C)."""
        raise NotImplementedError

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
        encoded = self.encode(images)
        content, anchors, outputs = self.queries(len(images.mask), *encoded)
        allowed, dn = None, None
        if self.training and targets is not None and self.prepare_denoising is not None:
            prepared = self.prepare_denoising(targets, self.label_enc, anchors, content)
            content, anchors, blocked, dn = prepared
            allowed = None if blocked is None else ~blocked
        states, boxes, anchors = self.transformer.decoder(content, anchors, allowed, *encoded)
        logits, boxes = dn_post_process(self.classify(states), boxes, dn)
        layers = [{"pred_logits": x, "pred_boxes": b} for x, b in zip(logits, boxes, strict=True)]
        anchors = anchors[:, :, -logits.shape[2] :]
        outputs |= {**layers[-1], "aux_outputs": layers[:-1], "anchors": anchors}
        return outputs if dn is None else {**outputs, "dn": dn}
