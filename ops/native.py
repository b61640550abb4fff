"""Finds, loads and calls the compiled backends: C functions that do not depend on torch's version.

`ops/setup.py` builds them, here or in the installed package `ms_deform_attn`; the root `setup.py`
builds them into `dn_dino.ops`, which is this folder in the package `dn_dino`.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

BUILD_COMMAND = "make op (or: pip install ./ops)"
if __package__ == "dn_dino.ops":
    BUILD_COMMAND = "pip install --force-reinstall --no-deps, with c++ or nvcc available"
_ABI = {"cpp": 2, "cuda": 1}  # versions of the C interfaces; libraries with others are outdated
TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_LIBRARIES = {"cpp": "ms_deform_attn_cpu", "cuda": "ms_deform_attn_cuda"}
CPU_VARIANTS = ("avx512", "avx2", "neon", "baseline")  # fastest first
_CPU_ERRORS = {
    1: "out of memory",
    2: "a head of value has 2**31 elements or more",
    3: f"MS_DEFORM_ATTN_CPU must be one of {', '.join(CPU_VARIANTS)} that this processor supports",
}


class Unavailable(RuntimeError):
    """A compiled backend cannot be used; the message has the reason and a remedy."""


@functools.cache
def load(backend: str) -> ctypes.CDLL:
    """The library of `backend`, "cpp" or "cuda". Raises Unavailable."""
    name = _LIBRARIES[backend]
    paths = [folder / f"lib{name}.so" for folder in _folders()]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Unavailable(f"backend {backend} is not built; build it with: {BUILD_COMMAND}")
    try:
        library = ctypes.CDLL(str(path))
        abi = getattr(library, f"{name}_abi")()
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be loaded ({error}); rebuild: {BUILD_COMMAND}") from error
    if abi != _ABI[backend]:
        raise Unavailable(f"{path} has the wrong version; rebuild: {BUILD_COMMAND}")
    # cpp: is_double, threads; cuda: type of value, type of the others, device, stream.
    options: list[type] = [ctypes.c_int, ctypes.c_int64]
    if backend == "cuda":
        options = [*[ctypes.c_int] * 3, ctypes.c_void_p]
        library.ms_deform_attn_cuda_error.restype = ctypes.c_char_p
    for direction, tensors in (("forward", 6), ("backward", 9)):
        function = getattr(library, f"{name}_{direction}")
        function.argtypes = options + [ctypes.c_void_p] * tensors + [ctypes.c_int64] * 7
        setattr(library, direction, function)
    return library


def cpu_variants() -> list[str]:
    """The variants of the C++ kernel that this processor supports, fastest first; the first runs,
    or the one in the environment variable MS_DEFORM_ATTN_CPU. Raises Unavailable."""
    supports = load("cpp").ms_deform_attn_cpu_supports
    return [name for name in CPU_VARIANTS if supports(name.encode())]


def _folders() -> list[Path]:
    """Where a library may be: next to this file, and in the installed package."""
    installed = importlib.util.find_spec("ms_deform_attn")
    locations = installed.submodule_search_locations if installed else None
    return [Path(__file__).parent, *map(Path, locations or [])]


def forward(backend: str, *inputs: Tensor) -> Tensor:
    """The op's output; inputs as for `ops.ms_deform_attn`, non-empty."""
    value, _, _, locations, _ = prepared = _prepare(backend, *inputs)
    output = value.new_empty(len(value), locations.shape[1], value.shape[2] * value.shape[3])
    _call(backend, "forward", *prepared, output)
    return output.to(inputs[0].dtype)


def backward(backend: str, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of value, sampling locations and attention weights, in their dtypes."""
    value, shapes, _, locations, weights = prepared = _prepare(backend, *inputs)
    # CUDA accumulates the gradient of value in full precision; C++ overwrites each level's rows.
    covered = backend == "cpp" and int(shapes.prod(dim=1).sum()) == value.shape[1]
    allocate = torch.empty_like if covered else torch.zeros_like
    grads = allocate(value, dtype=_accumulator(value)), *map(torch.empty_like, (locations, weights))
    _call(backend, "backward", *prepared, grad_output.to(value.dtype).contiguous(), *grads)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (inputs[0], *inputs[3:]), strict=True))


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _prepare(backend: str, *inputs: Tensor) -> list[Tensor]:
    """The inputs, contiguous and in dtypes that the library supports: float and double, on CUDA
    also half types, with locations and weights both in the dtype of value or both in float32."""
    value, shapes, starts, locations, weights = inputs
    if backend == "cpp":
        value = value.to(_accumulator(value))
    if not locations.dtype == weights.dtype == value.dtype:
        locations, weights = (t.to(_accumulator(value)) for t in (locations, weights))
    return [t.contiguous() for t in (value, shapes, starts, locations, weights)]


def _call(backend: str, direction: str, *tensors: Tensor) -> None:
    """Call the library with the five inputs and the other buffers."""
    library = load(backend)
    value, _, _, locations, *_ = tensors
    sizes = *value.shape, locations.shape[1], *locations.shape[3:5]  # B, S, M, D, Q, L, P
    options: tuple[int, ...]
    if backend == "cpp":
        options = value.dtype == torch.float64, torch.get_num_threads()
    else:
        stream = torch.cuda.current_stream(value.device).cuda_stream
        options = TYPE_CODES[value.dtype], TYPE_CODES[locations.dtype], value.device.index, stream
    pointers = (tensor.data_ptr() for tensor in tensors)
    if code := getattr(library, direction)(*options, *pointers, *sizes):
        if backend == "cpp":
            reason = _CPU_ERRORS[code]
        else:
            reason = library.ms_deform_attn_cuda_error(code).decode()
        raise RuntimeError(f"ms_deform_attn, {direction} of {backend}: {reason}")
