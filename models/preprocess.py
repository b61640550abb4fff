"""From an image to a detector's input."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def preprocess(image: Tensor, size: int = 800, max_size: int | None = 1333) -> Tensor:
    """An image (3, H, W) uint8 RGB, resized as in evaluation and normalised, float32."""
    height, width = image.shape[-2:]
    return normalize(F.resize(image, resized_size(height, width, size, max_size), antialias=True))


def normalize(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> float32 with ImageNet's mean and standard deviation, on the CPU."""
    # Arithmetic on channels-last floats is several times slower, so these are separated as bytes,
    # which NumPy copies in half of torch's time. Blocks of rows stay in the cache.
    planes = np.ascontiguousarray(image.cpu())
    normalized = np.empty(planes.shape, np.float32)
    for channel, mean, std in zip(range(3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        for start in range(0, planes.shape[1], 64):
            block = normalized[channel, start : start + 64]
            np.multiply(planes[channel, start : start + 64], 1 / 255, out=block, dtype=np.float32)
            block -= mean
            block /= std
    return torch.from_numpy(normalized)


def resized_size(height: int, width: int, size: int, max_size: int | None = None) -> list[int]:
    """[height, width] with the shorter side resized to `size`, but the longer at most `max_size`.

    Rounding is as published; torchvision's own rule differs by a pixel here and there.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(round(max_size * short / long), 1)
    return [size if side == short else int(size * side / short) for side in (height, width)]
