"""Swin Transformer (Liu et al. 2021) as a backbone, for images of any size.

Its parts are timm's; parameters have the names of the authors' checkpoints, which DINO's released
ones keep.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from ..options import ModelOptions
from .base import Backbone, run_blocks

DROP_PATH = 0.2  # stochastic depth of the last block; the rate grows linearly from 0


class Variant(NamedTuple):
    dim: int  # of the first stage; a head has 32 channels
    depth: int  # blocks of the third stage; the others have 2
    window: int
    weights_file: str  # of the authors


VARIANTS = {
    "swin_T_224_1k": Variant(96, 6, 7, "swin_tiny_patch4_window7_224.pth"),
    "swin_B_224_22k": Variant(128, 18, 7, "swin_base_patch4_window7_224_22k.pth"),
    "swin_B_384_22k": Variant(128, 18, 12, "swin_base_patch4_window12_384.pth"),
    "swin_L_224_22k": Variant(192, 18, 7, "swin_large_patch4_window7_224_22k.pth"),
    "swin_L_384_22k": Variant(192, 18, 12, "swin_large_patch4_window12_384_22k.pth"),
}


class Block(SwinTransformerBlock):
    """As in released detectors, pads to whole windows before it shifts, and shifts even if there is
    only one window; timm's pads after shifting."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float):
        super().__init__(
            dim,
            (window, window),
            num_heads,
            window_size=window,
            shift_size=shift,
            always_partition=True,
            dynamic_mask=True,
            drop_path=drop_path,
        )
        # Released checkpoints contain it, so it has to be saved.
        name = "relative_position_index"
        self.attn.register_buffer(name, self.attn.get_buffer(name))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same."""
        (height, width), window, shift = x.shape[1:3], self.window_size, self.shift_size
        y = F.pad(self.norm1(x), (0, 0, 0, -width % window[1], 0, -height % window[0]))
        y = y.roll([-s for s in shift], (1, 2))
        windows = window_partition(y, window).flatten(1, 2)
        windows = self.attn(windows, mask=self.get_attn_mask(y)).unflatten(1, window)
        y = window_reverse(windows, window, *y.shape[1:3]).roll(shift, (1, 2))
        x = x + self.drop_path1(y[:, :height, :width])
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Swin(Backbone):
    """The Swin of a released name."""

    def __init__(self, options: ModelOptions, levels: list[int]):
        super().__init__()
        dim, depth, window, _ = VARIANTS[options.backbone]
        depths = (2, 2, depth, 2)
        self.levels, self.recompute = levels, options.use_checkpoint
        self.num_channels = [dim * 2 ** (level - 1) for level in levels]
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            embed_dim=dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            dynamic_img_pad=True,
        )
        rates = iter(torch.linspace(0, DROP_PATH, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            width, shifts = dim * 2**stage, [(window // 2) * (i % 2) for i in range(depth)]
            blocks = [Block(width, width // 32, window, shift, next(rates)) for shift in shifts]
            layer = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
            if stage + 1 < len(depths):
                layer["downsample"] = PatchMerging(width)
            # Frozen where no feature map depends on it.
            layer.requires_grad_(stage < max(levels))
            if "downsample" in layer:
                layer["downsample"].requires_grad_(stage + 1 < max(levels))
            self.layers.append(layer)
        for level, width in zip(levels, self.num_channels, strict=True):
            self.add_module(f"norm{level - 1}", nn.LayerNorm(width))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(images), []
        for stage, layer in enumerate(self.layers[: max(self.levels)]):
            blocks = layer.get_submodule("blocks")
            x = run_blocks(blocks, x, self.recompute)
            if stage + 1 in self.levels:
                maps.append(self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2))
            if stage + 1 < max(self.levels):
                x = layer.get_submodule("downsample")(x)
        return maps
