"""ResNets (He et al. 2015), torchvision's, with DETR's choice of norms."""

import torch
import torchvision
from torch import Tensor, nn

from ..options import ModelOptions
from .base import Backbone, run_blocks


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, in one pass over the feature map instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


NORMS = {
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
}


class ResNet(Backbone):
    """One of torchvision's ResNets by its name there, its layers as `body`."""

    def __init__(self, options: ModelOptions, levels: list[int]):
        super().__init__()
        small = options.backbone in ("resnet18", "resnet34")  # basic blocks, without dilation
        dilation = (
            {} if small else {"replace_stride_with_dilation": [False, False, options.dilation]}
        )
        norm = NORMS[options.batch_norm_type]
        resnet = torchvision.models.get_model(options.backbone, norm_layer=norm, **dilation)
        self.body = nn.ModuleDict()
        for name, layer in resnet.named_children():
            self.body[name] = layer
            if name == f"layer{max(levels)}":
                break
        self.levels = levels
        # Other norms would count a batch twice.
        self.recompute = options.use_checkpoint and norm is FrozenBatchNorm2d
        self.num_channels = [(64 if small else 256) * 2 ** (level - 1) for level in levels]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for name, layer in self.body.items():
            x = run_blocks(layer, x, self.recompute) if name.startswith("layer") else layer(x)
            if name in (f"layer{level}" for level in self.levels):
                maps.append(x)
        return maps
