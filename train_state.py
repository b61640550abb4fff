"""The state of a training run: what a checkpoint holds, how it is saved and resumed."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.class_map import COCO_NAMES, COCO_NUM_CLASSES, ClassMap
from models.download import local_file
from models.errors import UserError
from models.registry import find_model
from models.weights import (
    load_backbone,
    load_weights,
    num_classes_of,
    state_dict_of,
    with_matched_rows,
)
from util.checkpoint import read_checkpoint, rng_state, save_checkpoint, set_rng_state
from util.config import Config
from util.distributed import gather, on_rank0, rank, seed_everything, world_size
from util.ema import ModelEma
from util.logging import Averages
from util.optim import build_optimizer, build_scheduler, load_released_state, move_to

logger = logging.getLogger(__name__)

# Fixed for a resumed run; the drops, unless override_resumed_lr_drop.
RATES = ("lr", "lr_backbone", "lr_linear_proj_mult", "weight_decay", "warmup_epochs")
DROPS = ("multi_step_lr", "lr_drop", "lr_drop_list")


def class_map_of(checkpoint: dict, cfg: Config) -> ClassMap | Callable | None:
    """The labels that a checkpoint was trained with, as `build_dataset` takes them."""
    if "class_map" in checkpoint:
        return ClassMap.from_state_dict(checkpoint["class_map"])
    num_classes = num_classes_of(checkpoint, cfg.class_loss)
    how = {"num_classes": num_classes, "first": find_model(cfg.modelname).detector.first_id}
    # Without a class head it is not a detector's; loading its weights will report that.
    return partial(ClassMap.of_released, **how) if num_classes else None


def known_classes(checkpoint: dict, class_loss: str) -> ClassMap:
    """The labels of a checkpoint as far as their names are known: saved with it, or COCO's."""
    if "class_map" in checkpoint:
        return ClassMap.from_state_dict(checkpoint["class_map"])
    class_loss = checkpoint.get("config", {}).get("class_loss", class_loss)
    number = num_classes_of(checkpoint, class_loss) or 0
    is_coco = number in (len(COCO_NAMES), COCO_NUM_CLASSES)
    return ClassMap.of_count(number) if is_coco else ClassMap(number, {}, {})


def keep_rates(cfg: Config, before: dict) -> Config:
    """`cfg` with the learning rates, drops and weight decay of the config of the resumed run."""
    names = RATES if cfg.override_resumed_lr_drop else (*RATES, *DROPS)
    given = {name: getattr(cfg, name) for name in names}
    kept = {k: before[k] for k, v in given.items() if before.get(k, v) != v}
    if kept:
        texts = [", ".join(f"{k} {values[k]}" for k in kept) for values in (before, given)]
        hint = " (--override_resumed_lr_drop changes the drops)" if kept.keys() & set(DROPS) else ""
        logger.warning("resume: keeping %s from the checkpoint; ignoring %s%s", *texts, hint)
    return dataclasses.replace(cfg, **kept)


@dataclass
class Position:
    """How far training has come."""

    epoch: int  # the last one trained
    step: int = 0  # steps taken in the next one
    trained: dict[str, float] | None = None  # figures of `epoch` until it is evaluated
    seconds: float = 0.0  # of training that is not logged yet
    best_ap: float = -1.0
    epochs_since_best: int = 0
    matches: dict[int, Tensor] | None = None  # of the last evaluation, with --log_matching
    averages: Averages = field(default_factory=Averages)  # over the steps of the next epoch


class TrainState:
    """Everything that a checkpoint holds. `ema`, the average of the weights, is None until it
    begins; `epoch_length` is in steps."""

    def __init__(self, cfg: Config, model: nn.Module, class_map: ClassMap, epoch_length: int = 1):
        self.cfg, self.model, self.class_map = cfg, model, class_map
        self.epoch_length = epoch_length
        self.device = next(model.parameters()).device
        if cfg.compile:
            model.compile_parts()
        self.ema: ModelEma | None = None
        self.optimizer = build_optimizer(model, cfg)
        self.schedule, self.every_step = build_scheduler(self.optimizer, cfg, epoch_length)
        fp16 = cfg.amp and cfg.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.position = Position(cfg.start_epoch - 1)

    def begin_average(self) -> None:
        self.ema = ModelEma(self.model, self.cfg.ema_decay, self.cfg.ema_warmup)

    def warmup(self, step: int) -> float:
        """The factor on the learning rates in the next epoch's step with this number, from 1."""
        begun = self.position.epoch + 1 + step / self.epoch_length
        return min(begun / self.cfg.warmup_epochs, 1.0) if self.cfg.warmup_epochs else 1.0

    def state_dict(self) -> dict:
        """What a checkpoint holds. Collective: all processes have to call it."""
        return vars(self.position) | {
            "model": self.model.state_dict(),
            "ema_model": self.ema.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": self.position.averages.state_dict(),
            "rng": gather(rng_state()),  # one for each process
            "config": dataclasses.asdict(self.cfg),
            "class_map": self.class_map.state_dict(),
        }

    def begin(self, checkpoint: dict | None = None, source: str = "") -> None:
        """Resume from a checkpoint, called `source` in errors, or initialise the model with the
        configured pretrained weights."""
        cfg = self.cfg
        seed_everything(cfg.seed + rank())  # only now: all processes drew the same weights
        if checkpoint is not None:
            return self.resume(checkpoint, source)
        if cfg.finetune:
            self.finetune()
        elif path := cfg.frozen_weights:
            load_weights(self.model.detr, read_checkpoint(path), source=path)
        elif path := cfg.pretrain_model_path:
            weights, ignore = read_checkpoint(path), cfg.finetune_ignore
            report = load_weights(self.model, weights, strict=False, ignore=ignore, source=path)
            logger.info("%s:\n%s", path, report)
        elif cfg.pretrained_backbone:
            path = cfg.backbone_weights and str(local_file(cfg.backbone_weights))
            load_backbone(self.model.image_backbone, cfg.backbone, path, cfg.backbone_dir)
        if cfg.drop_lr_now or cfg.override_resumed_lr_drop:
            logger.info("drop_lr_now, override_resumed_lr_drop: no effect, as no run is resumed")

    def finetune(self) -> None:
        """Load the weights of --finetune, their class rows matched by name. UserError if others do
        not fit the model."""
        path, ignore = self.cfg.finetune, self.cfg.finetune_ignore
        checkpoint = read_checkpoint(path)
        theirs = known_classes(checkpoint, self.cfg.class_loss)
        state = state_dict_of(checkpoint, path)
        state = with_matched_rows(state, self.model, self.class_map, theirs)
        report = load_weights(self.model, state, strict=False, ignore=ignore, source=path)
        if unfit := report.mismatched + report.missing + report.unexpected:
            problem = f"{path} does not fit the model in {len(unfit)} weights, first {unfit[0]}"
            remedy = "name its config or model with -c or -m, or skip them with --finetune_ignore"
            raise UserError(f"finetune: {problem}; {remedy}")
        classes = len(self.class_map.labels_in(theirs)), len(self.class_map.names)
        logger.info("finetune: %s: %d of %d classes are known by name", path, *classes)

    def load(self, checkpoint: dict, source: str) -> None:
        """Load a checkpoint's weights and, with --use_ema, their average, if it has one."""
        load_weights(self.model, checkpoint, source=source)
        if self.cfg.use_ema and checkpoint.get("ema_model"):
            self.begin_average()
            self.ema.load_state_dict(checkpoint["ema_model"])
            self.ema.updates = checkpoint.get("ema_updates", 0)

    def resume(self, checkpoint: dict, source: str) -> None:
        """Continue from a checkpoint's position with its optimiser, schedule and random state. Of a
        released one, only the epoch and, if it fits, the optimiser state are used."""
        self.load(checkpoint, source)
        if "rng" in checkpoint:
            self.resume_own(checkpoint, source)
        else:
            self.position.epoch = checkpoint.get("epoch", self.position.epoch)
            fits = load_released_state(self.optimizer, self.model, checkpoint)
            how = "the optimiser state of" if fits else "a new optimiser, as no state fits in"
            self.move_schedule()
            next_epoch = self.position.epoch + 1
            logger.warning("resume: next is epoch %d, with %s %s", next_epoch, how, source)
        is_divided = checkpoint.get("config", {}).get("drop_lr_now")
        if self.cfg.drop_lr_now and is_divided and not self.cfg.override_resumed_lr_drop:
            logger.info("drop_lr_now: the learning rates of this run were divided before")
        elif self.cfg.drop_lr_now:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.1

    def move_schedule(self) -> None:
        """Set the learning rates of the next epoch."""
        epoch = self.position.epoch + 1
        move_to(self.schedule, epoch * (self.epoch_length if self.every_step else 1))

    def resume_own(self, checkpoint: dict, source: str) -> None:
        """Resume from a checkpoint of this code, bit for bit. With another batch size or number of
        processes, the epoch continues after as many images; the latter changes random numbers."""
        self.cfg = keep_rates(self.cfg, checkpoint["config"])
        names = [f.name for f in dataclasses.fields(Position) if f.name in checkpoint]
        values = {name: checkpoint[name] for name in names}
        self.position = Position(**values | {"averages": Averages(**checkpoint["averages"])})
        self.schedule, _ = build_scheduler(self.optimizer, self.cfg, self.epoch_length)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as e:
            raise UserError(
                f"resume: {source} has other parameter groups; resume with its own optimizer, lr, "
                "lr_backbone, weight_decay, param_dict_type and pretrained_backbone"
            ) from e
        schedule = checkpoint["lr_scheduler"]
        if schedule.get("total_steps") != getattr(self.schedule, "total_steps", None):
            raise UserError(
                f"resume: {source} has another learning-rate schedule; resume with its own "
                "onecyclelr, epochs, batch_size, accumulate and number of processes"
            )
        if self.cfg.override_resumed_lr_drop:
            self.schedule.base_lrs = [g["initial_lr"] for g in self.optimizer.param_groups]
            self.move_schedule()
        else:
            self.schedule.load_state_dict(schedule)
        self.scaler.load_state_dict(checkpoint["scaler"])
        images = lambda cfg, processes: cfg["batch_size"] * cfg["accumulate"] * processes
        before = images(checkpoint["config"], len(checkpoint["rng"]))
        self.position.step = checkpoint["step"] * before // images(vars(self.cfg), world_size())
        if len(checkpoint["rng"]) == world_size():
            set_rng_state(checkpoint["rng"][rank()])

    def save(self, name: str = "checkpoint.pth", copies: Sequence[str] = (), **more) -> None:
        """Save the state and `more` in the output directory, if there is one. Collective."""
        if self.cfg.output_dir:
            path, state = Path(self.cfg.output_dir) / name, self.state_dict() | more
            on_rank0(lambda: save_checkpoint(path, state, self.cfg.keep_checkpoints, copies))
