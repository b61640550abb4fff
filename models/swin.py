"""Swin Transformer (Liu et al. 2021) as a backbone, for images of any size.

The attention inside shifted windows and the merging of patches are torchvision's; parameters bear
the names of the authors' checkpoints, which DINO's released ones keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import PatchMerging, shifted_window_attention

from util.nested_tensor import NestedTensor

from .backbone import resize_mask

# Width, blocks of each stage, heads of each stage, window.
SWINS = {
    "swin_T_224_1k": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_B_224_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_B_384_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_L_224_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_L_384_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class WindowAttention(nn.Module):
    """Attention inside windows of `window` x `window` pixels, moved by `shift`."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        reach = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(reach**2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[:, None] - place[None] + window - 1  # (y, x), from 0 to 2 * window - 2
        self.register_buffer("relative_position_index", offset[..., 0] * reach + offset[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index]
        return shifted_window_attention(
            x,
            self.qkv.weight,
            self.proj.weight,
            bias.permute(2, 0, 1)[None],
            [self.window] * 2,
            self.num_heads,
            [self.shift] * 2,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels; the image is padded to whole ones."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / 4, W / 4, D), rounded up."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """The Swin of a released name; `levels` count from 1 (stride 4) to 4 (stride 32).

    `use_checkpoint` saves memory in training by computing every block twice.
    """

    def __init__(self, name: str, levels: list[int], use_checkpoint: bool, drop_path: float = 0.2):
        super().__init__()
        dim, depths, num_heads, window = SWINS[name]
        self.levels, self.use_checkpoint = levels, use_checkpoint
        self.num_channels = [dim * 2 ** (level - 1) for level in levels]
        self.patch_embed = PatchEmbed(dim)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width = dim * 2**stage
            blocks = [
                Block(width, heads, window, (window // 2) * (i % 2), next(rates))
                for i in range(depth)
            ]
            layer = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
            if stage + 1 < len(depths):
                layer["downsample"] = PatchMerging(width)
            self.layers.append(layer)
        for level, width in zip(levels, self.num_channels, strict=True):
            self.add_module(f"norm{level - 1}", nn.LayerNorm(width))

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Images (B, 3, H, W) -> a feature map (B, C, H / stride, W / stride) and mask a level."""
        x = self.patch_embed(images.tensors)
        features = []
        for stage, layer in enumerate(self.layers):
            for block in layer["blocks"]:
                if self.use_checkpoint and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if stage + 1 in self.levels:
                feature = self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2)
                features.append(NestedTensor(feature, resize_mask(images.mask, feature)))
            if "downsample" in layer:
                x = layer["downsample"](x)
        return features
