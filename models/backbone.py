"""Backbones: an image batch in, feature maps of chosen levels out."""

from __future__ import annotations

import timm
import torch.nn.functional as F
import torchvision
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from util.nested_tensor import NestedTensor

NORMS = {
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
}
TIMM = "timm/"
TIMM_NORMS = {  # a timm model brings its own normalisation; only BatchNorm is exchanged
    "FrozenBatchNorm2d": freeze_batch_norm_2d,
    "BatchNorm2d": lambda body: body,
    "SyncBatchNorm": convert_sync_batchnorm,
}


class Backbone(nn.Module):
    """A ResNet of torchvision, or any timm model that gives feature maps, as `body`.

    `levels` counts from 1, the first stage of a ResNet (stride 4), to 4 (stride 32); `num_channels`
    lists the channels of the levels asked for. `dilation` keeps the last stage at stride 16 (DC5).
    With pretrained weights and frozen statistics, the stem and the first stage of a ResNet stay
    as they are, as published; a `trainable=False` backbone stays so as a whole.
    """

    def __init__(
        self,
        name: str,
        levels: list[int],
        dilation: bool = False,
        norm: str = "FrozenBatchNorm2d",
        freeze_stem: bool = True,
        trainable: bool = True,
    ):
        super().__init__()
        if name.startswith(TIMM):
            body = timm.create_model(
                name.removeprefix(TIMM),
                pretrained=False,
                features_only=True,
                out_indices=[level - 5 for level in levels],
                **({"output_stride": 16} if dilation else {}),
            )
            self.num_channels = body.feature_info.channels()
            self.body = TIMM_NORMS[norm](body)
        else:
            shallow = name in ("resnet18", "resnet34")
            resnet = torchvision.models.get_model(
                name,
                weights=None,
                norm_layer=NORMS[norm],
                **({} if shallow else {"replace_stride_with_dilation": [False, False, dilation]}),
            )
            stages = {f"layer{level}": str(i) for i, level in enumerate(levels)}
            self.body = IntermediateLayerGetter(resnet, return_layers=stages)
            width = 64 if shallow else 256
            self.num_channels = [width * 2 ** (level - 1) for level in levels]
        frozen = ("conv1", "bn1", "layer1") if freeze_stem else ()
        for parameter_name, parameter in self.body.named_parameters():
            if not trainable or parameter_name.startswith(frozen):
                parameter.requires_grad_(False)

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Images (B, 3, H, W) -> a feature map (B, C, H / stride, W / stride) and mask a level."""
        features = self.body(images.tensors)
        features = features.values() if isinstance(features, dict) else features
        return [NestedTensor(x, resize_mask(images.mask, x)) for x in features]


def resize_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The padding mask (B, H, W) at the size of the feature map `like`, nearest neighbour."""
    return F.interpolate(mask[None].float(), size=like.shape[-2:]).bool()[0]
