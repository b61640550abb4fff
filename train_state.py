"""A training run: what it is made of, how it is saved, and how it is taken up to the step."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models import build_model
from models.class_map import ClassMap
from models.errors import UserError
from models.weights import load_backbone, num_classes_of
from util.checkpoint import (
    copy_checkpoint,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from util.config import Config
from util.distributed import by_first, gather, rank, seed_everything, world_size
from util.download import local_file
from util.ema import ModelEma
from util.logging import Averages
from util.optim import build_optimizer, build_scheduler, load_released_state, move_to

logger = logging.getLogger(__name__)

PROGRESS = ("epoch", "step", "trained", "seconds", "best_ap", "matches")  # of a run; see `Run`
RATES = ("lr", "lr_backbone", "lr_linear_proj_mult", "weight_decay")  # which a resumed run keeps
DROPS = ("multi_step_lr", "lr_drop", "lr_drop_list")  # these, too, unless they are overridden
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # variables of who starts a run


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


def overwrites(cfg: Config) -> bool:
    """Whether to delete the run in the output directory: not if it is this one, restarted."""
    return cfg.overwrite and not any(int(os.environ.get(name) or 0) for name in RESTARTS)


def remove_run(output_dir: Path) -> None:
    """Delete a run's checkpoints and logs."""
    for pattern in ("checkpoint*.pth", "log.txt", "events.out.tfevents.*"):
        for path in output_dir.glob(pattern):
            path.unlink(missing_ok=True)


def find_resume(cfg: Config, training: bool = False) -> str:
    """The file or URL of the checkpoint to load, "" for none: the one that --resume names, or for
    auto the newest.

    In training, a run that the output directory holds is resumed whatever --resume says, as in
    DINO's code, unless --resume names another checkpoint of it or --overwrite starts anew.
    """
    auto, output_dir = cfg.resume == "auto", Path(cfg.output_dir)
    if auto and not cfg.output_dir:
        raise UserError("resume: auto looks in --output_dir, which is not given")
    is_own = bool(cfg.resume) and output_dir.resolve() == Path(cfg.resume).parent.resolve()
    if training and overwrites(cfg):
        if is_own:
            raise UserError(f"overwrite: would remove {cfg.resume}; name another --output_dir")
        return cfg.resume
    if not auto and (is_own or not training or not cfg.output_dir):
        return cfg.resume
    found = latest_checkpoint(output_dir)
    if found is None:
        if auto:
            logger.info("resume: no checkpoint yet, starting anew")
        return "" if auto else cfg.resume
    path, state = found
    if auto:
        logger.info("resume: %s", path)
    else:
        logger.warning(
            "output_dir: %s holds a run; resuming it after epoch %s%s; --overwrite starts anew",
            output_dir,
            state.get("epoch"),
            f", not {cfg.resume}" if cfg.resume else "",
        )
    return str(path)


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
        self.best_ap, self.matches = -1.0, None  # of the last evaluation, with --log_matching
        model, criterion, self.postprocess = build_model(cfg)
        if device.type == "cpu":  # where convolutions are a tenth to a fifth faster so
            model.backbone.to(memory_format=torch.channels_last)
        self.model, self.criterion = model.to(device), criterion.to(device)
        self.parallel: nn.Module = self.model  # what is trained, wrapped where there are processes
        self.optimizer = build_optimizer(self.model, cfg)
        self.steps = steps  # of an epoch
        self.scheduler, self.every_step = build_scheduler(self.optimizer, cfg, steps)
        fp16 = cfg.amp and cfg.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.ema: ModelEma | None = None  # until `begin_average`

    def begin_average(self) -> None:
        """Keep an average of the weights from now on, which begins with those of now."""
        self.ema = ModelEma(self.model, self.cfg.ema_decay)

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

    def begin(self, checkpoint: dict | None = None, source: str = "") -> None:
        """Take up the run of a checkpoint, called `source` in errors, or begin one with a
        pretrained model's weights or the backbone's alone."""
        cfg = self.cfg
        seed_everything(cfg.seed + rank())  # the weights are the same in all processes
        if checkpoint is not None:
            self.load(checkpoint, source)
            return self.resume(checkpoint, source)
        if path := cfg.pretrain_model_path:
            weights, ignore = read_checkpoint(path), cfg.finetune_ignore
            report = load_weights(self.model, weights, strict=False, ignore=ignore, source=path)
            logger.info("%s:\n%s", path, report)
        elif cfg.pretrained_backbone:
            path = cfg.backbone_weights and str(local_file(cfg.backbone_weights))
            load_backbone(self.model.backbone[0], cfg.backbone, path, cfg.backbone_dir)
        if cfg.drop_lr_now or cfg.override_resumed_lr_drop:
            logger.info("drop_lr_now, override_resumed_lr_drop: nothing is resumed, no effect")

    def load(self, checkpoint: dict, source: str) -> None:
        """The weights of a checkpoint, and with --use_ema of its average, if it has one."""
        load_weights(self.model, checkpoint, source=source)
        if self.cfg.use_ema and checkpoint.get("ema_model"):
            self.begin_average()
            self.ema.load_state_dict(checkpoint["ema_model"])

    def resume(self, checkpoint: dict, source: str) -> None:
        """Go on from the step, and with the optimiser, schedule and random state of a checkpoint.

        The authors' checkpoints hold no random state, and their schedules are not ours: of these
        the epoch and, where it fits, the optimiser's state are taken, and the learning rates are
        those of this config in that epoch. With another number of processes or another batch size,
        the epoch goes on behind as many images, with random numbers of its own.
        """
        self.epoch = checkpoint.get("epoch", self.epoch)
        if "rng" in checkpoint:
            self.resume_own(checkpoint, source)
        else:
            taken = load_released_state(self.optimizer, self.model, checkpoint)
            how = "the optimiser state of" if taken else "a new optimiser, no state fits in"
            logger.warning("resume: epoch %d is next, with %s %s", self.epoch + 1, how, source)
            self.move_schedule()
        if self.cfg.drop_lr_now:
            # Once: not again when the run that did so is resumed itself, with rates as they were.
            if (
                checkpoint.get("config", {}).get("drop_lr_now")
                and not self.cfg.override_resumed_lr_drop
            ):
                logger.info("drop_lr_now: the rates of this run were divided before")
            else:
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.1

    def move_schedule(self) -> None:
        """Set the rates of the epoch to come."""
        move_to(self.scheduler, (self.epoch + 1) * (self.steps if self.every_step else 1))

    def keep_rates(self, before: dict) -> None:
        """Keep the learning rates, drops and weight decay of the config `before`, and say which of
        today's have no effect."""
        names = RATES if self.cfg.override_resumed_lr_drop else (*RATES, *DROPS)
        now = {name: getattr(self.cfg, name) for name in names}
        kept = {k: before[k] for k, v in now.items() if before.get(k, v) != v}
        if kept:
            logger.warning(
                "resume: %s of the checkpoint stay; %s take no effect%s",
                ", ".join(f"{k} {v}" for k, v in kept.items()),
                ", ".join(f"{k} {now[k]}" for k in kept),
                "" if kept.keys() <= set(RATES) else " without --override_resumed_lr_drop",
            )
            self.cfg = dataclasses.replace(self.cfg, **kept)

    def resume_own(self, checkpoint: dict, source: str) -> None:
        self.keep_rates(checkpoint["config"])
        self.scheduler, _ = build_scheduler(self.optimizer, self.cfg, self.steps)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as e:
            raise UserError(
                f"resume: {source} has other parameter groups; go on with its own "
                "optimizer, lr, lr_backbone, weight_decay, param_dict_type and pretrained_backbone"
            ) from e
        schedule, wanted = checkpoint["lr_scheduler"], getattr(self.scheduler, "total_steps", None)
        if schedule.get("total_steps") != wanted:
            raise UserError(
                f"resume: the learning rate of {source} has another course; go on with "
                "its own onecyclelr, epochs, batch_size, accumulate and number of processes"
            )
        if self.cfg.override_resumed_lr_drop:
            self.scheduler.base_lrs = [g["initial_lr"] for g in self.optimizer.param_groups]
            self.move_schedule()
        else:
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
