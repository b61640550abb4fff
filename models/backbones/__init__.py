"""Backbones: image batches in, feature maps out. `BACKBONES` is the registry."""

from collections.abc import Callable
from typing import NamedTuple

import timm

from ..errors import UserError, nearest
from ..options import ModelOptions
from . import convnext, swin
from .base import Backbone
from .convnext import ConvNeXt
from .resnet import ResNet
from .swin import Swin
from .timm_model import PREFIX, TimmModel


class BackboneSpec(NamedTuple):
    """A backbone's class; the name of its authors' file of ImageNet weights, if neither torchvision
    nor timm downloads them; whether its last stage can keep stride 16 (DC5)."""

    build: Callable[[ModelOptions, list[int]], Backbone]
    weights_file: str = ""
    can_dilate: bool = False


BACKBONES = {
    "resnet18": BackboneSpec(ResNet),
    "resnet34": BackboneSpec(ResNet),
    "resnet50": BackboneSpec(ResNet, can_dilate=True),
    "resnet101": BackboneSpec(ResNet, can_dilate=True),
    **{name: BackboneSpec(Swin, v.weights_file) for name, v in swin.VARIANTS.items()},
    **{name: BackboneSpec(ConvNeXt, v.weights_file) for name, v in convnext.VARIANTS.items()},
}


def find_backbone(name: str) -> BackboneSpec:
    """The registry's entry of a name, or that of timm/NAME. UserError with the nearest name."""
    if name.startswith(PREFIX):
        if not timm.is_model(name.removeprefix(PREFIX)):
            near = nearest(name, [f"{PREFIX}{m}" for m in timm.list_models()])
            raise UserError(f"backbone: timm has no model {name}{near}")
        return BackboneSpec(TimmModel, can_dilate=True)
    if name not in BACKBONES:
        raise UserError(f"backbone: unknown {name}{nearest(name, BACKBONES)} Or use timm/NAME")
    return BACKBONES[name]


def build_backbone(options: ModelOptions) -> Backbone:
    """The backbone with feature maps of `options.return_interm_indices`; random weights.

    A ResNet that is to get pretrained weights has its stem and first stage frozen, as published.
    """
    levels = [index + 1 for index in options.return_interm_indices]
    if options.masks:  # the mask head needs the finer ones too
        levels = list(range(1, levels[-1] + 1))
    backbone = find_backbone(options.backbone).build(options, levels)
    stem = ("body.conv1", "body.bn1", "body.layer1") if options.pretrained_backbone else ()
    for name, parameter in backbone.named_parameters():
        keywords = (keyword in name for keyword in options.backbone_freeze_keywords)
        if name.startswith(stem) or any(keywords):
            parameter.requires_grad_(False)
    return backbone
