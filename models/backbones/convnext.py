"""ConvNeXt (Liu et al. 2022) as a backbone, under the names of the authors' checkpoints.

Without stochastic depth, which DINO's released training does not use here.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..options import ModelOptions
from .base import Backbone, run_blocks


class Variant(NamedTuple):
    dim: int  # of the first stage, doubled at every next one
    depths: tuple[int, ...]  # blocks of each stage
    weights_file: str  # of the authors


VARIANTS = {"convnext_xlarge_22k": Variant(256, (3, 3, 27, 3), "convnext_xlarge_22k_224.pth")}


class Block(nn.Module):
    """A 7x7 convolution of each channel, then a feed-forward block scaled by `gamma`."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(Backbone):
    """The ConvNeXt of a released name.

    Released models have an output norm for every level; that of an unused one gets zero gradients.
    """

    def __init__(self, options: ModelOptions, levels: list[int]):
        super().__init__()
        dim, depths, _ = VARIANTS[options.backbone]
        dims = [dim * 2**stage for stage in range(len(depths))]
        self.levels, self.recompute = levels, options.use_checkpoint
        self.num_channels = [dims[level - 1] for level in levels]
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in pairwise(dims):
            conv = nn.Conv2d(narrow, wide, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(narrow), conv))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        for stage in range(max(levels), len(dims)):  # no feature map depends on it
            self.downsample_layers[stage].requires_grad_(False)
            self.stages[stage].requires_grad_(False)
        for stage, dim in enumerate(dims):
            self.add_module(f"norm{stage}", LayerNorm2d(dim))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps, unused = images, [], torch.zeros(())
        stages = zip(self.downsample_layers, self.stages, strict=True)
        for stage, (downsample, blocks) in enumerate(stages):
            if stage < max(self.levels):
                x = run_blocks(blocks, downsample(x), self.recompute)
            norm = self.get_submodule(f"norm{stage}")
            if stage + 1 in self.levels:
                maps.append(norm(x))
            else:  # DDP waits for every parameter's gradient
                unused = unused + 0 * sum(p.sum() for p in norm.parameters())
        maps[-1] = maps[-1] + unused
        return maps
