"""A training run: what it is made of, its loop, and how it is saved and taken up to the step."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.coco import ClassMap, CocoDetection, build_dataset
from datasets.coco_eval import CocoEvaluator
from datasets.loader import build_loader
from engine import NonFiniteLoss, evaluate, train_one_epoch
from models import build_model
from models.matcher import MatchingLog
from util.checkpoint import (
    copy_checkpoint,
    latest_checkpoint,
    load_backbone,
    load_weights,
    num_classes_of,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from util.config import Config
from util.distributed import by_first, gather, rank, seed_everything, take_from_first, world_size
from util.ema import ModelEma
from util.errors import UserError
from util.logging import Averages, RunLog
from util.optim import build_optimizer, build_scheduler
from util.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)

PROGRESS = ("epoch", "step", "trained", "seconds", "best_ap", "matches")  # of a run; see `Run`


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


@contextlib.contextmanager
def claimed(output_dir: Path | None) -> Iterator[None]:
    """Keeps other runs out of the output directory; UserError if one is in it.

    The claim is a lock on a file, which ends with its process, whatever ends that.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            file = stack.enter_context(open(output_dir / "run.lock", "a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data workers do not inherit it
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"output_dir: {output_dir} is in use by {holder}; name another directory"
                ) from None
            except OSError as e:  # some network file systems know no locks
                logger.warning("%s cannot be locked (%s): see to it", output_dir, e.strerror)
            with contextlib.suppress(OSError):  # a full disk, which saving will speak of
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()

        if output_dir:
            by_first(claim)
        yield


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


class Run:
    """Model, optimiser and everything else that a run consists of, and where it stands.

    `epoch` is the last that is trained, `step` counts those done in the next one, whose means so
    far are `averages`; `trained` are the figures of a trained epoch that is not evaluated yet.
    """

    def __init__(self, cfg: Config, device: torch.device, class_map: ClassMap, steps: int = 1):
        self.cfg, self.device, self.class_map = cfg, device, class_map
        self.epoch, self.step = cfg.start_epoch - 1, 0
        self.averages, self.trained, self.seconds = Averages(), None, 0.0
        self.best_ap, self.matches = -1.0, None  # matches: of the last evaluation
        model, criterion, self.postprocess = build_model(cfg)
        if device.type == "cpu":  # where convolutions are a tenth to a fifth faster so
            model.backbone.to(memory_format=torch.channels_last)
        self.model, self.criterion = model.to(device), criterion.to(device)
        self.parallel: nn.Module = self.model  # what is trained, wrapped where there are processes
        self.optimizer = build_optimizer(self.model, cfg)
        self.scheduler, self.every_step = build_scheduler(self.optimizer, cfg, steps)
        fp16 = cfg.amp and cfg.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.ema = ModelEma(self.model, cfg.ema_decay) if cfg.use_ema else None

    @property
    def source(self) -> str:
        """What an error calls the checkpoint of --resume."""
        cfg = self.cfg
        return f"the newest of {cfg.output_dir}" if cfg.resume == "auto" else cfg.resume

    def state_dict(self) -> dict:
        """What a checkpoint holds. All processes have to ask for it together."""
        return {name: getattr(self, name) for name in PROGRESS} | {
            "model": self.model.state_dict(),
            "ema_model": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": self.averages.state_dict(),
            "rng": gather(rng_state()),  # of every process
            "config": dataclasses.asdict(self.cfg),
            "class_map": self.class_map.state_dict(),
        }

    def begin(self, checkpoint: dict | None) -> None:
        """Take up the run of a checkpoint, or begin one with a pretrained model's weights or the
        backbone's alone."""
        cfg = self.cfg
        seed_everything(cfg.seed + rank())  # the weights are the same in all processes
        if checkpoint is not None:
            self.load(checkpoint)
            return self.resume(checkpoint)
        if path := cfg.pretrain_model_path:
            report = load_weights(self.model, path, strict=False, ignore=cfg.finetune_ignore)
            logger.info("%s:\n%s", path, report)
        elif cfg.pretrained_backbone:
            name, path, directory = cfg.backbone, cfg.backbone_weights, cfg.backbone_dir
            load_backbone(self.model.backbone[0], name, path, directory)
        if self.ema:
            self.ema.load_state_dict(self.model.state_dict())

    def load(self, checkpoint: dict) -> None:
        """The weights of a checkpoint, and of its average."""
        load_weights(self.model, checkpoint, source=self.source)
        if self.ema:
            self.ema.load_state_dict(checkpoint.get("ema_model") or self.model.state_dict())

    def resume(self, checkpoint: dict) -> None:
        """Go on from the step, and with the optimiser, schedule and random state of a checkpoint.

        The authors' checkpoints order the optimiser's state otherwise and hold no random state:
        of these only the epoch is taken. With another number of processes or another batch size,
        the epoch goes on behind as many images, with random numbers of its own.
        """
        self.epoch = checkpoint.get("epoch", self.epoch)
        if "rng" not in checkpoint:
            logger.warning("resume: no optimiser of ours in the file, so the optimiser starts anew")
            return
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as e:
            raise UserError(
                f"resume: {self.source} has other parameter groups; go on with its own "
                "optimizer, lr, lr_backbone, weight_decay, param_dict_type and pretrained_backbone"
            ) from e
        schedule, wanted = checkpoint["lr_scheduler"], getattr(self.scheduler, "total_steps", None)
        if schedule.get("total_steps") != wanted:
            raise UserError(
                f"resume: the learning rate of {self.source} has another course; go on with "
                "its own onecyclelr, epochs, batch_size, accumulate and number of processes"
            )
        self.scheduler.load_state_dict(schedule)
        self.scaler.load_state_dict(checkpoint["scaler"])
        for name in PROGRESS:
            setattr(self, name, checkpoint[name])
        self.averages.join([checkpoint["averages"]])
        images = lambda cfg, processes: cfg["batch_size"] * cfg["accumulate"] * processes
        before = images(checkpoint["config"], len(checkpoint["rng"]))
        now = images(dataclasses.asdict(self.cfg), world_size())
        self.step = checkpoint["step"] * before // now
        if len(checkpoint["rng"]) == world_size():
            set_rng_state(checkpoint["rng"][rank()])

    def save(self, name: str = "checkpoint.pth", **more) -> None:
        """Write the state to the output directory, if there is one, by the first process."""
        if self.cfg.output_dir:
            path, state = Path(self.cfg.output_dir) / name, self.state_dict() | more
            by_first(lambda: save_checkpoint(path, state, self.cfg.keep_checkpoints))

    def copy(self, name: str) -> None:
        """Keep the checkpoint just saved under another name as well."""
        if self.cfg.output_dir:
            path = Path(self.cfg.output_dir) / "checkpoint.pth"
            by_first(lambda: copy_checkpoint(path, path.with_name(name)))

    def train_epoch(self, loader: DataLoader, stop: StopRequest) -> None:
        """Train the next epoch, from where it stands, saving when it is time or asked for."""
        cfg, epoch = self.cfg, self.epoch + 1
        loader.dataset.set_epoch(epoch)
        loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, self.step * cfg.accumulate
        begun = saved = time.monotonic()
        before = self.seconds

        def wishes() -> list[bool]:
            minutes = (time.monotonic() - saved) / 60
            return [rank() == 0 and minutes > cfg.save_every_minutes, stop.signum != 0]

        def after_step(wished: list[bool]) -> None:
            nonlocal saved
            self.seconds = before + time.monotonic() - begun
            if any(wished):
                self.save()
                saved = time.monotonic()
            if wished[1]:
                raise Stopped(stop.signum)

        try:
            self.trained = train_one_epoch(self, loader, wishes, after_step)
        except NonFiniteLoss as e:
            if not cfg.output_dir:
                raise
            self.save("checkpoint_nonfinite.pth", nonfinite=True)
            path = Path(cfg.output_dir) / "checkpoint_nonfinite.pth"
            raise NonFiniteLoss(f"{e}; the weights before that step are in {path}") from None
        if not self.every_step:
            self.scheduler.step()
        # Statistics of batches are each process's own until the next step.
        take_from_first(self.model.buffers())
        if self.ema:
            take_from_first(self.ema.module.buffers())
        self.epoch, self.step, self.averages = epoch, 0, Averages()

    def train(self, train_loader: DataLoader, val_loader: DataLoader, stop: StopRequest) -> None:
        """Train and evaluate every epoch that is left, and log each once."""
        cfg, first = self.cfg, self.epoch + 1 - (self.trained is not None)
        if world_size() > 1:
            norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
            self.parallel = DistributedDataParallel(self.model, broadcast_buffers=bool(norms))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        together = f" in {world_size()} processes" if world_size() > 1 else ""
        logger.info(
            f"{cfg.modelname} on {self.device}{together}: {self.class_map.num_classes} classes, "
            f"{trained / 1e6:.1f} M trained parameters, {len(train_loader.dataset)} training "
            f"images, {len(val_loader.dataset)} to evaluate"
        )
        log = RunLog(cfg.output_dir, first) if cfg.output_dir and rank() == 0 else None
        begun = time.monotonic()
        for epoch in range(first, cfg.epochs):
            if self.trained is None:
                self.train_epoch(train_loader, stop)
                self.save()
            start = time.monotonic()
            with stop.obeyed_at_once() if cfg.output_dir else contextlib.nullcontext():
                stats = self.evaluate(val_loader)
            seconds = self.seconds + time.monotonic() - start
            line = {f"train_{k}": v for k, v in self.trained.items()} | stats
            line |= {"epoch": epoch, "n_parameters": trained}
            line |= {"epoch_time": str(timedelta(seconds=int(seconds)))}
            by_first(lambda line=line: log and log.write(line))
            done, self.trained, self.seconds = self.trained, None, 0.0
            ap = stats.get("ema_test_coco_eval_bbox", stats["test_coco_eval_bbox"])[0]
            is_best, self.best_ap = ap > self.best_ap, max(ap, self.best_ap)
            self.save()
            if is_best:
                self.copy("checkpoint_best.pth")
            if (epoch + 1) % cfg.lr_drop == 0 or (epoch + 1) % cfg.save_checkpoint_interval == 0:
                self.copy(f"checkpoint{epoch:04}.pth")
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

    def evaluate(self, loader: DataLoader) -> dict:
        """Evaluate the model, and its average where one is kept; returns log.txt's `test_` keys."""
        stats = {}
        for prefix, model in (("test", self.model), ("ema_test", self.ema and self.ema.module)):
            if model is None:
                continue
            evaluator, matching = CocoEvaluator(loader.dataset), None
            if self.cfg.log_matching and model is self.model:
                matching = MatchingLog(self.criterion.matcher, self.matches)
            found = evaluate(self, model, loader, evaluator, matching=matching)
            self.matches = matching.matches if matching else self.matches
            stats |= {f"{prefix}_{k}": v for k, v in found.items()}
            logger.info("%s\n%s", prefix, evaluator.table())
            if self.cfg.eval_per_class:
                rows = evaluator.per_class().items()
                logger.info("AP by class\n%s", "\n".join(f"  {ap:6.3f}  {n}" for n, ap in rows))
            if self.cfg.save_results and self.cfg.output_dir:
                write_results(evaluator, Path(self.cfg.output_dir) / "results.json")
        return stats


def write_results(evaluator: CocoEvaluator, path: Path) -> None:
    detections = evaluator.detections
    if rank() == 0:
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
        run = Run(cfg, device, class_map, len(train_loader) // cfg.accumulate)
        run.begin(checkpoint)
        del checkpoint
        by_first(lambda: prepare_output_dir(cfg, argv))
        if output_dir is None:
            logger.warning("nothing of this run will be kept: there is no --output_dir")
        run.train(train_loader, val_loader, stop)


def evaluate_only(cfg: Config, device: torch.device) -> None:
    """--eval and --test: no training, only what a checkpoint detects."""
    checkpoint = read_resume(cfg)
    if checkpoint is None:
        raise UserError("resume: --eval and --test need the checkpoint to evaluate, --resume FILE")
    output_dir = by_first(lambda: prepare_output_dir(cfg))
    if cfg.test and output_dir is None:
        raise UserError("output_dir: --test writes its detections there")
    split = "test" if cfg.test else "val"
    dataset = build_dataset(cfg, split, class_map_of(checkpoint))
    cfg = dataclasses.replace(cfg, num_classes=dataset.class_map.num_classes)
    run = Run(cfg, device, dataset.class_map)
    run.load(checkpoint)
    loader = build_loader(dataset, cfg, train=False)
    if not cfg.test:
        stats = run.evaluate(loader)
        if output_dir and rank() == 0:
            (output_dir / "eval.json").write_text(json.dumps(stats, indent=2) + "\n")
        return
    evaluator = CocoEvaluator(dataset)
    evaluate(run, run.model, loader, evaluator, annotated=False)
    name = f"detections_test-dev2017_{cfg.modelname}_results.json"
    write_results(evaluator, output_dir / name)
