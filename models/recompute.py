"""Gradient checkpointing (Chen et al. 2016): activations are computed again instead of kept."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def run(layer: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """`layer(*inputs)`; with `recompute`, in training, nothing inside the layer is kept for the
    backward pass, which runs the layer once more. Results and gradients are the same."""
    if recompute and layer.training:
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
