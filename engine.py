"""One epoch of training and one evaluation."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.coco_eval import CocoEvaluator
from models.nested_tensor import NestedTensor
from train_state import Run
from util.distributed import (
    by_first,
    gather,
    gather_to_first,
    sum_over_processes,
    world_size,
)
from util.logging import Averages, Progress, peak_memory_mb
from util.matching_log import MatchingLog

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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Images, labels and boxes on the device; sizes and ids stay, only the CPU reads them."""
    images, targets = batch
    move = lambda tensor: tensor.to(device, non_blocking=True)
    moved = [{**t, "labels": move(t["labels"]), "boxes": move(t["boxes"])} for t in targets]
    return images.to(device, non_blocking=True), moved


def autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, AMP_DTYPES[run.cfg.amp_dtype], enabled=run.cfg.amp)


def weigh(
    losses: dict[str, Tensor], weights: dict[str, float], everywhere: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the losses; and as numbers, under the released keys, that sum as `loss`,
    the weighted terms, and the raw terms as `_unscaled`. They take one transfer.

    `everywhere`: the numbers are means over all processes, which all have to ask for.
    """
    total = sum(losses[name] * weight for name, weight in weights.items())
    values = torch.stack([total, *losses.values()]).detach()
    if everywhere:
        values = sum_over_processes(values) / world_size()
    loss, *values = values.tolist()
    stats = {"loss": loss}
    for name, value in zip(losses, values, strict=True):
        if name in weights:
            stats |= {name: value * weights[name], f"{name}_unscaled": value}
        elif not name.startswith("loss"):
            stats[name] = value
    return total, stats


def forward_and_backward(run: Run, batches: Sequence[Batch], num_boxes: float) -> dict[str, float]:
    """Gradients of the mean loss of the batches; returns the means of everything measured."""
    averages, weights = Averages(), run.criterion.weight_dict
    for i, batch in enumerate(batches, 1):
        images, targets = to_device(batch, run.device)
        # Processes exchange gradients once a step, with the last batch.
        alone = isinstance(run.parallel, DistributedDataParallel) and i < len(batches)
        with run.parallel.no_sync() if alone else nullcontext():
            with autocast(run):
                losses = run.criterion(run.parallel(images, targets), targets, num_boxes)
                loss, stats = weigh(losses, weights, everywhere=True)
            if not math.isfinite(stats["loss"]):
                bad = [k for k in weights if not math.isfinite(stats[k])] or ["loss"]
                more = f" ({len(bad)} losses are not finite)" if len(bad) > 1 else ""
                raise NonFiniteLoss(f"{bad[0]} is {stats[bad[0]]}{more}")
            run.scaler.scale(loss / len(batches)).backward()
        averages.update(stats, len(targets))
    return averages.means()


def train_one_epoch(
    run: Run,
    loader: DataLoader,
    wishes: Callable[[], list[bool]] = list,
    after_step: Callable[[list[bool]], None] = lambda wished: None,
) -> dict[str, float]:
    """Train the epoch behind `run.epoch`, from `run.step` on, with what `loader` gives; return the
    means of everything that was measured, which `run.averages` collect.

    A step takes `cfg.accumulate` batches in every process; losses are divided by the number of
    boxes in all of them. Steps that fp16's scaler leaves out do not count for a schedule of steps.
    `wishes` is asked before every step, and `after_step` told what the processes wished, together.
    Raises NonFiniteLoss before a step is taken that would destroy the weights, in all processes.
    """
    cfg, scaler, epoch, skipped = run.cfg, run.scaler, run.epoch + 1, 0
    run.model.train()
    run.criterion.train()
    if cfg.use_ema and run.ema is None and epoch >= cfg.ema_epoch:
        run.begin_average()
    total_steps = len(loader) // cfg.accumulate
    total_steps = min(total_steps, DEBUG_STEPS) if cfg.debug else total_steps
    progress = Progress(in_groups(loader, cfg.accumulate), f"epoch {epoch}", total_steps)
    for batches in progress:
        targets = [target for _, targets in batches for target in targets]
        for name in [name for t in targets for name in t.get("skipped", ())]:
            skipped += 1
            logger.warning("unreadable image skipped, %d in this epoch: %s", skipped, name)
        num_boxes = sum(len(t["labels"]) for t in targets)
        shared = torch.tensor([num_boxes, *wishes()], dtype=torch.float64)
        num_boxes, *wished = sum_over_processes(shared).tolist()
        num_boxes = max(num_boxes / world_size() / cfg.accumulate, 1.0)
        run.optimizer.zero_grad()
        try:
            stats = forward_and_backward(run, batches, num_boxes)
            if cfg.clip_max_norm > 0:
                scaler.unscale_(run.optimizer)
                parameters = run.model.parameters()
                norm = nn.utils.clip_grad_norm_(parameters, cfg.clip_max_norm).item()
                if math.isfinite(norm):
                    stats["grad_norm"] = norm
                elif not scaler.is_enabled():  # which would leave this step out
                    raise NonFiniteLoss(f"the norm of the gradients is {norm}")
        except NonFiniteLoss as e:
            raise NonFiniteLoss(f"{e} at epoch {epoch}, step {run.step}") from None
        scale = scaler.get_scale()
        scaler.step(run.optimizer)
        scaler.update()
        if run.ema:
            run.ema.update(run.model)
        if run.every_step and scaler.get_scale() >= scale:  # it shrinks when a step is left out
            run.scheduler.step()
        run.step += 1
        run.averages.update(stats, len(targets))
        progress.images += len(targets) * world_size()
        progress.note = f"loss {run.averages.means()['loss']:.3f}"
        after_step([wish > 0 for wish in wished])
    return run.averages.means() | {
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": progress.images_per_second,
        "peak_memory_mb": peak_memory_mb(),
    }


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    loader: DataLoader,
    evaluator: CocoEvaluator,
    annotated: bool = True,
    matching: MatchingLog | None = None,
) -> dict[str, float | list[float]]:
    """Fill `evaluator` with what the run's model, or its average, detects; return losses and COCO's
    figures, with `matching` its summary as well.

    Of several processes the first evaluates, and it alone has all detections in `evaluator`.
    Without annotations (`annotated` False) there is nothing to return but the speed.
    """
    model.eval()
    run.criterion.eval()
    averages = Averages()
    total_steps = min(len(loader), DEBUG_STEPS) if run.cfg.debug else len(loader)
    progress = Progress(loader, "evaluate", total_steps)
    weights = {k: w for k, w in run.criterion.weight_dict.items() if "_dn" not in k}
    for batch in progress:
        images, targets = to_device(batch, run.device)
        with autocast(run):
            outputs = model(images)
        if annotated:
            _, stats = weigh(run.criterion(outputs, targets), weights)
            averages.update(stats, len(targets))
        if matching:
            matching.update(outputs, targets)
        sizes = torch.stack([t["orig_size"] for t in targets]).to(run.device)
        results = run.postprocess(outputs, sizes)
        ids = [int(t["image_id"]) for t in targets]
        evaluator.update(dict(zip(ids, results, strict=True)))
        progress.images += len(targets) * world_size()
    if parts := gather_to_first(evaluator.results):
        evaluator.join(parts)
    averages.join(gather(averages.state_dict()))
    stats = averages.means() | {"images_per_second": progress.images_per_second}
    if matching:
        matching.join(gather(matching.found))
        stats |= matching.summary()
    return stats | {"coco_eval_bbox": by_first(evaluator.summarize)} if annotated else stats
