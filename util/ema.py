"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class ModelEma:
    """Keeps ema = decay * ema + (1 - decay) * model for all floating-point parameters and buffers,
    in `module`, a model in eval mode and without gradients. Integer buffers are copied. With
    `warmup`, the decay after n updates is at most (1 + n) / (10 + n): the first ones count less."""

    def __init__(self, model: nn.Module, decay: float = 0.9997, warmup: bool = False):
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.module = copy.deepcopy(_unwrap(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """To be called after every optimiser step."""
        averages, currents = [], []
        for average, current in zip(_tensors(self.module), _tensors(_unwrap(model)), strict=True):
            if average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if averages:
            torch._foreach_lerp_(averages, currents, 1 - decay)  # one launch for all tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(state)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]  # each yields a shared tensor once
