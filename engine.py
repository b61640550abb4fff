"""One epoch of training and one evaluation."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from datasets.coco_eval import CocoEvaluator
from models.matcher import MatchingLog
from util.config import Config
from util.distributed import gather, sum_over_processes, world_size
from util.ema import ModelEma
from util.logging import Averages, Progress, peak_memory_mb
from util.nested_tensor import NestedTensor

logger = logging.getLogger(__name__)

DEBUG_STEPS = 15
Batch = tuple[NestedTensor, list[dict]]
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ArithmeticError):
    """A loss or the norm of its gradients became NaN or infinite; the message says which one, at
    which epoch and step."""


def in_groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """`size` batches at a time, without an incomplete last group."""
    batches = iter(loader)
    while len(group := list(itertools.islice(batches, size))) == size:
        yield group


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
    total: Tensor, losses: dict[str, Tensor], weights: dict[str, float], everywhere: bool = False
) -> dict[str, float]:
    """Under the released keys: `loss`, weighted terms, raw terms as `_unscaled`. One transfer.

    `everywhere`: the means over all processes, which all have to ask for.
    """
    values = torch.stack([total, *losses.values()]).detach()
    if everywhere:
        values = sum_over_processes(values) / world_size()
    values = values.tolist()
    stats = {"loss": values[0]}
    for name, value in zip(losses, values[1:], strict=True):
        if name in weights:
            stats[name] = value * weights[name]
            stats[f"{name}_unscaled"] = value
        elif not name.startswith("loss"):
            stats[name] = value
    return stats


def forward_and_backward(
    model: nn.Module,
    criterion: nn.Module,
    batches: Sequence[Batch],
    num_boxes: float,
    device: torch.device,
    cfg: Config,
    scaler: torch.amp.GradScaler,
) -> dict[str, float]:
    """Gradients of the mean loss of the batches; returns the means of everything measured."""
    averages = Averages()
    for i, (images, targets) in enumerate(batches, 1):
        images = images.to(device, non_blocking=True)
        targets = to_device(targets, device)
        # Processes exchange gradients once a step, with the last batch.
        alone = isinstance(model, DistributedDataParallel) and i < len(batches)
        with model.no_sync() if alone else nullcontext():
            with autocast(cfg, device):
                losses = criterion(model(images, targets), targets, num_boxes)
                loss = weighted_losses(losses, criterion.weight_dict)
            stats = read_losses(loss, losses, criterion.weight_dict, everywhere=True)
            if not math.isfinite(stats["loss"]):
                bad = [k for k in criterion.weight_dict if not math.isfinite(stats[k])] or ["loss"]
                more = f" ({len(bad)} losses are not finite)" if len(bad) > 1 else ""
                raise NonFiniteLoss(f"{bad[0]} is {stats[bad[0]]}{more}")
            scaler.scale(loss / len(batches)).backward()
        averages.update(stats, len(targets))
    return averages.means()


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    cfg: Config,
    scaler: torch.amp.GradScaler,
    step_scheduler: LRScheduler | None = None,
    ema: ModelEma | None = None,
    averages: Averages | None = None,
    first_step: int = 0,
    wishes: Callable[[], list[bool]] = list,
    after_step: Callable[[int, list[bool]], None] = lambda step, wishes: None,
) -> dict[str, float]:
    """Train on what `loader` gives and return the mean of everything that was measured.

    A step takes `cfg.accumulate` batches in every process; losses are divided by the number of
    boxes in all of them. `step_scheduler` moves on after every step, but for those that fp16's
    `scaler` leaves out. For an epoch that is taken up at `first_step`, `averages` are those of the
    steps before, and go on. `wishes` is asked before every step, and `after_step` told the step and
    what the processes wished, together. Raises NonFiniteLoss before a step is taken that would
    destroy the weights, in all processes.
    """
    model.train()
    criterion.train()
    averages, skipped = averages or Averages(), 0
    total_steps = len(loader) // cfg.accumulate
    total_steps = min(total_steps, DEBUG_STEPS) if cfg.debug else total_steps
    progress = Progress(in_groups(loader, cfg.accumulate), f"epoch {epoch}", total_steps)
    for step, batches in enumerate(progress, first_step):
        targets = [target for _, targets in batches for target in targets]
        for name in [name for t in targets for name in t.get("skipped", ())]:
            skipped += 1
            logger.warning("unreadable image skipped, %d in this epoch: %s", skipped, name)
        num_boxes = sum(len(t["labels"]) for t in targets)
        shared = torch.tensor([num_boxes, *wishes()], dtype=torch.float64)
        num_boxes, *wished = sum_over_processes(shared).tolist()
        num_boxes = max(num_boxes / world_size() / cfg.accumulate, 1.0)
        optimizer.zero_grad()
        try:
            stats = forward_and_backward(model, criterion, batches, num_boxes, device, cfg, scaler)
            if cfg.clip_max_norm > 0:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_max_norm).item()
                if math.isfinite(norm):
                    stats["grad_norm"] = norm
                elif not scaler.is_enabled():  # which would leave this step out
                    raise NonFiniteLoss(f"the norm of the gradients is {norm}")
        except NonFiniteLoss as e:
            raise NonFiniteLoss(f"{e} at epoch {epoch}, step {step}") from None
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update(model)
        if step_scheduler and scaler.get_scale() >= scale:  # it shrinks when a step is not taken
            step_scheduler.step()
        averages.update(stats, len(targets))
        progress.images += len(targets) * world_size()
        progress.note = f"loss {averages.means()['loss']:.3f}"
        after_step(step, [wish > 0 for wish in wished])
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
        progress.images += len(targets) * world_size()
    evaluator.join(gather(evaluator.results))
    averages.join(gather(averages))
    stats = averages.means() | {"images_per_second": progress.images_per_second}
    if matching:
        matching.join(gather(matching.found))
        stats |= matching.summary()
    return stats | {"coco_eval_bbox": evaluator.summarize()} if annotated else stats
