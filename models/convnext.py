"""ConvNeXt (Liu et al. 2022) as a backbone, under the names of the authors' checkpoints."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.nested_tensor import NestedTensor

from .backbone import resize_mask

# Width and blocks of each stage.
CONVNEXTS = {"convnext_xlarge_22k": ((256, 512, 1024, 2048), (3, 3, 27, 3))}


class Block(nn.Module):
    """A 7x7 convolution of each channel, then a feed-forward block scaled by `gamma`."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """The ConvNeXt of a released name; `levels` count from 1 (stride 4) to 4 (stride 32).

    Checkpoints have an output norm for every level, used or not: the unused ones are not trained.
    `use_checkpoint` saves memory in training by computing every block twice.
    """

    def __init__(self, name: str, levels: list[int], use_checkpoint: bool, drop_path: float = 0.2):
        super().__init__()
        dims, depths = CONVNEXTS[name]
        self.levels, self.use_checkpoint = levels, use_checkpoint
        self.num_channels = [dims[level - 1] for level in levels]
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in pairwise(dims):
            conv = nn.Conv2d(narrow, wide, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(narrow), conv))
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates)) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        for stage, dim in enumerate(dims):
            norm = LayerNorm2d(dim).requires_grad_(stage + 1 in levels)
            self.add_module(f"norm{stage}", norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Images (B, 3, H, W) -> a feature map (B, C, H / stride, W / stride) and mask a level."""
        x = images.tensors
        features = []
        for stage, (downsample, blocks) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = downsample(x)
            for block in blocks:
                if self.use_checkpoint and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if stage + 1 in self.levels:
                feature = self.get_submodule(f"norm{stage}")(x)
                features.append(NestedTensor(feature, resize_mask(images.mask, feature)))
        return features
