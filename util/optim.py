"""The optimiser, its parameter groups and the learning-rate schedules of the published runs."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, StepLR

from .config import Config

# Parameters with a lower learning rate where param_dict_type is ddetr_in_mmdet.
LOW_RATE = re.compile("reference_points|sampling_offsets")

# Parameters with the backbone's learning rate; `detr` is the detector under a mask head.
BACKBONE = re.compile(r"(detr\.)?backbone\.(?!fpn\.)")

# Muon is for weight matrices between hidden layers: not for heads, embeddings, the stem (identified
# by the image's channels), reference points, sampling offsets and attention weights.
NOT_HIDDEN = re.compile(
    rf"embed|label_enc|pattern|\.position\.|bias_table|attention_weights|{LOW_RATE.pattern}"
    "|cls_score|cls_logits|bbox_pred|mask_head|bbox_attention"
)
IMAGE_CHANNELS = 3
MUON_RATE = 3  # relative to AdamW's learning rate; on the toy data set 5 is as good
MUON_MOMENTUM = 0.95
# Three Newton-Schulz iterations (Cesista 2025); the usual five learn no faster on the toy data.
COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with all but tiny singular values moved close to 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """AdamW, with orthogonalised updates in groups with "hidden" set (Jordan et al. 2024).

    An update is the momentum with singular values close to 1, scaled to the RMS of AdamW's (Liu et
    al. 2025) at MUON_RATE times the group's learning rate. Convolution kernels are matrices
    (out, in * height * width); matrices of the same shape are updated together.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, fused=True)
        self._step_supports_amp_scaling = False  # it would unscale only AdamW's part

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["hidden"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"] if group["hidden"] else ():
                if p.grad is not None:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for params in by_shape.values():
                self.step_together(params, MUON_RATE * group["lr"], group["weight_decay"])
        return loss

    def step_together(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        for p in params:
            if not self.state[p]:  # AdamW's load_state_dict expects a step
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, [p.grad for p in params], 1 - MUON_MOMENTUM)
        updates = orthogonal(torch.stack([m.flatten(1) for m in momenta]))
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        updates = [update.view_as(p) for update, p in zip(updates, params, strict=True)]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr * scale)


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """Trainable parameters grouped by learning rate, weight decay and use of Muon ("hidden"). With
    `lr_backbone` 0 the backbone is frozen.

    `param_dict_type`: "default" sets a separate learning rate for the backbone; "ddetr_in_mmdet"
    also a lower one for reference points and sampling offsets; "large_wd", as released, disables
    weight decay for names with "norm" or "bias", which miss some norms.
    """

    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        lr, decay = cfg.lr, cfg.weight_decay
        if BACKBONE.match(name):
            lr = cfg.lr_backbone
            if lr == 0:
                parameter.requires_grad_(False)
        elif cfg.param_dict_type == "ddetr_in_mmdet" and LOW_RATE.search(name):
            lr = cfg.lr * cfg.lr_linear_proj_mult
        if cfg.param_dict_type == "large_wd" and ("norm" in name or "bias" in name):
            decay = 0.0
        # Excludes vectors, depthwise convolutions and the stem.
        is_matrix = parameter.ndim > 1 and not {1, IMAGE_CHANNELS} & set(parameter.shape[:2])
        hidden = cfg.optimizer == "muon" and is_matrix and not NOT_HIDDEN.search(name)
        if parameter.requires_grad:
            groups.setdefault((lr, decay, hidden), []).append(parameter)
    return [
        {"params": params, "lr": lr, "weight_decay": decay, "hidden": hidden}
        for (lr, decay, hidden), params in sorted(groups.items(), key=lambda group: group[0][2])
    ]


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    groups = parameter_groups(model, cfg)
    return Muon(groups) if cfg.optimizer == "muon" else torch.optim.AdamW(groups, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: Config, steps_per_epoch: int
) -> tuple[LRScheduler, bool]:
    """The schedule, and whether it advances every step, not every epoch."""
    if cfg.onecyclelr:
        total = cfg.epochs * steps_per_epoch
        rising = 0.4 if total == 5 else 0.2  # a rise of exactly one step: torch divides by zero
        return OneCycleLR(optimizer, cfg.lr, total_steps=total, pct_start=rising), True
    if cfg.multi_step_lr:
        return MultiStepLR(optimizer, cfg.lr_drop_list), False
    return StepLR(optimizer, cfg.lr_drop), False


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiplies the learning rates within a `with`; after it, they are what they were."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def move_to(scheduler: LRScheduler, position: int) -> None:
    """Set the learning rates that `scheduler` has after `position` steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but there is no replacement
        scheduler.step(min(position, getattr(scheduler, "total_steps", position)))


def load_released_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: dict
) -> bool:
    """Load AdamW's state from a checkpoint of the released code; False if it does not fit. There,
    names without and with "backbone" make two groups, or three with `LOW_RATE`, each in the order
    of the file's weights; Anchor DETR's third is empty."""
    ours, seen = dict(model.named_parameters(remove_duplicate=False)), set()
    state = checkpoint.get("optimizer", {})
    indices = [group["params"] for group in state.get("param_groups", ())]
    groups: list[list] = [[], [], []][: max(len(indices), 2)]
    for name in checkpoint.get("model", ()):
        parameter = ours.get(name.removeprefix("module."))
        if parameter is not None and parameter.requires_grad and parameter not in seen:
            seen.add(parameter)
            low = len(groups) == 3 and LOW_RATE.search(name)
            groups[2 if low else "backbone" in name].append(parameter)
    if [len(i) for i in indices] != [len(g) for g in groups] or isinstance(optimizer, Muon):
        return False
    pairs = zip(chain(*indices), chain(*groups), strict=True)
    states = {p: state["state"][i] for i, p in pairs if i in state["state"]}
    if any("exp_avg" not in s or s["exp_avg"].shape != p.shape for p, s in states.items()):
        return False
    for p, s in states.items():
        moments = {key: s[key].to(p) for key in ("exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(s["step"]), device=p.device)
        optimizer.state[p] = {"step": step, **moments}
    return True
