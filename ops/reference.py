"""Multi-scale deformable attention in plain PyTorch: any device, any floating type.

Every query of a head is a weighted sum of at most 4 * L * P rows of `value`: a bag of embeddings.
The four pixels around each location become row numbers and weights, and `embedding_bag` adds the
rows without ever holding them. Nothing waits for a device: the sizes of the levels stay tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary tensor in the backward pass.
_CHUNK = 2**20


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """What `ops.ms_deform_attn` defines, for the same arguments; no size may be 0.

    Autograd differentiates it too, once. Half types are computed in float32.
    """
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels, weights, _ = _two_pixels(sampling_locations.to(dtype), spatial_shapes)
    output = F.embedding_bag(
        _rows(pixels, value, spatial_shapes, level_start_index),
        value.to(dtype).reshape(B * S * M, D),
        mode="sum",
        per_sample_weights=_corner_weights(weights, attention_weights.to(dtype)),
    )
    return output.view(B, -1, M * D).to(value.dtype)


def ms_deform_attn_reference_backward(
    grad_output: Tensor, *inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, sampling locations and attention weights, in their types."""
    value, spatial_shapes, level_start_index, locations, attention_weights = inputs
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels, axis_weights, slopes = _two_pixels(locations.to(dtype), spatial_shapes)
    attention = attention_weights.to(dtype)
    index_of = _rows(pixels, value, spatial_shapes, level_start_index)
    weights = _corner_weights(axis_weights, attention)
    rows = value.to(dtype).reshape(B * S * M, D)
    grad_rows = torch.zeros_like(rows)
    grad_bags = grad_output.to(dtype).reshape(-1, D)
    products = torch.empty_like(weights)  # of each pixel with the gradient of its query
    bag = weights.shape[1]
    step = max(1, _CHUNK // (D * bag))
    buffer = rows.new_empty(min(step, len(weights)) * bag, D)
    for first in range(0, len(weights), step):
        some = slice(first, first + step)
        index, grad = index_of[some].flatten().long(), grad_bags[some]
        flat = buffer[: len(index)]
        sampled = flat.view(len(grad), bag, D)
        torch.index_select(rows, 0, index, out=flat)
        torch.bmm(sampled, grad[:, :, None], out=products[some, :, None])
        torch.mul(weights[some, :, None], grad[:, None], out=sampled)
        # scatter_add_ sorts an expanded index on the CPU, many times as fast as index_add_.
        grad_rows.scatter_add_(0, index[:, None].expand(-1, D), flat)

    # Along x the two rows are weighted by y, and the other way round.
    above, below = products.view(*attention.shape, 2, 2).unbind(-2)
    x_weights, y_weights = axis_weights.unbind(-2)
    by_column = above * y_weights[..., :1] + below * y_weights[..., 1:]
    by_row = torch.stack([_sum_of_two(above * x_weights), _sum_of_two(below * x_weights)], dim=-1)
    slope = _sum_of_two(torch.stack([by_column, by_row], dim=-2) * slopes)  # in x and in y
    size = _width_height(spatial_shapes, dtype)
    return (
        grad_rows.view(value.shape).to(value.dtype),
        (attention[..., None] * slope * size).to(locations.dtype),
        _sum_of_two(by_row * y_weights).to(attention_weights.dtype),
    )


def _sum_of_two(tensor: Tensor) -> Tensor:
    """tensor.sum(-1), where torch's own is slow: over a last axis of 2."""
    return tensor[..., 0] + tensor[..., 1]


def _width_height(spatial_shapes: Tensor, dtype: torch.dtype) -> Tensor:
    """(L, 1, 2), to stand against locations (..., L, P, 2)."""
    return spatial_shapes.flip(-1)[:, None].to(dtype)


def _two_pixels(locations: Tensor, spatial_shapes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On both axes of locations (..., L, P, 2): the two pixels (..., L, P, 2, 2) beside each, their
    linear weights, and the slopes of these with the location in pixels.

    A pixel outside its axis becomes pixel 0 with weight and slope 0, and so does everything about a
    location that is NaN, or outside by a pixel or more.
    """
    size = _width_height(spatial_shapes, locations.dtype)
    position = locations * size - 0.5  # align_corners=False: pixel i has its centre at i + 0.5
    low = position.floor()
    fraction = position - low
    pixels = torch.stack([low, low + 1], dim=-1)
    weights = torch.stack([1 - fraction, fraction], dim=-1)
    inside = (pixels >= 0) & (pixels < size[..., None]) & (position > -1)[..., None]
    slopes = torch.tensor([-1, 1], dtype=locations.dtype, device=locations.device)
    return tuple(torch.where(inside, t, 0) for t in (pixels, weights, slopes))


def _rows(pixels: Tensor, value: Tensor, spatial_shapes: Tensor, starts: Tensor) -> Tensor:
    """For the pixels of `_two_pixels`, rows of value.reshape(B * S * M, D): (B * Q * M, L * P * 4),
    the four of a location in the order 00, 01, 10, 11 as (y, x)."""
    B, S, M, _ = value.shape
    integer = torch.int32 if B * S * M < 2**31 else torch.int64
    x, y = pixels.to(integer).unbind(-2)
    image = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1, 1)
    first = ((image * S + starts[:, None]) * M + head).to(integer)  # (B, 1, M, L, 1)
    width = spatial_shapes[:, 1, None, None].to(integer)
    y = first[..., None] + y * (width * M)
    return (y[..., :, None] + (x * M)[..., None, :]).flatten(3).flatten(0, 2)


def _corner_weights(axis_weights: Tensor, attention: Tensor) -> Tensor:
    """Attention weight times bilinear weight, in the shape and order of `_rows`."""
    x, y = axis_weights.unbind(-2)
    return ((attention[..., None] * y)[..., :, None] * x[..., None, :]).flatten(3).flatten(0, 2)
