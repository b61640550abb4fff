"""Training and evaluation as `main.py` runs them: epoch after epoch, saved and logged."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.check import check_data
from datasets.coco import CocoDetection, build_dataset, build_transforms, fitting_sizes
from datasets.loader import build_loader
from engine import DEBUG_STEPS, NonFiniteLoss, evaluate, train_steps
from models import build_model
from models.criterion import SetCriterion
from models.draw import side_by_side
from models.errors import UserError
from models.evaluation import CocoEvaluator
from models.machine import peak_memory_mb
from models.postprocess import PostProcess
from models.registry import find_model
from models.report import write_report
from train_state import TrainState, class_map_of
from util.checkpoint import read_checkpoint
from util.config import Config
from util.distributed import broadcast_from_rank0, on_rank0, rank, world_size
from util.loggers import check_installed, open_services
from util.logging import Averages, ProgressBar, RunLog
from util.matching_log import MatchingLog
from util.run_dir import claimed, find_resume, prepare_output_dir, remove_run, should_overwrite
from util.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)


class Trainer:
    """Trains, evaluates and saves a `TrainState` epoch by epoch, and advances its position.
    `parallel` is the model, inside DDP if there are several processes."""

    def __init__(self, cfg: Config, device: torch.device, stop: StopRequest):
        self.stop = stop
        source = on_rank0(lambda: find_resume(cfg, training=True))
        checkpoint = read_checkpoint(source) if source else None
        known = checkpoint or (cfg.frozen_weights and read_checkpoint(cfg.frozen_weights))
        class_map = class_map_of(known, cfg) if known else None
        train_set = build_dataset(cfg, "train", class_map)
        check_queries(train_set, cfg)
        if sizes := fitting_sizes(train_set, cfg):
            logger.info("max_enlargement: %s", ", ".join(f"{k} {v}" for k, v in sizes.items()))
            cfg = dataclasses.replace(cfg, **sizes)
            train_set.transforms = build_transforms(cfg, train=True)
        val_set = build_dataset(cfg, "val", train_set.class_map)
        self.val_loader = build_loader(val_set, cfg, train=False)
        self.train_loader = build_loader(train_set, cfg, train=True)
        cfg = dataclasses.replace(cfg, num_classes=train_set.class_map.num_classes)
        is_pretrained = cfg.pretrained_backbone or cfg.finetune or known
        if cfg.batch_norm_type.startswith("Frozen") and not is_pretrained:
            logger.warning("batch_norm_type: without pretrained weights, BatchNorm2d learns better")
        model, self.criterion, self.postprocess = build_model(cfg)
        epoch_length = len(self.train_loader) // cfg.accumulate
        self.state = TrainState(cfg, model.place(device), train_set.class_map, epoch_length)
        self.state.begin(checkpoint, source)
        self.parallel: nn.Module = model
        if world_size() > 1:
            norms = nn.BatchNorm2d, nn.SyncBatchNorm
            has_statistics = any(isinstance(m, norms) for m in model.modules())
            self.parallel = DistributedDataParallel(model, broadcast_buffers=has_statistics)

    def train_epochs(self) -> None:
        """Train, evaluate and log every remaining epoch."""
        state, position, cfg = self.state, self.state.position, self.state.cfg
        first = position.epoch + 1 - (position.trained is not None)
        num_parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        together = f" in {world_size()} processes" if world_size() > 1 else ""
        logger.info(
            f"{cfg.modelname} on {state.device}{together}: {state.class_map.num_classes} classes, "
            f"{num_parameters / 1e6:.1f} M trained parameters, {len(self.train_loader.dataset)} "
            f"training images, {len(self.val_loader.dataset)} to evaluate"
        )
        log: RunLog | None = None

        def open_log() -> None:
            nonlocal log
            log = RunLog(cfg.output_dir, first, open_services(cfg.logger, dataclasses.asdict(cfg)))

        if cfg.output_dir:
            on_rank0(open_log)
        begun = time.monotonic()
        for epoch in range(first, cfg.epochs):
            if 0 < cfg.patience <= position.epochs_since_best:
                message = "patience: stopped, as AP has not exceeded %.3f for %d epochs"
                logger.info(message, position.best_ap, position.epochs_since_best)
                break
            if position.trained is None:
                self.train_epoch()
                state.save()
            start = time.monotonic()
            with self.stop.obeyed_at_once() if cfg.output_dir else contextlib.nullcontext():
                how = self.criterion, self.postprocess, self.val_loader
                source = f"{cfg.output_dir or cfg.modelname}, epoch {epoch}"
                stats = evaluate_state(state, *how, source)
            seconds = timedelta(seconds=int(position.seconds + time.monotonic() - start))
            line = {f"train_{k}": v for k, v in position.trained.items()} | stats
            line |= {"epoch": epoch, "n_parameters": num_parameters, "epoch_time": str(seconds)}
            on_rank0(lambda line=line: log and log.write(line))
            position.trained, position.seconds = None, 0.0
            key = "test_coco_eval_masks" if cfg.masks else "test_coco_eval_bbox"
            ap = stats.get(f"ema_{key}", stats[key])[0]
            is_best = ap > position.best_ap
            position.epochs_since_best = 0 if is_best else position.epochs_since_best + 1
            copies = ["checkpoint_best.pth"] if is_best else []
            if (epoch + 1) % cfg.lr_drop == 0 or (epoch + 1) % cfg.save_checkpoint_interval == 0:
                copies.append(f"checkpoint{epoch:04}.pth")
            position.best_ap = max(ap, position.best_ap)
            state.save(copies=copies)
            average = (time.monotonic() - begun) / (epoch + 1 - first)
            left = timedelta(seconds=int(average * (cfg.epochs - epoch - 1)))
            ap, ap50 = stats[key][:2]
            logger.info(
                f"epoch {epoch}: loss {line['train_loss']:.3f}, AP {ap:.3f}, AP50 {ap50:.3f}, "
                f"{line['train_images_per_second']:.1f} images/s, left {left}"
            )
        if log:
            log.close()
        logger.info("done in %s", timedelta(seconds=int(time.monotonic() - begun)))

    def train_epoch(self) -> None:
        """Train the next epoch from the current step on; save in between and when told to stop."""
        state, position, cfg = self.state, self.state.position, self.state.cfg
        epoch, loader, before = position.epoch + 1, self.train_loader, position.seconds
        loader.dataset.set_epoch(epoch)
        sampler = loader.batch_sampler
        sampler.epoch, sampler.start = epoch, position.step * cfg.accumulate
        if cfg.use_ema and state.ema is None and epoch >= cfg.ema_epoch:
            state.begin_average()
        begun = saved = time.monotonic()
        is_due = lambda: rank() == 0 and (time.monotonic() - saved) / 60 > cfg.save_every_minutes
        requests = lambda: [is_due(), self.stop.signum != 0]
        steps = train_steps(state, self.parallel, self.criterion, loader, requests)
        total = len(loader) // cfg.accumulate
        total = min(total, DEBUG_STEPS) if cfg.debug else total
        progress = ProgressBar(steps, f"epoch {epoch}", total)
        try:
            for stats, num_images, (save_requested, stop_requested) in progress:
                position.step += 1
                position.averages.update(stats, num_images)
                position.seconds = before + time.monotonic() - begun
                progress.images += num_images * world_size()
                progress.note = f"loss {position.averages.means()['loss']:.3f}"
                if save_requested or stop_requested:
                    state.save()
                    saved = time.monotonic()
                if stop_requested:
                    raise Stopped(self.stop.signum)
        except NonFiniteLoss as e:
            message = f"{e} at epoch {epoch}, step {position.step}"
            if cfg.output_dir:
                path = Path(cfg.output_dir) / "checkpoint_nonfinite.pth"
                state.save(path.name, nonfinite=True)
                message += f"; the weights before that step are in {path}"
            raise NonFiniteLoss(message) from None
        position.trained = position.averages.means() | {
            "lr": state.optimizer.param_groups[0]["lr"] * state.warmup(position.step),
            "images_per_second": progress.images_per_second,
            "peak_memory_mb": peak_memory_mb(),
        }
        position.epoch, position.step, position.averages = epoch, 0, Averages()
        if not state.every_step:
            state.schedule.step()
        # DDP synchronises the batch statistics only at the next step.
        broadcast_from_rank0(state.model.buffers())
        if state.ema:
            broadcast_from_rank0(state.ema.module.buffers())


def evaluate_state(
    state: TrainState,
    criterion: SetCriterion,
    postprocess: PostProcess,
    loader: DataLoader,
    source: str,
) -> dict:
    """Evaluate the model and, if there is one, its average; returns log.txt's `test_` keys. Of the
    position, only `matches` changes. source: of the weights, for the report."""
    cfg, position, figures = state.cfg, state.position, {}
    models = {"test": state.model} | ({"ema_test": state.ema.module} if state.ema else {})
    for prefix, model in models.items():
        evaluator, matching = CocoEvaluator(loader.dataset), None
        if cfg.log_matching and model is state.model:
            matching = MatchingLog(criterion.matcher, position.matches)
        found = evaluate(model, criterion, postprocess, loader, evaluator, cfg, matching)
        position.matches = matching.matches if matching else position.matches
        figures |= {f"{prefix}_{k}": v for k, v in found.items()}
        if rank() > 0:
            continue
        logger.info("%s\n%s", prefix, evaluator.table())
        if cfg.eval_per_class:
            rows = evaluator.per_class().items()
            logger.info("AP by class\n%s", "\n".join(f"  {ap:6.3f}  {n}" for n, ap in rows))
        if cfg.save_results and cfg.output_dir:
            write_results(evaluator, Path(cfg.output_dir) / "results.json")
        if cfg.draw_images and cfg.output_dir:
            draw_pictures(evaluator, Path(cfg.output_dir) / "pictures", cfg.draw_images)
        if cfg.eval_report:
            path = Path(cfg.eval_report, "" if prefix == "test" else "ema")
            name = source if prefix == "test" else f"{source} (EMA)"
            logger.info("report: %s", write_report(evaluator, path, name))
    return figures


def draw_pictures(evaluator: CocoEvaluator, directory: Path, number: int) -> None:
    """Draw the first images, each next to as many of its best detections as it has objects."""
    dataset, names = evaluator.dataset, evaluator.dataset.class_map.names
    directory.mkdir(exist_ok=True)
    # With --debug not all images were evaluated.
    numbered = enumerate(dataset.image_ids.tolist())
    evaluated = [(i, id_) for i, id_ in numbered if id_ in evaluator.results]
    for i, id_ in evaluated[:number]:
        truth = dataset.drawable_truth(id_)
        found = evaluator.drawable(id_, len(truth["labels"]))
        columns = {"ground truth": truth, "best detections": found}
        picture = side_by_side(dataset.image(i), columns, names)
        picture.save(directory / f"{Path(dataset.file_name(i)).stem}.jpg", quality=92)


def write_results(evaluator: CocoEvaluator, path: Path) -> None:
    """Boxes, and masks in a file of their own, as COCO's server expects them."""
    detections = evaluator.detections
    path.write_text(json.dumps(detections))
    logger.info("%d detections in %s", len(detections), path)
    if evaluator.dataset.masks:
        path.with_stem(f"{path.stem}_segm").write_text(json.dumps(evaluator.segmentations))


def check_queries(dataset: CocoDetection, cfg: Config) -> None:
    """UserError if a training image has more objects than the model has queries."""
    queries = cfg.num_queries * max(cfg.num_patterns, 1)
    count, name = dataset.most_objects()
    if count > queries and find_model(cfg.modelname).detector.has_queries:
        problem = f"{name} has {count} objects, but the model only {queries} queries"
        raise UserError(f"num_queries: {problem}; use --num_queries {count} or more")


def check_only(cfg: Config) -> None:
    """Say what is in the data set; UserError if training with these options would fail."""
    train_set = build_dataset(cfg, "train")
    check_queries(train_set, cfg)
    build_loader(train_set, cfg, train=True)
    val_set = build_dataset(cfg, "val", train_set.class_map)
    on_rank0(lambda: check_data(train_set, val_set, cfg))


def train(cfg: Config, device: torch.device, argv: Sequence[str]) -> None:
    """Train from scratch or from a checkpoint, evaluating after every epoch."""
    on_rank0(lambda: check_installed(cfg.logger))
    output_dir = on_rank0(lambda: prepare_output_dir(cfg))
    with claimed(output_dir), StopRequest() as stop:
        trainer = Trainer(cfg, device, stop)
        if output_dir and should_overwrite(cfg):
            on_rank0(lambda: remove_run(output_dir))
        on_rank0(lambda: prepare_output_dir(trainer.state.cfg, argv))
        if output_dir is None:
            logger.warning("no --output_dir: nothing of this run will be saved")
        trainer.train_epochs()


def evaluate_only(cfg: Config, device: torch.device) -> None:
    """--eval and --test: evaluate a checkpoint, or write its detections."""
    source = on_rank0(lambda: find_resume(cfg))
    if not source:
        raise UserError("resume: --eval and --test need a checkpoint, --resume FILE")
    checkpoint = read_checkpoint(source)
    if cfg.max_enlargement:  # the sizes of its training
        saved = checkpoint.get("config", {})
        sizes = {name: value for name, value in saved.items() if name.startswith("data_aug")}
        cfg = dataclasses.replace(cfg, **sizes)
    output_dir = on_rank0(lambda: prepare_output_dir(cfg))
    if cfg.test and output_dir is None:
        raise UserError("output_dir: --test needs it for its detections")
    dataset = build_dataset(cfg, "test" if cfg.test else "val", class_map_of(checkpoint, cfg))
    cfg = dataclasses.replace(cfg, num_classes=dataset.class_map.num_classes)
    model, criterion, postprocess = build_model(cfg)
    state = TrainState(cfg, model.place(device), dataset.class_map)
    state.load(checkpoint, source)
    if cfg.use_ema and state.ema is None:
        logger.warning("use_ema: %s contains no averaged weights (ema_model)", source)
    loader = build_loader(dataset, cfg, train=False)
    if cfg.test:
        evaluator = CocoEvaluator(dataset)
        evaluate(model, None, postprocess, loader, evaluator, cfg)
        name = f"detections_test-dev2017_{cfg.modelname}_results.json"
        if rank() == 0:
            write_results(evaluator, output_dir / name)
    else:
        figures = evaluate_state(state, criterion, postprocess, loader, source)
        if output_dir and rank() == 0:
            (output_dir / "eval.json").write_text(json.dumps(figures, indent=2) + "\n")
