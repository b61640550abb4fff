"""Multi-scale deformable attention in plain PyTorch: any device, any floating type.

Every query of a head is a weighted sum of at most 4 * L * P rows of `value`: a bag of embeddings.
The four pixels around each location become row numbers and weights, and `embedding_bag` adds the
rows without ever holding them. Nothing waits for a device: the sizes of the levels stay tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary tensor in the backward pass.
_CHUNK = 2**22


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """What `ops.ms_deform_attn` defines, for the same arguments; no size may be 0.

    Autograd differentiates it, as often as asked. Half types are computed in float32.
    """
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels, (y_weights, _), (x_weights, _) = _four_pixels(
        value, spatial_shapes, level_start_index, sampling_locations.to(dtype)
    )
    weights = _corner_weights(attention_weights.to(dtype), y_weights, x_weights)
    rows = value.to(dtype).reshape(B * S * M, D)
    output = F.embedding_bag(pixels, rows, mode="sum", per_sample_weights=weights)
    return output.view(B, -1, M * D).to(value.dtype)


def ms_deform_attn_reference_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, sampling locations and attention weights, in their types."""
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels, (y_weights, y_slopes), (x_weights, x_slopes) = _four_pixels(
        value, spatial_shapes, level_start_index, sampling_locations.to(dtype)
    )
    attention = attention_weights.to(dtype)
    weights = _corner_weights(attention, y_weights, x_weights)
    rows = value.to(dtype).reshape(B * S * M, D)
    grad_rows = torch.zeros_like(rows)
    grad_bags = grad_output.to(dtype).reshape(-1, D)
    products = torch.empty_like(weights)  # of each pixel with the gradient of its query
    step = max(1, _CHUNK // (D * weights.shape[1]))
    for first in range(0, len(weights), step):
        some = slice(first, first + step)
        index, grad = pixels[some].flatten(), grad_bags[some]
        sampled = rows.index_select(0, index).view(len(grad), -1, D)
        torch.bmm(sampled, grad[:, :, None], out=products[some, :, None])
        torch.mul(weights[some, :, None], grad[:, None], out=sampled)
        grad_rows.index_add_(0, index, sampled.flatten(0, 1))

    products = products.view(*attention.shape, 2, 2)  # (..., y, x)
    by_row = (products * x_weights[..., None, :]).sum(-1)
    by_column = (products * y_weights[..., :, None]).sum(-2)
    height, width = spatial_shapes[:, 0, None], spatial_shapes[:, 1, None]
    grad_x = attention * width * (by_column * x_slopes).sum(-1)
    grad_y = attention * height * (by_row * y_slopes).sum(-1)
    return (
        grad_rows.view(value.shape).to(value.dtype),
        torch.stack([grad_x, grad_y], dim=-1).to(sampling_locations.dtype),
        (by_row * y_weights).sum(-1).to(attention_weights.dtype),
    )


def _four_pixels(value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor):
    """Rows of value.reshape(B * S * M, D), (B * Q * M, L * P * 4) in the order 00, 01, 10, 11 as
    (y, x), and for y and x what `_two_pixels` says of weights and slopes."""
    B, S, M, _ = value.shape
    height, width = spatial_shapes[:, 0, None], spatial_shapes[:, 1, None]  # (L, 1), against (L, P)
    x, y = locations.unbind(-1)
    rows, *of_y = _two_pixels(y, height)
    columns, *of_x = _two_pixels(x, width)
    integer = torch.int32 if B * S * M < 2**31 else torch.int64
    image = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1, 1)
    first = ((image * S + starts[:, None]) * M + head).to(integer)  # (B, 1, M, L, 1)
    rows = first[..., None] + rows.to(integer) * (width * M).to(integer)[..., None]
    pixels = rows[..., :, None] + columns.to(integer)[..., None, :] * M
    return pixels.flatten(3).flatten(0, 2), of_y, of_x


def _corner_weights(attention: Tensor, y_weights: Tensor, x_weights: Tensor) -> Tensor:
    """Attention weight times bilinear weight, as the rows of `_four_pixels` are ordered."""
    weights = (attention[..., None] * y_weights)[..., :, None] * x_weights[..., None, :]
    return weights.flatten(3).flatten(0, 2)


def _two_pixels(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels (..., 2) beside a location on one axis, their linear weights, and the slopes
    of these with the location in pixels.

    A pixel outside the axis becomes pixel 0 with weight and slope 0, and so does everything about a
    location that is NaN, or outside by a pixel or more.
    """
    position = location * size - 0.5  # align_corners=False: pixel i has its centre at i + 0.5
    low = position.floor()
    fraction = position - low
    pixels = torch.stack([low, low + 1], dim=-1)
    weights = torch.stack([1 - fraction, fraction], dim=-1)
    slopes = torch.tensor([-1, 1], dtype=location.dtype, device=location.device)
    inside = (pixels >= 0) & (pixels < size[..., None]) & (position > -1)[..., None]
    return (
        torch.where(inside, pixels, 0),
        torch.where(inside, weights, 0),
        torch.where(inside, slopes, 0),
    )
