"""Training and evaluation as `main.py` does them: epoch after epoch, saved and logged."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.coco import CocoDetection, build_dataset
from datasets.coco_eval import CocoEvaluator
from datasets.loader import build_loader
from engine import NonFiniteLoss, evaluate, train_one_epoch
from models.errors import UserError
from train_state import (
    Run,
    claimed,
    class_map_of,
    find_resume,
    overwrites,
    prepare_output_dir,
    remove_run,
)
from util.checkpoint import read_checkpoint
from util.config import Config
from util.distributed import by_first, rank, take_from_first, world_size
from util.logging import Averages, RunLog
from util.matching_log import MatchingLog
from util.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)


def train_epoch(run: Run, loader: DataLoader, stop: StopRequest) -> None:
    """Train the next epoch, from where it stands, saving when it is time or asked for."""
    cfg, epoch = run.cfg, run.epoch + 1
    loader.dataset.set_epoch(epoch)
    loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, run.step * cfg.accumulate
    begun = saved = time.monotonic()
    before = run.seconds

    def wishes() -> list[bool]:
        minutes = (time.monotonic() - saved) / 60
        return [rank() == 0 and minutes > cfg.save_every_minutes, stop.signum != 0]

    def after_step(wished: list[bool]) -> None:
        nonlocal saved
        run.seconds = before + time.monotonic() - begun
        if any(wished):
            run.save()
            saved = time.monotonic()
        if wished[1]:
            raise Stopped(stop.signum)

    try:
        run.trained = train_one_epoch(run, loader, wishes, after_step)
    except NonFiniteLoss as e:
        if not cfg.output_dir:
            raise
        run.save("checkpoint_nonfinite.pth", nonfinite=True)
        path = Path(cfg.output_dir) / "checkpoint_nonfinite.pth"
        raise NonFiniteLoss(f"{e}; the weights before that step are in {path}") from None
    if not run.every_step:
        run.scheduler.step()
    # Statistics of batches are each process's own until the next step.
    take_from_first(run.model.buffers())
    if run.ema:
        take_from_first(run.ema.module.buffers())
    run.epoch, run.step, run.averages = epoch, 0, Averages()


def train_epochs(
    run: Run, train_loader: DataLoader, val_loader: DataLoader, stop: StopRequest
) -> None:
    """Train and evaluate every epoch that is left, and log each once."""
    cfg, first = run.cfg, run.epoch + 1 - (run.trained is not None)
    if world_size() > 1:
        norms = [m for m in run.model.modules() if isinstance(m, _BatchNorm)]
        run.parallel = DistributedDataParallel(run.model, broadcast_buffers=bool(norms))
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    together = f" in {world_size()} processes" if world_size() > 1 else ""
    logger.info(
        f"{cfg.modelname} on {run.device}{together}: {run.class_map.num_classes} classes, "
        f"{trained / 1e6:.1f} M trained parameters, {len(train_loader.dataset)} training "
        f"images, {len(val_loader.dataset)} to evaluate"
    )
    log = RunLog(cfg.output_dir, first) if cfg.output_dir and rank() == 0 else None
    begun = time.monotonic()
    for epoch in range(first, cfg.epochs):
        if run.trained is None:
            train_epoch(run, train_loader, stop)
            run.save()
        start = time.monotonic()
        with stop.obeyed_at_once() if cfg.output_dir else contextlib.nullcontext():
            stats = evaluate_run(run, val_loader)
        seconds = run.seconds + time.monotonic() - start
        line = {f"train_{k}": v for k, v in run.trained.items()} | stats
        line |= {"epoch": epoch, "n_parameters": trained}
        line |= {"epoch_time": str(timedelta(seconds=int(seconds)))}
        by_first(lambda line=line: log and log.write(line))
        done, run.trained, run.seconds = run.trained, None, 0.0
        ap = stats.get("ema_test_coco_eval_bbox", stats["test_coco_eval_bbox"])[0]
        is_best, run.best_ap = ap > run.best_ap, max(ap, run.best_ap)
        run.save()
        if is_best:
            run.copy("checkpoint_best.pth")
        if (epoch + 1) % cfg.lr_drop == 0 or (epoch + 1) % cfg.save_checkpoint_interval == 0:
            run.copy(f"checkpoint{epoch:04}.pth")
        average = (time.monotonic() - begun) / (epoch + 1 - first)
        left = timedelta(seconds=int(average * (cfg.epochs - epoch - 1)))
        ap, ap50 = stats["test_coco_eval_bbox"][:2]
        logger.info(
            f"epoch {epoch}: loss {done['loss']:.3f}, AP {ap:.3f}, AP50 {ap50:.3f}, "
            f"{done['images_per_second']:.1f} images/s, left {left}"
        )
    if log:
        log.close()
    logger.info("done in %s", timedelta(seconds=int(time.monotonic() - begun)))


def evaluate_run(run: Run, loader: DataLoader) -> dict:
    """Evaluate the model, and its average where one is kept; returns log.txt's `test_` keys."""
    stats = {}
    for prefix, model in (("test", run.model), ("ema_test", run.ema and run.ema.module)):
        if model is None:
            continue
        evaluator, matching = CocoEvaluator(loader.dataset), None
        if run.cfg.log_matching and model is run.model:
            matching = MatchingLog(run.criterion.matcher, run.matches)
        found = evaluate(run, model, loader, evaluator, matching=matching)
        run.matches = matching.matches if matching else run.matches
        stats |= {f"{prefix}_{k}": v for k, v in found.items()}
        if rank() > 0:
            continue
        logger.info("%s\n%s", prefix, evaluator.table())
        if run.cfg.eval_per_class:
            rows = evaluator.per_class().items()
            logger.info("AP by class\n%s", "\n".join(f"  {ap:6.3f}  {n}" for n, ap in rows))
        if run.cfg.save_results and run.cfg.output_dir:
            write_results(evaluator, Path(run.cfg.output_dir) / "results.json")
    return stats


def write_results(evaluator: CocoEvaluator, path: Path) -> None:
    detections = evaluator.detections
    path.write_text(json.dumps(detections))
    logger.info("%d detections in %s", len(detections), path)


def check_queries(dataset: CocoDetection, cfg: Config) -> None:
    """Every object of a training image needs a query of its own."""
    queries = cfg.num_queries * max(cfg.num_patterns, 1)
    count, name = dataset.most_objects()
    if count > queries:
        raise UserError(
            f"num_queries: {name} has {count} objects, the model {queries} queries; "
            f"--num_queries {count} or more would do"
        )


def train(cfg: Config, device: torch.device, argv: Sequence[str]) -> None:
    """Train from the beginning or from a checkpoint, evaluating after every epoch."""
    output_dir = by_first(lambda: prepare_output_dir(cfg))
    with claimed(output_dir), StopRequest() as stop:
        source = by_first(lambda: find_resume(cfg, training=True))
        checkpoint = read_checkpoint(source) if source else None
        train_set = build_dataset(cfg, "train", class_map_of(checkpoint))
        class_map = train_set.class_map
        check_queries(train_set, cfg)
        val_loader = build_loader(build_dataset(cfg, "val", class_map), cfg, train=False)
        train_loader = build_loader(train_set, cfg, train=True)
        cfg = dataclasses.replace(cfg, num_classes=class_map.num_classes)
        if cfg.batch_norm_type.startswith("Frozen") and not (cfg.pretrained_backbone or checkpoint):
            logger.warning(
                "FrozenBatchNorm2d without pretrained weights does not normalise; from scratch, "
                "--batch_norm_type BatchNorm2d learns better"
            )
        run = Run(cfg, device, class_map, len(train_loader) // cfg.accumulate)
        run.begin(checkpoint, source)
        del checkpoint
        if output_dir and overwrites(cfg):
            by_first(lambda: remove_run(output_dir))
        by_first(lambda: prepare_output_dir(run.cfg, argv))
        if output_dir is None:
            logger.warning("nothing of this run will be kept: there is no --output_dir")
        train_epochs(run, train_loader, val_loader, stop)


def evaluate_only(cfg: Config, device: torch.device) -> None:
    """--eval and --test: no training, only what a checkpoint detects."""
    source = by_first(lambda: find_resume(cfg))
    if not source:
        raise UserError("resume: --eval and --test need the checkpoint to evaluate, --resume FILE")
    checkpoint = read_checkpoint(source)
    output_dir = by_first(lambda: prepare_output_dir(cfg))
    if cfg.test and output_dir is None:
        raise UserError("output_dir: --test writes its detections there")
    split = "test" if cfg.test else "val"
    dataset = build_dataset(cfg, split, class_map_of(checkpoint))
    cfg = dataclasses.replace(cfg, num_classes=dataset.class_map.num_classes)
    run = Run(cfg, device, dataset.class_map)
    run.load(checkpoint, source)
    if cfg.use_ema and run.ema is None:
        logger.warning("use_ema: %s holds no averaged weights (ema_model)", source)
    loader = build_loader(dataset, cfg, train=False)
    if not cfg.test:
        stats = evaluate_run(run, loader)
        if output_dir and rank() == 0:
            (output_dir / "eval.json").write_text(json.dumps(stats, indent=2) + "\n")
        return
    evaluator = CocoEvaluator(dataset)
    evaluate(run, run.model, loader, evaluator, annotated=False)
    if rank() == 0:
        name = f"detections_test-dev2017_{cfg.modelname}_results.json"
        write_results(evaluator, output_dir / name)
