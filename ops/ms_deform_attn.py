"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1).

`ms_deform_attn` dispatches to one of three backends: a PyTorch reference, a C++ kernel for the CPU
and a CUDA kernel. `MSDeformAttn` is the attention module. Both work without compilation.
"""

import functools
import logging
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .reference import ms_deform_attn_reference, ms_deform_attn_reference_backward

_AXES = {  # of the inputs
    "value": "BSMD",
    "spatial_shapes": "L2",
    "level_start_index": "L",
    "sampling_locations": "BQMLP2",
    "attention_weights": "BQMLP",
}
BACKENDS = ("reference", "cpp", "cuda")
_COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # by device type
_VARIABLE = "MS_DEFORM_ATTN_BACKEND"
_log = logging.getLogger(__name__)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sums of values sampled at a few locations in every feature level.

        output[b, q, m] = sum over l, p of weight[b, q, m, l, p] * value_l(location[b, q, m, l, p])

    where value_l, the rows of level l for image b and head m, is interpolated bilinearly with
    zero padding and `align_corners=False`: pixel i is at (i + 0.5) / size. NaN is outside.

    Args:
        value: (B, S, M, D), the concatenated levels, M heads of D channels; float64, float32,
            float16 or bfloat16. Half types are accumulated in float32.
        spatial_shapes: (L, 2) int64, the (height, width) of each level.
        level_start_index: (L,) int64, the first row of each level in `value`.
        sampling_locations: (B, Q, M, L, P, 2), (x, y) in fractions of the level's size.
        attention_weights: (B, Q, M, L, P), not normalised here.
            Both are float64 if and only if `value` is; float32 with a half `value` preserves the
            precision of the locations.

    Returns:
        (B, Q, M * D) with the dtype of `value`.

    Raises:
        ValueError, TypeError: for an argument with the wrong shape, dtype or device, and on the CPU
            for levels that overlap or exceed `value`. On a GPU, where checking would synchronise,
            a level that exceeds `value` makes the output NaN.
        RuntimeError: if `MS_DEFORM_ATTN_BACKEND` forces an unavailable backend, and for second
            derivatives.
    """
    inputs = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    _check(*inputs)
    return _operators.ms_deform_attn(*inputs)


def _check(*inputs: Tensor) -> None:
    """Check dtypes, devices and shapes; an axis gets its size from its first occurrence."""
    value, sizes = inputs[0], {"2": 2}
    for (name, axes), tensor in zip(_AXES.items(), inputs, strict=True):
        if name in ("spatial_shapes", "level_start_index"):
            if tensor.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, not {tensor.dtype}")
        elif tensor.dtype not in native.TYPE_CODES:
            raise TypeError(f"{name} must be float64, 32, 16 or bfloat16, not {tensor.dtype}")
        elif (tensor.dtype == torch.float64) != (value.dtype == torch.float64):
            raise TypeError(f"{name} is {tensor.dtype}, but value is {value.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, but value is on {value.device}")
        pairs = zip(axes, tensor.shape, strict=False)
        if tensor.dim() != len(axes) or any(sizes.setdefault(a, n) != n for a, n in pairs):
            shape = ", ".join(f"{a}={sizes[a]}" if a in sizes and a != "2" else a for a in axes)
            raise ValueError(f"{name} must have shape ({shape}), not {tuple(tensor.shape)}")


def choose_backend(device: torch.device) -> str:
    """The backend for tensors on `device`: MS_DEFORM_ATTN_BACKEND from the environment, else "cpp"
    on a CPU and "cuda" on a GPU if they are built, else "reference". RuntimeError if the variable
    names a backend that is unknown, unavailable or for another device."""
    return _choose(os.environ.get(_VARIABLE), device.type)


@functools.cache
def _choose(forced: str | None, device_type: str) -> str:
    if forced and forced not in BACKENDS:
        raise RuntimeError(f"{_VARIABLE}={forced}: choose one of {', '.join(BACKENDS)}")
    compiled = _COMPILED.get(device_type, "reference")
    backend = forced or compiled
    if backend == "reference":
        return backend
    try:
        native.load(backend)
    except native.Unavailable as error:
        if forced:
            raise RuntimeError(f"{_VARIABLE}={forced}: {error}") from error
        _log.warning("deformable attention uses the slow PyTorch reference: %s", error)
        return "reference"
    if backend != compiled:
        raise RuntimeError(f"{_VARIABLE}={forced} does not support tensors on {device_type}")
    _log.info("deformable attention uses the compiled backend %s", backend)
    return backend


# The operator that torch.compile and torch.export see; it chooses the backend when called. Its
# namespace contains the package name, so that this folder and an installed copy can coexist.

_NAMESPACE = f"dn_dino_{__package__.replace('.', '_')}"
_operators = getattr(torch.ops, _NAMESPACE)
_OP = f"{_NAMESPACE}::ms_deform_attn"
_BACKWARD_OP = f"{_OP}_backward"
_INPUTS = ", ".join(f"Tensor {name}" for name in _AXES)
torch.library.define(_OP, f"({_INPUTS}) -> Tensor")
torch.library.define(_BACKWARD_OP, f"(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor)")


@torch.library.impl(_OP, "default")
def _forward(*inputs):
    _check_levels(*inputs[:3])
    if any(t.numel() == 0 for t in inputs):
        return _fake_forward(*inputs).zero_()
    backend = choose_backend(inputs[0].device)
    if backend == "reference":
        return ms_deform_attn_reference(*inputs)
    return native.forward(backend, *inputs)


@torch.library.impl(_BACKWARD_OP, "default")
def _backward(grad_output, *inputs):
    if any(t.numel() == 0 for t in inputs):
        return tuple(grad.zero_() for grad in _fake_backward(grad_output, *inputs))
    backend = choose_backend(inputs[0].device)
    if backend == "reference":
        return ms_deform_attn_reference_backward(grad_output, *inputs)
    if backend == "cuda" and torch.are_deterministic_algorithms_enabled():
        problem = (
            "the backward pass of ms_deform_attn on CUDA is not deterministic;"
            f" {_VARIABLE}=reference uses torch's operators instead"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(problem)
        _log.warning(problem)
    return native.backward(backend, grad_output, *inputs)


@torch.library.register_fake(_OP)
def _fake_forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    B, _, M, D = value.shape
    return value.new_empty(B, sampling_locations.shape[1], M * D)


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(grad_output, *inputs):
    return tuple(t.new_empty(t.shape) for t in (inputs[0], *inputs[3:]))


def _differentiate(ctx, grad_output):
    grads = _operators.ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
    return grads[0], None, None, *grads[1:]


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError("ms_deform_attn has no second derivative")


torch.library.register_autograd(
    _OP, _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
torch.library.register_autograd(_BACKWARD_OP, _refuse_second_derivative)


def _check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> None:
    """On the CPU: ValueError if levels overlap or exceed `value`."""
    if value.device.type != "cpu":
        return
    end, starts = 0, level_start_index.tolist()
    for (height, width), start in zip(spatial_shapes.tolist(), starts, strict=True):
        if height <= 0 or width <= 0:
            raise ValueError(f"spatial_shapes has a level of {height} x {width} pixels")
        if start < end:
            raise ValueError(f"level_start_index: levels overlap at row {start}, before {end}")
        end = start + height * width
    if end > value.shape[1]:
        raise ValueError(f"spatial_shapes needs {end} rows, but value has {value.shape[1]}")


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query samples `n_points` locations per head and level.

    Sampling offsets and attention weights are linear in the query; values are a projection of the
    memory. Parameters have the released names. Initially, point p of head m is p + 1 pixels away at
    the angle 2 pi m / n_heads, and all weights are equal. Queries, memory and output have `d_model`
    channels, a multiple of `n_heads`. `operator` may be replaced by one that does the same.
    """

    operator = staticmethod(ms_deform_attn)

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values described above."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = F.normalize(torch.stack([angle.cos(), angle.sin()], dim=1), p=math.inf)
        distance = torch.arange(1, self.n_points + 1)
        offsets = (direction[:, None, None] * distance[:, None]).expand(-1, self.n_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for constant in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(constant)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """query (B, Q, D), memory (B, S, D) -> (B, Q, D).

        Args:
            reference_points: (B, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), in fractions
                of each level. With 2, learned offsets are in pixels; with 4, an offset of
                `n_points` is half the size of the box.
            spatial_shapes, level_start_index: the levels of `memory`; see `ms_deform_attn`.
            padding_mask: (B, S) bool, True for padding, whose value becomes zero.
        """
        B, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill_(padding_mask[..., None], 0)
        # One axis for levels, points and (x, y), as arithmetic over short axes is slow.
        offsets = self.sampling_offsets(query).view(B, Q, M, L * P * 2)
        of_points = lambda x: x[..., None, :].expand(*x.shape[:-1], P, 2).flatten(-3)
        weights = self.attention_weights(query).view(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
        reference_points = reference_points[:, :, None]  # (B, Q, 1, L, 2 or 4)
        if reference_points.shape[-1] == 2:
            shifts = offsets / of_points(spatial_shapes.flip(-1).to(offsets.dtype))
        elif reference_points.shape[-1] == 4:
            shifts = offsets * of_points(reference_points[..., 2:]) * (0.5 / P)
        else:
            values = reference_points.shape[-1]
            raise ValueError(f"reference_points must have 2 or 4 values, not {values}")
        locations = (of_points(reference_points[..., :2]) + shifts).view(B, Q, M, L, P, 2)
        value = value.unflatten(-1, (M, -1))
        output = self.operator(value, spatial_shapes, level_start_index, locations, weights)
        return self.output_proj(output)
