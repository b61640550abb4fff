"""Swin Transformer (Liu et al. 2021) as a backbone, for images of any size.

Its parts are timm's; parameters bear the names of the authors' checkpoints, which DINO's released
ones keep.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from util.nested_tensor import NestedTensor

from .backbone import resize_mask, run_blocks

# Width, blocks of each stage, heads of each stage, window.
SWINS = {
    "swin_T_224_1k": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_B_224_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_B_384_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_L_224_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_L_384_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class Block(SwinTransformerBlock):
    """As in released detectors, pads to whole windows before it shifts, and shifts even one."""

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
        # Released checkpoints hold it, so it has to be saved.
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index)

    def _attn(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same; timm would pad after shifting."""
        (height, width), window = x.shape[1:3], self.window_size[0]
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        return super()._attn(x)[:, :height, :width]


class Swin(nn.Module):
    """The Swin of a released name; `levels` count from 1 (stride 4) to 4 (stride 32).

    `use_checkpoint` saves memory in training by computing every block twice.
    """

    def __init__(self, name: str, levels: list[int], use_checkpoint: bool, drop_path: float = 0.2):
        super().__init__()
        dim, depths, num_heads, window = SWINS[name]
        self.levels, self.use_checkpoint = levels, use_checkpoint
        self.num_channels = [dim * 2 ** (level - 1) for level in levels]
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            embed_dim=dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            dynamic_img_pad=True,
        )
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
            # Without gradient where no feature map depends on it.
            layer.requires_grad_(stage < max(levels))
            if "downsample" in layer:
                layer["downsample"].requires_grad_(stage + 1 < max(levels))
            self.layers.append(layer)
        for level, width in zip(levels, self.num_channels, strict=True):
            self.add_module(f"norm{level - 1}", nn.LayerNorm(width))

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Images (B, 3, H, W) -> a feature map (B, C, H / stride, W / stride) and mask a level."""
        x = self.patch_embed(images.tensors)
        features = []
        for stage, layer in enumerate(self.layers[: max(self.levels)]):
            x = run_blocks(layer["blocks"], x, twice=self.use_checkpoint and self.training)
            if stage + 1 in self.levels:
                feature = self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2)
                features.append(NestedTensor(feature, resize_mask(images.mask, feature)))
            if stage + 1 < max(self.levels):
                x = layer["downsample"](x)
        return features
