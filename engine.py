"""One optimiser step after another, and one evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from models.criterion import SetCriterion
from models.nested_tensor import NestedTensor
from models.postprocess import PostProcess
from train_state import TrainState
from util.config import Config
from util.distributed import gather, gather_to_rank0, on_rank0, sum_over_processes, world_size
from util.logging import Averages, ProgressBar
from util.matching_log import MatchingLog
from util.optim import scaled_rates

if TYPE_CHECKING:  # training steps do without pycocotools
    from models.evaluation import CocoEvaluator

logger = logging.getLogger(__name__)

DEBUG_STEPS = 15
Batch = tuple[NestedTensor, list[dict]]
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ArithmeticError):
    """A loss or the norm of its gradients is NaN or infinite; the message says which."""


class Step(NamedTuple):
    """What one optimiser step measured."""

    stats: dict[str, float]  # losses are means over all processes
    num_images: int  # of this process
    requests: list[bool]  # each one made by any process


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves images, labels, boxes and masks; sizes and ids are only read on the CPU."""
    images, targets = batch
    move = lambda tensor: tensor.to(device, non_blocking=True)
    moved = [t | {k: move(t[k]) for k in t.keys() & {"labels", "boxes", "masks"}} for t in targets]
    return images.to(device, non_blocking=True), moved


def autocast(device: torch.device, cfg: Config) -> torch.autocast:
    return torch.autocast(device.type, AMP_DTYPES[cfg.amp_dtype], enabled=cfg.amp)


def weigh(losses: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses; and that sum and the losses as one vector, for `figures`."""
    total = sum(losses[name] * weight for name, weight in weights.items())
    return total, torch.stack([total, *losses.values()]).detach()


def figures(
    values: Sequence[float], names: Iterable[str], weights: dict[str, float]
) -> dict[str, float]:
    """`weigh`'s vector under the released keys: the sum as `loss`, the weighted terms, and the raw
    terms as `_unscaled`."""
    stats = {"loss": values[0]}
    for name, value in zip(names, values[1:], strict=True):
        if name in weights:
            stats |= {name: value * weights[name], f"{name}_unscaled": value}
        elif not name.startswith("loss"):
            stats[name] = value
    return stats


def forward_and_backward(
    state: TrainState,
    parallel: nn.Module,
    criterion: SetCriterion,
    batches: Sequence[Batch],
    num_boxes: float,
) -> tuple[list[str], Tensor]:
    """Gradients of the mean loss of the batches; returns the names of the losses and the means over
    batches and processes of `weigh`'s vector."""
    measured = []
    for i, batch in enumerate(batches, 1):
        images, targets = to_device(batch, state.device)
        # Processes exchange gradients once a step, with the last batch.
        skip_sync = isinstance(parallel, DistributedDataParallel) and i < len(batches)
        with parallel.no_sync() if skip_sync else nullcontext():
            with autocast(state.device, state.cfg):
                losses = criterion(parallel(images, targets), targets, num_boxes)
                loss, values = weigh(losses, criterion.weight_dict)
            measured.append(values)
            state.scaler.scale(loss / len(batches)).backward()
    return list(losses), sum_over_processes(torch.stack(measured).mean(0)) / world_size()


def check_finite(stats: dict[str, float], losses: Iterable[str]) -> None:
    """NonFiniteLoss if the sum of the losses is not finite."""
    if math.isfinite(stats["loss"]):
        return
    bad = [k for k in losses if not math.isfinite(stats[k])] or ["loss"]
    more = f" ({len(bad)} losses are not finite)" if len(bad) > 1 else ""
    raise NonFiniteLoss(f"{bad[0]} is {stats[bad[0]]}{more}")


def train_steps(
    state: TrainState,
    parallel: nn.Module,
    criterion: SetCriterion,
    loader: Iterable[Batch],
    requests: Callable[[], list[bool]] = list,
) -> Iterator[Step]:
    """Take one optimiser step after another; changes everything in `state` but its position.

    `parallel` is the state's model, or DDP around it. A step takes `cfg.accumulate` batches in
    every process; losses are divided by the number of boxes in all of them. A step that fp16's
    scaler skips does not advance a schedule of steps. `requests` is called before every step, and
    its values exchanged. All processes raise NonFiniteLoss before a step that would destroy the
    weights.
    """
    cfg, scaler, skipped = state.cfg, state.scaler, 0
    state.model.train()
    criterion.train()
    # Groups of batches; an incomplete last one is dropped.
    for batches in zip(*[iter(loader)] * cfg.accumulate, strict=False):
        targets = [target for _, targets in batches for target in targets]
        for name in [name for t in targets for name in t.get("skipped", ())]:
            skipped += 1
            logger.warning("unreadable image skipped, %d in this epoch: %s", skipped, name)
        num_boxes = sum(len(t["labels"]) for t in targets)
        shared = torch.tensor([num_boxes, *requests()], dtype=torch.float64)
        num_boxes, *requested = sum_over_processes(shared).tolist()
        num_boxes = max(num_boxes / world_size() / cfg.accumulate, 1.0)
        state.optimizer.zero_grad()
        names, values = forward_and_backward(state, parallel, criterion, batches, num_boxes)
        norm = values.new_zeros(())
        if cfg.clip_max_norm > 0:
            scaler.unscale_(state.optimizer)
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.clip_max_norm)
        # The only time in a step, after the matching, that a GPU is waited for.
        norm, *values = torch.cat([norm.view(1), values]).tolist()
        stats = figures(values, names, criterion.weight_dict)
        check_finite(stats, criterion.weight_dict)
        if math.isfinite(norm):
            stats |= {"grad_norm": norm} if cfg.clip_max_norm > 0 else {}
        elif not scaler.is_enabled():  # which would skip this step
            raise NonFiniteLoss(f"the norm of the gradients is {norm}")
        scale = scaler.get_scale()
        with scaled_rates(state.optimizer, state.warmup(state.position.step + 1)):
            scaler.step(state.optimizer)
        scaler.update()
        if state.ema:
            state.ema.update(state.model)
        if state.every_step and scaler.get_scale() >= scale:  # it shrinks when a step is skipped
            state.schedule.step()
        yield Step(stats, len(targets), [count > 0 for count in requested])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion | None,
    postprocess: PostProcess,
    loader: DataLoader,
    evaluator: CocoEvaluator,
    cfg: Config,
    matching: MatchingLog | None = None,
) -> dict[str, float | list[float]]:
    """Fill `evaluator` and `matching`; returns losses, speed, COCO's figures and the summary of
    `matching`, or without annotations, when `criterion` is None, only the speed. Rank 0 computes
    COCO's figures; only its `evaluator` has the detections of all processes."""
    averages, device = Averages(), next(model.parameters()).device
    model.eval()
    if criterion:
        criterion.eval()
        weights = {k: w for k, w in criterion.weight_dict.items() if "_dn" not in k}
    total = min(len(loader), DEBUG_STEPS) if cfg.debug else len(loader)
    progress = ProgressBar(loader, "evaluate", total)
    for batch in progress:
        images, targets = to_device(batch, device)
        with autocast(device, cfg):
            outputs = model(images)
        if criterion and (losses := criterion(outputs, targets)):  # a Faster R-CNN has none
            _, values = weigh(losses, weights)
            averages.update(figures(values.tolist(), losses, weights), len(targets))
        if matching:
            matching.update(outputs, targets)
        sizes = torch.stack([t["orig_size"] for t in targets]).to(device)
        results = zip(targets, postprocess(outputs, sizes), strict=True)
        evaluator.update({int(t["image_id"]): result for t, result in results})
        progress.images += len(targets) * world_size()
    if parts := gather_to_rank0(evaluator.results):
        evaluator.join(parts)
    averages.join(gather(averages.state_dict()))
    stats = averages.means() | {"images_per_second": progress.images_per_second}
    if matching:
        matching.join(gather(matching.found))
        stats |= matching.summary()
    if criterion:
        stats["coco_eval_bbox"] = on_rank0(evaluator.summarize)
        if evaluator.dataset.masks:
            stats["coco_eval_masks"] = on_rank0(lambda: evaluator.summarize("segm"))
    return stats
