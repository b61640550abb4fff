"""The base of all backbones: an image batch in, feature maps of the chosen stages out."""

from torch import Tensor, nn

from ..nested_tensor import NestedTensor, resize_mask
from ..recompute import run


class Backbone(nn.Module):
    """Levels count from 1, the first stage (stride 4), to 4 (stride 32).

    `num_channels` lists the channels of the chosen levels, in the order of `feature_maps`.
    """

    num_channels: list[int]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> a map (B, C, H / stride, W / stride) of every chosen level."""
        raise NotImplementedError

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """The feature maps, each with the padding mask at its size."""
        maps = self.feature_maps(images.tensors)
        return [NestedTensor(x, resize_mask(images.mask, x)) for x in maps]


def run_blocks(blocks: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """x through all of a container's blocks; for `recompute` see there."""
    for block in blocks.children():
        x = run(block, recompute, x)
    return x
