"""What the benchmarks of whole models share: random images and targets, FLOPs, memory."""

import re
from collections import Counter
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ops.ms_deform_attn import _operators as operators

aten = torch.ops.aten
KINDS = {  # of the operators that are counted; all others are matrix products
    "convolution": "convolution",
    "scaled_dot_product": "attention",
    "ms_deform_attn": "deformable sampling",
}


def random_batch(
    num_images: int, size: tuple[int, int], num_objects: int, num_classes: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Always the same images (3, H, W) and targets, of small to medium objects anywhere."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(num_images):
        images.append(torch.randn(3, *size, generator=generator))
        sides = 0.02 + 0.3 * torch.rand(num_objects, 2, generator=generator)
        centres = sides / 2 + (1 - sides) * torch.rand(num_objects, 2, generator=generator)
        labels = torch.randint(num_classes, (num_objects,), generator=generator)
        target = {"labels": labels, "boxes": torch.cat([centres, sides], dim=1)}
        targets.append(target | {"orig_size": torch.tensor(size)})
    return images, targets


def sampling_flops(value, spatial_shapes, level_start_index, locations, weights, **_) -> int:
    """FLOPs of ms_deform_attn, from shapes: a multiply-add for each of the 4 pixels around a
    sample and each channel. The weights of the pixels are not counted."""
    return 2 * 4 * prod(weights) * value[-1]


def convolution_backward_flops(grad, x, weight, *args, **_) -> int:
    """As many as forward for each of the gradients of x and weight. torch's own formula counts a
    grouped convolution as one without groups."""
    needs_grad = args[-1][:2]
    return sum(needs_grad) * conv_flop_count(x, weight, grad)


def count_flops() -> FlopCounterMode:
    """Counts products, convolutions, attention and deformable sampling; 2 FLOPs are a multiply-add.
    Elementwise operations are not counted."""
    formulas = {
        operators.ms_deform_attn: sampling_flops,
        # Two multiply-adds for each of the forward pass.
        operators.ms_deform_attn_backward: lambda grad, *inputs, **_: 2 * sampling_flops(*inputs),
        aten.convolution_backward: convolution_backward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def flops_by_kind(counter: FlopCounterMode) -> Counter[str]:
    """{"matrix product", "convolution", "attention", "deformable sampling": FLOPs}."""
    kinds: Counter[str] = Counter()
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        found = (kind for part, kind in KINDS.items() if part in str(operator))
        kinds[next(found, "matrix product")] += flops
    return kinds


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes now and at their peak: those that torch allocates on a GPU, and on a CPU those resident
    in this process; Linux."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    now, peak = (re.search(rf"{name}:\s+(\d+)", status)[1] for name in ("VmRSS", "VmHWM"))
    return 1024 * int(now), 1024 * int(peak)
