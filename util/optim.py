"""The optimiser, its parameter groups and the learning-rate schedules of the published runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, StepLR

from .config import Config


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """Trainable parameters in groups of one learning rate and weight decay each.

    `param_dict_type`: "default" gives the backbone its own rate; "ddetr_in_mmdet" besides slows
    reference points and sampling offsets down; "large_wd" besides spares norms and biases the
    weight decay.
    """

    def settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        lr, decay = cfg.lr, cfg.weight_decay
        if name.startswith("backbone."):
            lr = cfg.lr_backbone
        elif cfg.param_dict_type == "ddetr_in_mmdet" and (
            "reference_points" in name or "sampling_offsets" in name
        ):
            lr = cfg.lr * cfg.lr_linear_proj_mult
        if cfg.param_dict_type == "large_wd" and parameter.ndim <= 1:
            decay = 0.0
        return lr, decay

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(settings(name, parameter), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, cfg), lr=cfg.lr, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: Config, steps_per_epoch: int
) -> tuple[LRScheduler, bool]:
    """The schedule, and whether it moves on after every step rather than every epoch."""
    if cfg.onecyclelr:
        rates = [group["lr"] for group in optimizer.param_groups]
        total = cfg.epochs * steps_per_epoch
        return OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.2), True
    if cfg.multi_step_lr:
        return MultiStepLR(optimizer, cfg.lr_drop_list), False
    return StepLR(optimizer, cfg.lr_drop), False
