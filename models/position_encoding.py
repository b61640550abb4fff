"""Sine encodings: of the pixels of a feature map, and of anchor boxes."""

import math

import torch
from torch import Tensor, nn

from .options import ModelOptions


def sine_embedding(position: Tensor, dim: int, temperature: float = 10000) -> Tensor:
    """Embed numbers (...) in radians as (..., dim): sin and cos interleaved, slower and slower."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    angle = position[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def anchor_embedding(anchors: Tensor, dim: int) -> Tensor:
    """Sine embedding of anchors (..., 4), cxcywh in [0, 1]: (..., 4 * dim), in order y, x, w, h; of
    points (..., 2): (..., 2 * dim).

    DAB-DETR section 3.2; the first half, y and x, is what cross-attention compares with the pixels.
    """
    x, y, *size = (2 * math.pi * anchors.float()).unbind(-1)
    return sine_embedding(torch.stack([y, x, *size], dim=-1), dim).flatten(-2).to(anchors.dtype)


class SinePositionEncoding(nn.Module):
    """Encoding of every pixel of a feature map: D/2 numbers for y, then D/2 for x.

    A coordinate counts the unmasked pixels up to this one, shifted by `pe_offset`, and is divided
    by the image's own extent, so that it runs to 2 pi over the image without its padding.
    """

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.dim, self.offset = options.hidden_dim, options.pe_offset
        self.temperature_h, self.temperature_w = options.pe_temperatureH, options.pe_temperatureW

    def forward(self, mask: Tensor) -> Tensor:
        """Padding mask (B, H, W) -> (B, H, W, D), in fp32."""
        inside = (~mask).float()
        y, x = inside.cumsum(1), inside.cumsum(2)
        y = (y + self.offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        half = self.dim // 2
        y = sine_embedding(y, half, self.temperature_h)
        x = sine_embedding(x, half, self.temperature_w)
        return torch.cat([y, x], dim=-1)
