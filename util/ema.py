"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class ModelEma:
    """Holds ema = decay * ema + (1 - decay) * model of all floating parameters and buffers.

    `module` is the averaged model, in eval mode and without gradients; create it when the model is
    on its device. Integer buffers are copied. A shared parameter is averaged once.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9997):
        self.decay = decay
        self.module = copy.deepcopy(_unwrap(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call once after each step of the optimiser."""
        floating, other = ([], []), ([], [])
        pairs = zip(_tensors(self.module), _tensors(_unwrap(model)), strict=True)
        for average, current in pairs:
            averages, currents = floating if average.is_floating_point() else other
            averages.append(average)
            currents.append(current)
        if floating[0]:
            torch._foreach_lerp_(*floating, 1 - self.decay)  # one launch, not one a tensor
        if other[0]:
            torch._foreach_copy_(*other)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Under the model's own names."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(state)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]  # each yields a shared tensor once
