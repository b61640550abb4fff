"""A batch of images of different sizes: padded tensors and the mask of the padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class NestedTensor:
    """`tensors` (B, C, H, W), zero where padded; `mask` (B, H, W), True on padding."""

    tensors: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        return NestedTensor(
            self.tensors.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> NestedTensor:
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())


def nested_tensor_from_tensor_list(images: Sequence[Tensor]) -> NestedTensor:
    """Pad images (C, H_i, W_i) at the bottom and right to the largest height and width."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    tensors = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=tensors.device)
    for i, image in enumerate(images):
        _, h, w = image.shape
        tensors[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return NestedTensor(tensors, mask)


def resize_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The padding mask (B, H, W) at the size of the feature map `like`, nearest neighbour."""
    return F.interpolate(mask[None].float(), size=like.shape[-2:]).bool()[0]
