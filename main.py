"""Train, evaluate or test a detector: `python main.py --help`."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

from datasets.coco import ClassMap, CocoDetection, build_dataset, collate
from datasets.coco_eval import CocoEvaluator
from engine import NonFiniteLoss, evaluate, train_one_epoch
from models import build_model
from models.matcher import MatchingLog
from util.checkpoint import (
    latest_checkpoint,
    load_backbone,
    load_weights,
    num_classes_of,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from util.config import Config, parse_command_line
from util.distributed import choose_device, refuse_many_processes, seed_everything
from util.ema import ModelEma
from util.errors import UserError
from util.logging import RunLog, setup_logging
from util.optim import build_optimizer, build_scheduler

logger = logging.getLogger("main")


def prepare_output_dir(cfg: Config, argv: Sequence[str] | None = None) -> Path | None:
    """Make the output directory, if one is named, and with `argv` keep config and command there."""
    if not cfg.output_dir:
        return None
    path = Path(cfg.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if argv is not None:
            (path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
            with open(path / "command.txt", "a") as file:
                file.write(shlex.join(["python", "main.py", *argv]) + "\n")
    except OSError as e:
        raise UserError(f"output_dir: {path} cannot be written: {e.strerror}") from e
    return path


def read_resume(cfg: Config) -> dict | None:
    """The checkpoint that --resume names; None without it, or where auto finds nothing yet."""
    if cfg.resume == "auto":
        if not cfg.output_dir:
            raise UserError("resume: auto looks in --output_dir, which is not given")
        found = latest_checkpoint(cfg.output_dir)
        logger.info("resume: %s", found[0] if found else "no checkpoint yet, starting anew")
        return found[1] if found else None
    return read_checkpoint(cfg.resume) if cfg.resume else None


def class_map_of(checkpoint: dict | None) -> ClassMap | Callable | None:
    """The labels that a checkpoint was trained with, which the data are to be read with."""
    if checkpoint is None:
        return None
    if "class_map" in checkpoint:
        return ClassMap.from_state_dict(checkpoint["class_map"])
    num_classes = num_classes_of(checkpoint)
    # Without a class head it is no detector's; loading its weights will say what is wrong.
    return partial(ClassMap.of_released, num_classes=num_classes) if num_classes else None


def build_loader(dataset: CocoDetection, cfg: Config, train: bool) -> DataLoader:
    """Order depends on the seed and the epoch alone, never on the process's random state."""
    sampler = DistributedSampler(dataset, 1, 0, shuffle=train, seed=cfg.seed)
    return DataLoader(
        dataset,
        cfg.batch_size,
        sampler=sampler,
        drop_last=train and len(dataset) >= cfg.batch_size,
        num_workers=cfg.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=cfg.num_workers > 0,
        generator=torch.Generator().manual_seed(cfg.seed),
    )


class Run:
    """What a training run is made of, and how it is saved and taken up again."""

    def __init__(self, cfg: Config, device: torch.device, class_map: ClassMap, steps: int = 1):
        self.cfg, self.device, self.class_map = cfg, device, class_map
        self.epoch = cfg.start_epoch - 1  # the last complete one
        model, criterion, self.postprocess = build_model(cfg)
        if device.type == "cpu":  # where convolutions are a tenth to a fifth faster so
            model.backbone.to(memory_format=torch.channels_last)
        self.model, self.criterion = model.to(device), criterion.to(device)
        self.optimizer = build_optimizer(self.model, cfg)
        self.scheduler, self.every_step = build_scheduler(self.optimizer, cfg, steps)
        fp16 = cfg.amp and cfg.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.ema = ModelEma(self.model, cfg.ema_decay) if cfg.use_ema else None
        self.matches = None  # of the last evaluation, with --log_matching

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema_model": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "rng": rng_state(),
            "matches": self.matches,
            "config": dataclasses.asdict(self.cfg),
            "class_map": self.class_map.state_dict(),
        }

    def begin(self, checkpoint: dict | None) -> None:
        """Take up the run of a checkpoint, or begin one with a pretrained model's weights or the
        backbone's alone."""
        if checkpoint is not None:
            self.load(checkpoint)
            return self.resume(checkpoint)
        if self.cfg.pretrain_model_path:
            path, ignore = self.cfg.pretrain_model_path, self.cfg.finetune_ignore
            report = load_weights(self.model, path, strict=False, ignore=ignore)
            logger.info("%s:\n%s", path, report)
        elif self.cfg.pretrained_backbone:
            load_backbone(
                self.model.backbone[0],
                self.cfg.backbone,
                self.cfg.backbone_weights,
                self.cfg.backbone_dir,
            )
        if self.ema:
            self.ema.load_state_dict(self.model.state_dict())

    def load(self, checkpoint: dict) -> None:
        """The weights of a checkpoint, and of its average."""
        load_weights(self.model, checkpoint, source=self.cfg.resume)
        if self.ema:
            self.ema.load_state_dict(checkpoint.get("ema_model") or self.model.state_dict())

    def resume(self, checkpoint: dict) -> None:
        """Go on from the epoch, and with the optimiser, schedule and random state of a checkpoint.

        The authors' checkpoints order the optimiser's state otherwise and hold no random state:
        of these only the epoch is taken.
        """
        self.epoch = checkpoint.get("epoch", self.epoch)
        if "rng" not in checkpoint:
            logger.warning("resume: no optimiser of ours in the file, so the optimiser starts anew")
            return
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as e:
            raise UserError(
                f"resume: {self.cfg.resume} has other parameter groups; go on with its "
                "own lr, lr_backbone, weight_decay, param_dict_type and pretrained_backbone"
            ) from e
        schedule, wanted = checkpoint["lr_scheduler"], getattr(self.scheduler, "total_steps", None)
        if schedule.get("total_steps") != wanted:
            raise UserError(
                f"resume: the learning rate of {self.cfg.resume} has another course; go on with "
                "its own onecyclelr, epochs and batch_size"
            )
        self.scheduler.load_state_dict(schedule)
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.matches = checkpoint.get("matches")
        set_rng_state(checkpoint["rng"])

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.state_dict())

    def evaluate(self, loader: DataLoader, output_dir: Path | None) -> dict:
        """Evaluate the model, and its average where one is kept; returns log.txt's `test_` keys."""
        stats = {}
        for prefix, model in (("test", self.model), ("ema_test", self.ema and self.ema.module)):
            if model is None:
                continue
            evaluator, matching = CocoEvaluator(loader.dataset), None
            if self.cfg.log_matching and model is self.model:
                matching = MatchingLog(self.criterion.matcher, self.matches)
                self.matches = matching.matches
            parts = (model, self.criterion, self.postprocess, loader, evaluator, self.device)
            found = evaluate(*parts, self.cfg, matching=matching)
            stats |= {f"{prefix}_{k}": v for k, v in found.items()}
            logger.info("%s\n%s", prefix, evaluator.table())
            if self.cfg.eval_per_class:
                rows = evaluator.per_class().items()
                logger.info("AP by class\n%s", "\n".join(f"  {ap:6.3f}  {n}" for n, ap in rows))
            if self.cfg.save_results and output_dir:
                write_results(evaluator, output_dir / "results.json")
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
    checkpoint = read_resume(cfg)
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
    run = Run(cfg, device, class_map, len(train_loader))
    run.begin(checkpoint)
    del checkpoint
    output_dir = prepare_output_dir(cfg, argv)
    if output_dir is None:
        logger.warning("nothing of this run will be kept: there is no --output_dir")
    log = RunLog(output_dir) if output_dir else None
    num_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    logger.info(
        "%s on %s: %d classes, %.1f M trained parameters, %d training images, %d to evaluate",
        *(cfg.modelname, device, class_map.num_classes, num_parameters / 1e6),
        *(len(train_set), len(val_loader.dataset)),
    )
    start, first = time.perf_counter(), run.epoch + 1
    for epoch in range(first, cfg.epochs):
        epoch_start = time.perf_counter()
        train_set.set_epoch(epoch)
        train_loader.sampler.set_epoch(epoch)
        try:
            stats = train_one_epoch(
                *(run.model, run.criterion, train_loader, run.optimizer, device, epoch, cfg),
                scaler=run.scaler,
                step_scheduler=run.scheduler if run.every_step else None,
                ema=run.ema if epoch >= cfg.ema_epoch else None,
            )
        except NonFiniteLoss as e:
            if output_dir is None:
                raise
            path = output_dir / "checkpoint_nonfinite.pth"
            save_checkpoint(path, run.state_dict() | {"nonfinite": True})
            raise NonFiniteLoss(f"{e}; the weights before that step are in {path}") from None
        if not run.every_step:
            run.scheduler.step()
        run.epoch = epoch
        if output_dir:
            run.save(output_dir / "checkpoint.pth")
            if (epoch + 1) % cfg.lr_drop == 0 or (epoch + 1) % cfg.save_checkpoint_interval == 0:
                run.save(output_dir / f"checkpoint{epoch:04}.pth")
        test_stats = run.evaluate(val_loader, output_dir)
        if output_dir and cfg.log_matching:  # the next epoch compares its matches with these
            run.save(output_dir / "checkpoint.pth")
        if log:
            log.write(
                {f"train_{k}": v for k, v in stats.items()}
                | test_stats
                | {"epoch": epoch, "n_parameters": num_parameters}
                | {"epoch_time": str(timedelta(seconds=int(time.perf_counter() - epoch_start)))}
            )
        average = (time.perf_counter() - start) / (epoch + 1 - first)
        left = timedelta(seconds=int(average * (cfg.epochs - epoch - 1)))
        logger.info(
            "epoch %d: loss %.3f, AP %.3f, AP50 %.3f, %.1f images/s, left %s",
            *(epoch, stats["loss"], *test_stats["test_coco_eval_bbox"][:2]),
            *(stats["images_per_second"], left),
        )
    if log:
        log.close()
    logger.info("done in %s", timedelta(seconds=int(time.perf_counter() - start)))


def evaluate_only(cfg: Config, device: torch.device) -> None:
    """--eval and --test: no training, only what a checkpoint detects."""
    checkpoint = read_resume(cfg)
    if checkpoint is None:
        raise UserError("resume: --eval and --test need the checkpoint to evaluate, --resume FILE")
    output_dir = prepare_output_dir(cfg)
    if cfg.test and output_dir is None:
        raise UserError("output_dir: --test writes its detections there")
    split = "test" if cfg.test else "val"
    dataset = build_dataset(cfg, split, class_map_of(checkpoint))
    cfg = dataclasses.replace(cfg, num_classes=dataset.class_map.num_classes)
    run = Run(cfg, device, dataset.class_map)
    run.load(checkpoint)
    loader = build_loader(dataset, cfg, train=False)
    if not cfg.test:
        stats = run.evaluate(loader, output_dir)
        if output_dir:
            (output_dir / "eval.json").write_text(json.dumps(stats, indent=2) + "\n")
        return
    evaluator = CocoEvaluator(dataset)
    parts = (run.model, run.criterion, run.postprocess, loader, evaluator, device)
    evaluate(*parts, cfg, annotated=False)
    name = f"detections_test-dev2017_{cfg.modelname}_results.json"
    write_results(evaluator, output_dir / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a loss that is not finite; 2 for a mistake of the user."""
    setup_logging()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        cfg = parse_command_line(argv)
        refuse_many_processes()
        device = choose_device(cfg.device)
        seed_everything(cfg.seed)
        if cfg.eval or cfg.test:
            evaluate_only(cfg, device)
        else:
            train(cfg, device, argv)
    except (UserError, OSError) as e:  # an OSError names its file
        print(f"main.py: error: {e}", file=sys.stderr)
        return 2
    except NonFiniteLoss as e:
        print(f"main.py: stopped: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
