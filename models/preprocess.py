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
    """(3, H, W) uint8 -> float32 with ImageNet's mean and standard deviation."""
    # Contiguous first: arithmetic on channels-last floats is several times slower. NumPy copies
    # single bytes in half of torch's time.
    planes = np.ascontiguousarray(image) if image.device.type == "cpu" else image.contiguous()
    image = F.to_dtype(torch.as_tensor(planes), torch.float32, scale=True)
    return F.normalize(image, IMAGENET_MEAN, IMAGENET_STD, inplace=True)


def resized_size(height: int, width: int, size: int, max_size: int | None = None) -> list[int]:
    """[height, width] with the shorter side resized to `size`, but the longer at most `max_size`.

    Rounding is as published; torchvision's own rule differs by a pixel here and there.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(round(max_size * short / long), 1)
    return [size if side == short else int(size * side / short) for side in (height, width)]
