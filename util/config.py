"""Every option of the project: its name, type, default, meaning and limits, in one place.

An option is set by a flag (`--lr 1e-4`), an assignment in a config file (`-c FILE`), or after
`--options` (`lr=1e-4`); `--help`, parsing and validation all use the fields below. Names follow the
released code. In ascending order of precedence: defaults, config file, `--options`, flags.
"""

import argparse
import contextlib
import dataclasses
import logging
import types
import typing
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.backbones import BACKBONES
from models.cli import Parser
from models.errors import UserError, nearest
from models.options import (
    ALIASES,
    DenoisingOptions,
    DetectorOptions,
    LossOptions,
    ModelOptions,
    option,
    read_assignments,
)
from models.registry import MODELS, check_options, find_model
from util.checkpoint import read_checkpoint
from util.loggers import SERVICES

logger = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

# Published commands that mean another model: those of this name with this option. DN-DETR's README
# calls its model dn_deformable_detr once, and always sets this activation.
PUBLISHED_MODELS = {
    ("dab_deformable_detr", "use_dn", True): "dn_dab_deformable_detr",
    ("dn_deformable_detr", "transformer_activation", "relu"): "dn_dab_deformable_detr",
}

# Config files in DINO's repository, and the equivalent ones here.
RELEASED_CONFIGS = {
    "DINO_4scale.py": "dino_4scale_r50",
    "DINO_5scale.py": "dino_5scale_r50",
    "DINO_4scale_swin.py": "dino_4scale_swin_l",
    "DINO_4scale_convnext.py": "dino_4scale_convnext_xl",
}

# Released switches that together determine query_selection.
SELECTION_SWITCHES = ("two_stage", "two_stage_type", "use_mqs", "embed_init_tgt")

# Released options that are accepted and ignored, and why.
RETIRED = {
    "find_unused_params": "all parameters are used in every step",
    "save_log": "log.txt is always written",
    "local_rank": "torchrun sets LOCAL_RANK",
    "dist_backend": "NCCL for GPUs, Gloo for CPUs",
    "note": "a comment by the user",
    "auto_resume": "a run found in --output_dir is resumed",
    "cache_mode": "the operating system caches the files",
    # The released code ignores these, or reads them only with options refused below.
    **dict.fromkeys(("num_results", "remove_difficult", "return_interm_layers"), ""),
    **dict.fromkeys(("dn_label_coef", "dn_bbox_coef"), ""),
    **dict.fromkeys(("dln_xy_noise", "dln_hw_noise", "box_attn_type", "two_stage_default_hw"), ""),
    **dict.fromkeys(("enc_loss_coef", "coco_panoptic_path", "position_embedding_scale"), ""),
}

# Released options for which only one value is supported, that of all published models.
FIXED = {
    "position_embedding": "sine",
    "dataset_file": "coco",  # instances, not coco_panoptic
    "fix_refpoints_hw": -1,
    "lr_backbone_names": ["backbone.0"],
    "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "data_aug_scale_overlap": None,
    "unic_layers": 0,
    "query_dim": 4,
    "pdetr3_refHW": -1,
    "dec_layer_number": None,
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "matcher_type": "HungarianMatcher",
    "lr_drop_epochs": None,
    "eval_set": "val",
    "attention_type": "RCDA",
    **dict.fromkeys(("sgd", "pre_norm", "decoder_layer_noise", "ddetr_lr_param"), False),
    **dict.fromkeys(("dabdetr_yolo_like_anchor_update", "dabdetr_deformable_encoder"), False),
    **dict.fromkeys(("pdetr3_bbox_embed_diff_each_layer", "dabdetr_deformable_decoder"), False),
    **dict.fromkeys(("use_deformable_box_attn", "use_detached_boxes_dec_out"), False),
    **dict.fromkeys(("add_channel_attention", "add_pos_value"), False),
    **dict.fromkeys(("two_stage_learn_wh", "two_stage_keep_all_tokens"), False),
}


# What --finetune sets where neither a config file nor the command line does.
RECIPE = {
    "warmup_epochs": 1,
    "use_ema": True,
    "ema_warmup": True,
    "patience": 10,
    "max_enlargement": 1.67,
}


@dataclass
class DataOptions:
    """data"""

    coco_path: str = option("", "data set in the layout of COCO 2017, Roboflow, YOLO or Pascal VOC")
    train_images: str = option("", "directory of training images; needs train_annotations")
    train_annotations: str = option("", "COCO JSON of training images, instead of coco_path's")
    val_images: str = option("", "directory of images to evaluate; needs val_annotations")
    val_annotations: str = option("", "COCO JSON of images to evaluate, instead of coco_path's")
    num_workers: int = option(2, "data-loading workers per process", low=0)
    strict_data: bool = option(False, "stop at unreadable training images instead of skipping them")
    fix_size: bool = option(
        False, "resize training images to exactly max(data_aug_scales) x data_aug_max_size"
    )
    data_aug_scales: list[int] = option(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "shorter side of a training image, chosen at random; evaluation uses the largest",
        low=8,
    )
    data_aug_max_size: int = option(1333, "maximum longer side of an image", low=8)
    data_aug_scales2_resize: list[int] = option(
        [400, 500, 600], "shorter side before the random crop, chosen at random", low=8
    )
    data_aug_scales2_crop: list[int] = option(
        [384, 600], "minimum and maximum side of the random crop; []: no crops", low=8
    )
    max_enlargement: float = option(
        0,
        "reduce the sizes above where they would enlarge the training image of median size "
        "more than X times; 0: use them as they are; 1.67 is as published for 640 x 480",
        low=0,
    )


@dataclass
class TrainingOptions:
    """training"""

    epochs: int = option(50, "number of training epochs", low=1)
    batch_size: int = option(2, "training batch size per process", low=1)
    eval_batch_size: int = option(
        1, "evaluation batch size per process; published results use 1: padding costs AP", low=1
    )
    accumulate: int = option(1, "batches per optimiser step, in every process", low=1)
    optimizer: str = option(
        "adamw",
        "adamw, as published; muon (Jordan 2024): Muon for hidden weight matrices and AdamW for "
        "the rest, which learns faster from random weights",
        choices=["adamw", "muon"],
    )
    lr: float = option(1e-4, "learning rate", low=0)
    lr_backbone: float = option(1e-5, "learning rate of the backbone; 0: freeze it", low=0)
    lr_linear_proj_mult: float = option(
        0.1, "ddetr_in_mmdet: factor on --lr for reference_points and sampling_offsets", low=0
    )
    param_dict_type: str = option(
        "default",
        "parameter groups: default; ddetr_in_mmdet, see --lr_linear_proj_mult; large_wd, no weight "
        "decay for parameters with norm or bias in their names",
        choices=["default", "ddetr_in_mmdet", "large_wd"],
    )
    weight_decay: float = option(1e-4, "weight decay", low=0)
    lr_drop: int = option(40, "divide the learning rate by 10 every N epochs", low=1)
    multi_step_lr: bool = option(False, "divide the rate by 10 at the epochs in --lr_drop_list")
    lr_drop_list: list[int] = option([33, 45], "epochs for --multi_step_lr", low=1)
    onecyclelr: bool = option(
        False,
        "one-cycle schedule: all rates, the backbone's too, rise to --lr for the first 20% of the "
        "run, then fall",
    )
    warmup_epochs: float = option(
        0, "raise the learning rates linearly from 0, step by step, over the first X epochs", low=0
    )
    clip_max_norm: float = option(0.1, "maximum gradient norm; 0: no clipping", low=0)
    amp: bool = option(False, "train and evaluate in mixed precision")
    amp_dtype: str = option("bf16", "data type of --amp", choices=["bf16", "fp16"])
    compile: bool = option(
        False, "compile backbone and encoder (torch.compile): minutes at the start, faster steps"
    )
    use_ema: bool = option(False, "also keep, evaluate and save an EMA of the weights")
    ema_decay: float = option(0.9997, "decay of the EMA", low=0, high=1)
    ema_epoch: int = option(0, "first epoch of the EMA", low=0)
    ema_warmup: bool = option(
        False, "decay of the EMA after n of its steps at most (1 + n) / (10 + n)"
    )
    patience: int = option(
        0, "stop when AP (of the EMA, if there is one) has not risen for N epochs; 0: never", low=0
    )


@dataclass
class RunOptions:
    """run"""

    output_dir: str = option(
        "",
        "directory for checkpoints, log.txt and TensorBoard files; a run found there is resumed",
    )
    overwrite: bool = option(False, "delete the run in --output_dir and start a new one")
    device: str = option("", "cpu, cuda, cuda:1, ...; default: a GPU if available")
    seed: int = option(42, "seed of weights, noise, data order and augmentation", low=0)
    resume: str = option(
        "", "checkpoint to resume or evaluate, a file or URL; auto: the newest in --output_dir"
    )
    drop_lr_now: bool = option(False, "when resuming, divide the learning rates by 10")
    override_resumed_lr_drop: bool = option(
        False, "when resuming, use the given --lr_drop or --lr_drop_list, not the checkpoint's"
    )
    finetune: str = option(
        "",
        "checkpoint, a file or URL, to fine-tune on other data: loads its weights, of classes by "
        "name, and sets what neither a config file nor a flag does: "
        f"{', '.join(f'{k} {v}' for k, v in RECIPE.items())}; "
        "without -c or -m, the model is the checkpoint's",
    )
    pretrain_model_path: str = option(
        "", "checkpoint, a file or URL, to start from: its weights are loaded as far as they fit"
    )
    finetune_ignore: list[str] = option(
        [], "skip weights of --finetune or --pretrain_model_path with one of these in their names"
    )
    start_epoch: int = option(0, "number of the first epoch; ignored when resuming", low=0)
    save_checkpoint_interval: int = option(10, "keep a checkpoint every N epochs", low=1)
    save_every_minutes: float = option(30, "also save every X minutes within an epoch", low=0)
    keep_checkpoints: int = option(
        2, "latest checkpoints to keep: checkpoint.pth, checkpoint_previous_1.pth, ...", low=1
    )
    world_size: int = option(1, "number of processes; set by torchrun or Slurm", low=1)
    rank: int = option(0, "rank of this process; set by torchrun or Slurm", low=0)
    dist_url: str = option("env://", "where processes connect to each other, e.g. tcp://HOST:PORT")
    dist_timeout: float = option(15, "minutes to wait for a process that hangs", low=0.01)
    eval: bool = option(False, "evaluate on val2017 and stop")
    test: bool = option(False, "write detections on test2017 for COCO's server and stop")
    eval_per_class: bool = option(False, "also print the AP of each class")
    save_results: bool = option(False, "write the detections of each evaluation to results.json")
    eval_report: str = option(
        "",
        "directory for report.html, which each evaluation writes: curves, AP by class and size, "
        "confusions, calibration, kinds of errors, the worst images",
    )
    logger: list[str] = option(
        [],
        "also send what is logged to these services; their own environment variables apply, such "
        "as WANDB_PROJECT and MLFLOW_TRACKING_URI; csv writes log.csv",
        choices=list(SERVICES),
    )
    draw_images: int = option(
        0,
        "draw the first N evaluated images and their best detections after each evaluation",
        low=0,
    )
    log_matching: bool = option(
        False,
        "for each decoder layer, log the matching instability (queries per validation image "
        "matched to a different object than an epoch before) and the anchor-to-object distance",
    )
    check_data: bool = option(
        False, "train nothing; say what is in the data set, and write data.html to --output_dir"
    )
    debug: bool = option(False, "smoke test: only a few steps per epoch")


@dataclass
class Config(RunOptions, TrainingOptions, DataOptions, DetectorOptions):
    """All options of a run, validated. Built by `load_config` or `parse_command_line`."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        if not self.data_aug_scales:
            raise UserError("data_aug_scales needs at least one number")
        exclusive = ("multi_step_lr", "warmup_epochs", "drop_lr_now", "override_resumed_lr_drop")
        for other in exclusive:
            if self.onecyclelr and getattr(self, other):
                raise UserError(f"onecyclelr and {other} are mutually exclusive")
        if self.log_matching and not find_model(self.modelname).detector.has_queries:
            raise UserError(f"log_matching: {self.modelname} has no queries to match")
        if self.overwrite and self.resume == "auto":
            raise UserError("overwrite and resume auto are mutually exclusive")
        if self.finetune and self.pretrain_model_path:
            raise UserError("finetune and pretrain_model_path are mutually exclusive")
        if self.logger and not self.output_dir:
            raise UserError("logger: needs --output_dir, where the ids of its runs are kept")


GROUPS = (ModelOptions, DenoisingOptions, LossOptions, DataOptions, TrainingOptions, RunOptions)
METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def parse_value(name: str, value: Any) -> Any:
    """A given value, converted to the option's type. UserError if that is impossible."""
    if name == "two_stage_type":
        if value not in ("no", "standard"):
            raise UserError(f"two_stage_type: {value!r} is not supported, only 'standard' and 'no'")
        return value != "no"
    if name in SELECTION_SWITCHES:
        return convert(name, bool, value)
    return convert(name, FIELDS[name].type, value)


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`: bool, int, float, str, `list[...]` or `... | None`. Booleans may be
    written true, TRUE, 1, ...; lists as [1,2], 1,2, a list of words or one item; `none` means None
    or an empty list."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    is_none = len(items) == 1 and str(items[0]).lower() in ("none", "null")
    inner, *_ = typing.get_args(kind) or (kind,)
    if isinstance(kind, types.UnionType):
        return None if is_none else convert(name, inner, value)
    if typing.get_origin(kind) is list:
        if len(items) == 1 and isinstance(items[0], str):
            items = [x.strip(" '\"") for x in items[0].strip("[]() ").split(",") if x.strip()]
        return [] if is_none else [convert(name, inner, item) for item in items]
    booleans = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if kind is bool and str(value).lower() in booleans:
        return booleans[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, OverflowError):
            number = literal_eval(value.strip()) if isinstance(value, str) else value
            if not isinstance(number, bool) and kind(number) == number:
                return kind(number)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise UserError(f"{name}: {value!r} is not {expected[kind]}")


def check_fixed(name: str, value: Any) -> None:
    """UserError if a released option with a single supported value is set to a different one."""
    only = FIXED[name]
    kind = {list: list[str], type(None): str | None}.get(type(only), type(only))
    with contextlib.suppress(UserError):
        if convert(name, kind, value) == only:
            return
    raise UserError(f"{name}: {value!r} is not supported, only {only!r}, as in published models")


def known_name(name: str, where: str) -> str | None:
    """The current name of an option; None if it is ignored. UserError if it is unknown."""
    if name in FIELDS or name in SELECTION_SWITCHES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    if name in RETIRED or name in FIXED:
        return None
    raise UserError(f"{where}: unknown option {name}{nearest(name, [*FIELDS, *ALIASES])}")


def find_config_file(path: str | Path) -> Path:
    """A config file by its path, which may be relative to this repository or be one of DINO's."""
    path, root = Path(path), CONFIG_DIR.parent
    for candidate in (path, root / path):
        if candidate.exists():
            return candidate
    if path.name in RELEASED_CONFIGS:
        equivalent = CONFIG_DIR / f"{RELEASED_CONFIGS[path.name]}.py"
        logger.info("%s does not exist; using the equivalent configs/%s", path, equivalent.name)
        return equivalent
    known = [str(p.relative_to(root)) for p in CONFIG_DIR.rglob("*.py")]
    raise UserError(f"{path}: no such config file{nearest(str(path), known)}")


def parse_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """{current name: value of the option's type}. UserError for unknown names and bad values."""
    parsed = {}
    for name, value in values.items():
        if name in FIXED:
            check_fixed(name, value)
        elif known := known_name(name, where):
            parsed[known] = parse_value(known, value)
    return parsed


def resolve_selection(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the released switches by query_selection: --two_stage, or a two_stage_type other than
    "no", selects tokens; --use_mqs or embed_init_tgt still learns the content."""
    given = {name: values.pop(name) for name in SELECTION_SWITCHES if name in values}
    selection = values.get("query_selection", "static")
    if any(given.get(name) is False for name in ("two_stage", "two_stage_type")):
        selection = "static"
    elif selection == "static" and any(given.get(n) for n in ("two_stage", "two_stage_type")):
        selection = "pure"
    for name in ("use_mqs", "embed_init_tgt"):
        if name in given and selection != "static":
            selection = "mixed" if given[name] else "pure"
    return values | ({"query_selection": selection} if given else {})


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a config file, apply `overrides` and validate the result. UserError for an unknown name
    and for a value of the wrong type or out of range."""
    return make_config(path, parse_values(overrides or {}, "overrides"))


def make_config(path: str | Path | None, overrides: dict[str, Any]) -> Config:
    """`load_config` with parsed overrides."""
    merge = lambda base, own, file: resolve_selection(base | parse_values(own, str(file)))
    values = read_assignments(find_config_file(path), merge) if path else {}
    values |= overrides
    name = values.get("modelname", Config.modelname)
    implied = find_model(name).detector.implied | recipe(values, overrides)
    return Config(**resolve_selection(implied | values))


def recipe(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """What --finetune sets: no warm-up for a schedule that has one, no sizes if some are given."""
    excluded = {"warmup_epochs"} if values.get("onecyclelr") else set()
    if any(name.startswith("data_aug") for name in overrides):
        excluded.add("max_enlargement")
    return {k: v for k, v in RECIPE.items() if values.get("finetune") and k not in excluded}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add -c, --options and a flag for every field of `Config`."""
    add = parser.add_argument
    add("-c", "--config_file", metavar="FILE", help="config file; see configs/")
    text = "options as in a config file, e.g. lr=2e-4"
    add("--options", nargs="+", default=[], metavar="K=V", help=text)
    spellings: dict[str, list[str]] = {"modelname": ["-m"]}
    for old, new in ALIASES.items():
        spellings.setdefault(new, []).append(f"--{old}")
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        for f in (FIELDS[name] for name in group.__annotations__):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            text = f.metadata["help"].replace("%", "%%")
            if f.metadata["choices"]:
                text += f" [{', '.join(f.metadata['choices'])}]"
            if f.type is not bool and default not in ("", None):
                text += f" (default: {default})"
            element, *_ = typing.get_args(f.type) or (f.type,)
            extra: dict[str, Any] = {"dest": f.name, "metavar": METAVARS[element], "help": text}
            if f.type is bool:
                extra |= {"nargs": "?", "const": True}
            elif typing.get_origin(f.type) is list:
                extra["nargs"] = "*"
            if f.type is bool and default:
                off, extra["help"] = f"disable: {text}", argparse.SUPPRESS
                section.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=off)
            section.add_argument(*spellings.get(f.name, []), f"--{f.name}", **extra)
    parser.set_defaults(**dict.fromkeys(FIELDS))
    for name in (*RETIRED, *SELECTION_SWITCHES):
        # torch.distributed.launch, which published commands use, passes --local-rank.
        names = f"--{name}", f"--{name.replace('_', '-')}"
        add(*names, nargs="?", const=True, help=argparse.SUPPRESS)
    for name in FIXED:
        add(f"--{name}", nargs="*", help=argparse.SUPPRESS)


def saved_options(source: str) -> dict[str, Any]:
    """The options of model and image size in a checkpoint's config; released files have none."""
    names = {f.name for f in dataclasses.fields(DetectorOptions)}
    names |= {"data_aug_scales", "data_aug_max_size"}
    config = read_checkpoint(source, verify=False).get("config", {})
    return {name: config[name] for name in names & config.keys()}


def parse_command_line(argv: Sequence[str] | None = None) -> Config:
    """The config of a command line, by default the process's. UserError if it is invalid."""
    models = ", ".join(f"{m} = configs/{spec.config}.py" for m, spec in MODELS.items())
    parser = Parser(
        prog="main.py",
        usage="main.py [-m NAME | -c FILE] [--OPTION VALUE ...]",
        description="Train and evaluate DAB-DETR, DN-DETR and DINO on data in COCO format.",
        epilog=f"Without -c, -m NAME uses that model's published config: {models}. "
        f"Backbones: {', '.join(BACKBONES)}.",
        allow_abbrev=False,
    )
    add_options(parser)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            known_name(word.lstrip("-").split("=")[0], "command line")
        raise UserError(f"command line: unexpected argument {word!r}")
    known = (*FIELDS, *SELECTION_SWITCHES, *FIXED)
    flags = {k: v for k, v in vars(args).items() if k in known and v is not None}
    for name in FIXED.keys() & flags:
        words = flags[name] or [True]  # a switch
        flags[name] = words[0] if len(words) == 1 else words
    options = {}
    for pair in args.options:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--options: {pair!r} is not of the form name=value")
        options[name] = value
    values = parse_values(options, "--options") | parse_values(flags, "command line")
    path = args.config_file
    if name := values.get("modelname"):
        for (model, flag, value), meant in PUBLISHED_MODELS.items():
            if name == model and values.get(flag) == value:
                values["modelname"] = meant
                logger.info("-m %s with --%s selects %s", name, flag, meant)
        path = path or CONFIG_DIR / f"{find_model(values['modelname']).config}.py"
    source = values.get("resume", "")
    if not path and source not in ("", "auto"):
        values = saved_options(source) | values
    elif not path and values.get("finetune"):
        excluded = {"num_classes", "dn_labelbook_size", "data_aug_scales", "data_aug_max_size"}
        saved = saved_options(values["finetune"])
        values = {k: v for k, v in saved.items() if k not in excluded} | values
        path = CONFIG_DIR / f"{find_model(values.get('modelname', Config.modelname)).config}.py"
    return make_config(path, values)
