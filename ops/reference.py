"""Multi-scale deformable attention in plain PyTorch: any device, any floating-point dtype.

Each query's output of a head is a weighted sum of up to 4 * L * P rows of `value`: a bag of
embeddings. The four pixels around each location become row indices and weights, and `embedding_bag`
sums the rows without materialising them. Level sizes stay tensors, to avoid synchronisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**20  # elements of the largest temporary tensor in the backward pass


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Same as `ops.ms_deform_attn`, differentiable once by autograd; no size may be 0. Half types
    are computed in float32."""
    B, _, M, D = value.shape
    inputs = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    rows, index, weights, _, _ = _bags(*inputs)
    output = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    return output.view(B, -1, M * D).to(value.dtype)


def ms_deform_attn_by_gathers(*inputs: Tensor) -> Tensor:
    """Same as `ms_deform_attn_reference`, in operators that ONNX has. The four pixels around the
    locations are gathered in turn, B * Q * M * L * P * D numbers at a time."""
    value, _, _, locations, _ = inputs
    rows, index, weights, _, _ = _bags(*inputs)
    index, weights = (t.unflatten(1, (-1, 4)) for t in (index, weights))  # (B * Q * M, L * P, 4)
    pixels = [weights[:, None, :, i] @ F.embedding(index[..., i], rows) for i in range(4)]
    output = pixels[0] + pixels[1] + pixels[2] + pixels[3]
    return output.view(*locations.shape[:2], -1).to(value.dtype)


def ms_deform_attn_reference_backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of value, sampling locations and attention weights, in their dtypes."""
    value, shapes, _, locations, attention_weights = inputs
    D = value.shape[-1]
    rows, indices, weights, axis_weights, slopes = _bags(*inputs)
    grad_rows = torch.zeros_like(rows)
    grad_bags = grad_output.to(rows.dtype).reshape(-1, D)
    products = torch.empty_like(weights)  # of each pixel and its query's gradient
    bag = weights.shape[1]
    step = max(1, _CHUNK // (D * bag))
    buffer = rows.new_empty(min(step, len(weights)) * bag, D)
    for first in range(0, len(weights), step):
        chunk = slice(first, first + step)
        index, grad = indices[chunk].flatten().long(), grad_bags[chunk]
        flat = buffer[: len(index)]
        sampled = flat.view(len(grad), bag, D)
        torch.index_select(rows, 0, index, out=flat)
        torch.bmm(sampled, grad[:, :, None], out=products[chunk, :, None])
        torch.mul(weights[chunk, :, None], grad[:, None], out=sampled)
        # On the CPU scatter_add_ sorts an expanded index, which is much faster than index_add_.
        grad_rows.scatter_add_(0, index[:, None].expand(-1, D), flat)

    # The derivative in x weights the rows by y, and vice versa.
    above, below = products.view(*locations.shape[:-1], 2, 2).unbind(-2)
    x_weights, y_weights = axis_weights.unbind(-2)
    by_column = above * y_weights[..., :1] + below * y_weights[..., 1:]
    by_row = torch.stack([_sum_of_two(above * x_weights), _sum_of_two(below * x_weights)], dim=-1)
    slope = _sum_of_two(torch.stack([by_column, by_row], dim=-2) * slopes)
    slope = attention_weights.to(rows.dtype)[..., None] * slope * shapes.flip(-1)[:, None]
    return (
        grad_rows.view(value.shape).to(value.dtype),
        slope.to(locations.dtype),
        _sum_of_two(by_row * y_weights).to(attention_weights.dtype),
    )


def _sum_of_two(tensor: Tensor) -> Tensor:
    """tensor.sum(-1) for a last axis of size 2, for which torch's is slow."""
    return tensor[..., 0] + tensor[..., 1]


def _bags(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The op as bags of embeddings, in the dtype used for computation, and its derivatives.

    A pixel outside the level becomes pixel 0 with weight and slope 0, and so do all pixels of a
    location that is NaN, or outside by a pixel or more.

    Returns:
        rows (B * S * M, D), one for each pixel and head.
        index and weights (B * Q * M, L * P * 4) of the rows in each bag; the four of a location in
            the order 00, 01, 10, 11 as (y, x).
        axis_weights and slopes (B, Q, M, L, P, 2, 2): for both axes, x and y, the linear weights of
            the two pixels next to a location, and their derivatives w.r.t. its position in pixels.
    """
    value, shapes, starts, locations, attention = inputs
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    size = shapes.flip(-1)[:, None]  # (L, 1, 2), width and height
    position = locations.to(dtype) * size - 0.5  # align_corners=False
    low = position.floor()
    fraction = position - low
    pixels = torch.stack([low, low + 1], dim=-1)
    inside = (pixels >= 0) & (pixels < size[..., None]) & (position > -1)[..., None]
    axis_weights = torch.stack([1 - fraction, fraction], dim=-1).where(inside, 0)
    slopes = fraction.new_tensor([-1, 1]).where(inside, 0)

    index_dtype = torch.int32 if B * S * M < 2**31 else torch.int64
    x, y = pixels.where(inside, 0).to(index_dtype).unbind(-2)
    image = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1, 1)
    first = ((image * S + starts[:, None]) * M + head).to(index_dtype)  # (B, 1, M, L, 1)
    stride = (shapes[:, 1] * M).to(index_dtype)[:, None, None]
    index = (first[..., None] + y * stride)[..., :, None] + (x * M)[..., None, :]

    x, y = axis_weights.unbind(-2)
    weights = (attention.to(dtype)[..., None] * y)[..., :, None] * x[..., None, :]
    index, weights = (t.flatten(3).flatten(0, 2) for t in (index, weights))
    return value.to(dtype).reshape(B * S * M, D), index, weights, axis_weights, slopes
