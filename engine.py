"""One epoch of training and one evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from datasets.coco_eval import CocoEvaluator
from models.matcher import MatchingLog
from util.config import Config
from util.ema import ModelEma
from util.logging import Averages, Progress, peak_memory_mb

logger = logging.getLogger(__name__)

DEBUG_STEPS = 15
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite; the message says which one, at which epoch and step."""


def to_device(targets: list[dict], device: torch.device) -> list[dict]:
    """Labels and boxes on the device; sizes and ids stay, only the CPU reads them."""
    moved = ("labels", "boxes")
    return [
        {k: v.to(device, non_blocking=True) if k in moved else v for k, v in t.items()}
        for t in targets
    ]


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, AMP_DTYPES[cfg.amp_dtype], enabled=cfg.amp)


def weighted_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum(losses[name] * weight for name, weight in weights.items())


def read_losses(
    total: Tensor, losses: dict[str, Tensor], weights: dict[str, float]
) -> dict[str, float]:
    """Under the released keys: `loss`, weighted terms, raw terms as `_unscaled`. One transfer."""
    values = torch.stack([total, *losses.values()]).detach().tolist()
    stats = {"loss": values[0]}
    for name, value in zip(losses, values[1:], strict=True):
        if name in weights:
            stats[name] = value * weights[name]
            stats[f"{name}_unscaled"] = value
        elif not name.startswith("loss"):
            stats[name] = value
    return stats


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    cfg: Config,
    scaler: torch.amp.GradScaler,
    step_scheduler: LRScheduler | None = None,
    ema: ModelEma | None = None,
) -> dict[str, float]:
    """Train for one epoch and return the mean of everything that was measured.

    `step_scheduler` moves on after every step. Raises NonFiniteLoss before a step is taken that
    would destroy the weights.
    """
    model.train()
    criterion.train()
    averages, skipped = Averages(), 0
    total_steps = min(len(loader), DEBUG_STEPS) if cfg.debug else len(loader)
    progress = Progress(loader, f"epoch {epoch}", total_steps)
    for step, (images, targets) in enumerate(progress):
        for name in [name for t in targets for name in t.get("skipped", ())]:
            skipped += 1
            logger.warning("unreadable image skipped, %d in this epoch: %s", skipped, name)
        images = images.to(device, non_blocking=True)
        targets = to_device(targets, device)
        with autocast(cfg, device):
            losses = criterion(model(images, targets), targets)
            loss = weighted_losses(losses, criterion.weight_dict)
        stats = read_losses(loss, losses, criterion.weight_dict)
        if not math.isfinite(stats["loss"]):
            bad = [k for k in criterion.weight_dict if not math.isfinite(stats[k])] or ["loss"]
            raise NonFiniteLoss(
                f"{bad[0]} is {stats[bad[0]]} at epoch {epoch}, step {step}"
                + (f" ({len(bad)} losses are not finite)" if len(bad) > 1 else "")
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if cfg.clip_max_norm > 0:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_max_norm)
            stats["grad_norm"] = norm.item()
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update(model)
        if step_scheduler:
            step_scheduler.step()
        averages.update(stats, len(targets))
        progress.note = f"loss {averages.means()['loss']:.3f}"
    return averages.means() | {
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": progress.images_per_second,
        "peak_memory_mb": peak_memory_mb(),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocess: nn.Module,
    loader: Iterable,
    evaluator: CocoEvaluator,
    device: torch.device,
    cfg: Config,
    annotated: bool = True,
    matching: MatchingLog | None = None,
) -> dict[str, float | list[float]]:
    """Fill `evaluator` with detections; return losses and COCO's figures.

    Without annotations (`annotated` False) there is nothing to return but the speed. With
    `matching`, its summary is returned as well.
    """
    model.eval()
    criterion.eval()
    averages = Averages()
    total_steps = min(len(loader), DEBUG_STEPS) if cfg.debug else len(loader)
    progress = Progress(loader, "evaluate", total_steps)
    weights = {k: w for k, w in criterion.weight_dict.items() if "_dn" not in k}
    for images, targets in progress:
        images = images.to(device, non_blocking=True)
        with autocast(cfg, device):
            outputs = model(images)
        if annotated:
            targets = to_device(targets, device)
            losses = criterion(outputs, targets)
            averages.update(
                read_losses(weighted_losses(losses, weights), losses, weights), len(targets)
            )
            if matching:
                matching.update(outputs, targets)
        sizes = torch.stack([t["orig_size"] for t in targets]).to(device)
        results = postprocess(outputs, sizes)
        ids = [int(t["image_id"]) for t in targets]
        evaluator.update(dict(zip(ids, results, strict=True)))
    stats = averages.means() | {"images_per_second": progress.images_per_second}
    if matching:
        stats |= matching.summary()
    return stats | {"coco_eval_bbox": evaluator.summarize()} if annotated else stats
