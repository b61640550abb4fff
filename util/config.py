"""Every option of the project: its name, type, default, meaning and limits, in one place.

An option is given as a flag (`--lr 1e-4`), as an assignment in a config file (`-c FILE`), or behind
`--options` (`lr=1e-4`); `--help`, parsing and validation all read the fields below. Names are those
of the released code. Later wins: defaults, config file, `--options`, flags.
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
from models.errors import UserError, nearest
from models.options import (
    DenoisingOptions,
    DetectorOptions,
    LossOptions,
    ModelOptions,
    option,
    read_assignments,
)
from models.registry import MODELS, find_model

logger = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

# Released spellings of today's options.
ALIASES = {
    "scalar": "dn_number",
    "dn_scalar": "dn_number",
    "label_noise_scale": "dn_label_noise_ratio",
    "box_noise_scale": "dn_box_noise_scale",
    "use_lft": "look_forward_twice",
    "match_unstable_error": "log_matching",
}

# Another name that published commands have for a model.
MODEL_ALIASES = {"dn_deformable_detr": "dn_dab_deformable_detr"}

# With --use_dn, which published commands give to a model without denoising, it is this one.
WITH_DENOISING = {"dab_deformable_detr": "dn_dab_deformable_detr"}

# The released config files, which commands name by their paths in DINO's repository.
RELEASED_CONFIGS = {
    "DINO_4scale.py": "dino_4scale_r50",
    "DINO_5scale.py": "dino_5scale_r50",
    "DINO_4scale_swin.py": "dino_4scale_swin_l",
    "DINO_4scale_convnext.py": "dino_4scale_convnext_xl",
}

# The released switches whose combinations are today's query_selection.
SELECTION_SWITCHES = ("two_stage", "two_stage_type", "use_mqs", "embed_init_tgt")

# Released options with nothing left to choose. They are accepted and do nothing.
RETIRED = {
    "find_unused_params": "every parameter takes part in every step",
    "save_log": "log.txt is always written",
    "dataset_file": "COCO format is the only one",
    "local_rank": "torchrun tells it",
    "dist_backend": "NCCL for GPUs, Gloo for CPUs",
    "note": "a remark of the user's",
    # Nothing in the released code reads these, or only together with what is refused below.
    **dict.fromkeys(("num_results", "eos_coef", "remove_difficult", "return_interm_layers"), ""),
    **dict.fromkeys(("dn_label_coef", "dn_bbox_coef", "mask_loss_coef", "dice_loss_coef"), ""),
    **dict.fromkeys(("dln_xy_noise", "dln_hw_noise", "box_attn_type", "two_stage_default_hw"), ""),
    **dict.fromkeys(("enc_loss_coef", "coco_panoptic_path"), ""),
}

# Released options of which one value is supported: that of all published models.
FIXED = {
    "position_embedding": "sine",
    "masks": False,
    "pre_norm": False,
    "frozen_weights": None,
    "fix_refpoints_hw": -1,
    "decoder_layer_noise": False,
    "lr_backbone_names": ["backbone.0"],
    "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "ddetr_lr_param": False,
    "data_aug_scale_overlap": None,
    "unic_layers": 0,
    "query_dim": 4,
    "pdetr3_bbox_embed_diff_each_layer": False,
    "pdetr3_refHW": -1,
    "dabdetr_yolo_like_anchor_update": False,
    "dabdetr_deformable_encoder": False,
    "dabdetr_deformable_decoder": False,
    "use_deformable_box_attn": False,
    "dec_layer_number": None,
    "add_channel_attention": False,
    "add_pos_value": False,
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "two_stage_learn_wh": False,
    "two_stage_keep_all_tokens": False,
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "matcher_type": "HungarianMatcher",
    "use_detached_boxes_dec_out": False,
}


@dataclass
class DataOptions:
    """data"""

    coco_path: str = option("", "directory in COCO 2017's layout: train2017, val2017, annotations")
    num_workers: int = option(2, "data-loading processes", low=0)
    strict_data: bool = option(False, "stop at an unreadable training image; default: skip, count")
    fix_size: bool = option(
        False, "resize training images to exactly max(data_aug_scales) x data_aug_max_size"
    )
    data_aug_scales: list[int] = option(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "shortest sides drawn in training; evaluation takes the largest",
        low=8,
    )
    data_aug_max_size: int = option(1333, "longest side allowed", low=8)
    data_aug_scales2_resize: list[int] = option(
        [400, 500, 600], "shortest sides drawn before the random crop", low=8
    )
    data_aug_scales2_crop: list[int] = option(
        [384, 600], "smallest and largest crop; [] for no crops", low=8
    )


@dataclass
class TrainingOptions:
    """training"""

    epochs: int = option(50, "epochs", low=1)
    batch_size: int = option(2, "images a process and step in training", low=1)
    eval_batch_size: int = option(
        1, "images a process and step in evaluation; padding costs AP, so 1 as published", low=1
    )
    accumulate: int = option(1, "batches of every process that make one step", low=1)
    optimizer: str = option(
        "adamw",
        "adamw, as published; muon (Jordan 2024), for the matrices between hidden layers, learns "
        "faster from random weights",
        choices=["adamw", "muon"],
    )
    lr: float = option(1e-4, "learning rate", low=0)
    lr_backbone: float = option(1e-5, "learning rate of the backbone; 0 freezes it", low=0)
    lr_linear_proj_mult: float = option(
        0.1, "ddetr_in_mmdet: factor on reference_points and sampling_offsets", low=0
    )
    param_dict_type: str = option(
        "default",
        "parameter groups: default; ddetr_in_mmdet, slower sampling offsets; large_wd, no weight "
        "decay where a name has norm or bias in it",
        choices=["default", "ddetr_in_mmdet", "large_wd"],
    )
    weight_decay: float = option(1e-4, "AdamW's weight decay", low=0)
    lr_drop: int = option(40, "divide the rate by 10 every so many epochs", low=1)
    multi_step_lr: bool = option(False, "divide the rate by 10 at the epochs of --lr_drop_list")
    lr_drop_list: list[int] = option([33, 45], "epochs for --multi_step_lr", low=1)
    onecyclelr: bool = option(
        False,
        "one cycle: all rates, the backbone's too, rise to --lr for a fifth of the run, then fall",
    )
    clip_max_norm: float = option(0.1, "largest gradient norm; 0 does not clip", low=0)
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("bf16", "mixed precision in", choices=["bf16", "fp16"])
    use_ema: bool = option(False, "keep, evaluate and save an average of the weights as well")
    ema_decay: float = option(0.9997, "decay of that average", low=0, high=1)
    ema_epoch: int = option(0, "epoch at whose start the average begins", low=0)


@dataclass
class RunOptions:
    """run"""

    output_dir: str = option(
        "",
        "directory of checkpoints, log.txt and TensorBoard files; a run that it holds is resumed",
    )
    overwrite: bool = option(False, "start anew in --output_dir, deleting the run that it holds")
    device: str = option("", "cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    seed: int = option(42, "seed of weights, noise, order and augmentation", low=0)
    resume: str = option(
        "", "checkpoint to go on from or evaluate, a file or URL; auto: the newest in --output_dir"
    )
    drop_lr_now: bool = option(False, "on resuming, divide the learning rates by 10")
    override_resumed_lr_drop: bool = option(
        False, "on resuming, use the given --lr_drop or --lr_drop_list, not the checkpoint's"
    )
    pretrain_model_path: str = option(
        "", "checkpoint whose weights, where they fit, begin the run, a file or URL"
    )
    finetune_ignore: list[str] = option([], "parts of names left out of --pretrain_model_path")
    start_epoch: int = option(0, "count epochs from here; a resumed run knows by itself", low=0)
    save_checkpoint_interval: int = option(10, "keep a checkpoint every so many epochs", low=1)
    save_every_minutes: float = option(30, "save within an epoch, too, every so often", low=0)
    keep_checkpoints: int = option(
        2, "checkpoints kept: checkpoint.pth, and those before it, checkpoint_previous_N.pth", low=1
    )
    world_size: int = option(1, "processes, one a device; torchrun and Slurm tell it", low=1)
    rank: int = option(0, "which of the processes this is; torchrun and Slurm tell it", low=0)
    dist_url: str = option("env://", "where the processes meet, e.g. tcp://HOST:PORT")
    dist_timeout: float = option(15, "minutes that a process may hang before all end", low=0.01)
    eval: bool = option(False, "evaluate on val2017 and stop")
    test: bool = option(False, "write detections on test2017 for the evaluation server and stop")
    eval_per_class: bool = option(False, "print AP by class as well")
    save_results: bool = option(False, "write the detections of every evaluation to results.json")
    log_matching: bool = option(
        False,
        "log, for every decoder layer, how many queries of a validation image are matched to "
        "another object than an epoch before, and how far anchors are from their objects",
    )
    debug: bool = option(False, "a few steps an epoch, to see whether everything works")


@dataclass
class Config(RunOptions, TrainingOptions, DataOptions, DetectorOptions):
    """All options of a run, checked. Made by `load_config` or `parse_command_line`."""

    def __post_init__(self):
        super().__post_init__()
        if not self.data_aug_scales:
            raise UserError("data_aug_scales needs at least one number")
        for other in ("multi_step_lr", "drop_lr_now", "override_resumed_lr_drop"):
            if self.onecyclelr and getattr(self, other):
                raise UserError(f"onecyclelr and {other} exclude each other")
        if self.overwrite and self.resume == "auto":
            raise UserError("overwrite starts anew, resume auto resumes: give one of them")


GROUPS = (ModelOptions, DenoisingOptions, LossOptions, DataOptions, TrainingOptions, RunOptions)
METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def parse_value(name: str, value: Any) -> Any:
    """Turn what a shell, a config file or a caller gave for option `name` into the option's type.

    Booleans may be written true, TRUE, 1, ...; lists as [1,2], 1,2 or several words; `none` stands
    for None where that is allowed, and for an empty list; a single value will do for a list.
    Raises UserError for anything else.
    """
    if name == "two_stage_type":
        if value not in ("no", "standard"):
            raise UserError(f"two_stage_type: {value!r} is not supported, only 'standard' and 'no'")
        return value != "no"
    if name in SELECTION_SWITCHES:
        return convert(name, bool, value)
    if name == "modelname":
        value = MODEL_ALIASES.get(value, value)
    kind = FIELDS[name].type
    flag = isinstance(value, list) and len(value) == 1  # a list's, on the command line
    is_none = str(value[0] if flag else value).lower() in ("none", "null")
    if isinstance(kind, types.UnionType):
        if is_none:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is list:
        items = [] if is_none else value if isinstance(value, list | tuple) else [value]
        if len(items) == 1 and isinstance(items[0], str):
            items = [x.strip(" '\"") for x in items[0].strip("[]() ").split(",") if x.strip()]
        return [convert(name, typing.get_args(kind)[0], item) for item in items]
    return convert(name, kind, value)


def convert(name: str, kind: type, value: Any) -> Any:
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if kind is bool and str(value).lower() in words:
        return words[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, OverflowError):
            number = literal_eval(value.strip()) if isinstance(value, str) else value
            if not isinstance(number, bool) and kind(number) == number:
                return kind(number)
    raise UserError(f"{name}: {value!r} is not {wanted}")


def plain(value: Any) -> str:
    """A value as text, the same however a file, a shell or a caller writes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(plain, value))
    text = str(value).lower()
    for mark in "[]()'\" ":
        text = text.replace(mark, "")
    text = {"true": "1", "false": "0"}.get(text, text)
    with contextlib.suppress(ValueError):
        text = str(float(text))
    return text


def check_fixed(name: str, value: Any) -> None:
    """UserError if a released option of which one value is supported has another one."""
    if name in FIXED and plain(value) != plain(FIXED[name]):
        only = f"only {FIXED[name]!r}, which every published model has"
        raise UserError(f"{name}: {value!r} is not supported, {only}")


def known_name(name: str, where: str) -> str | None:
    """Today's name of an option, None for one with nothing to choose, UserError with the nearest
    name else."""
    if name in FIELDS or name in SELECTION_SWITCHES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    if name in RETIRED or name in FIXED:
        return None
    raise UserError(f"{where}: unknown option {name}{nearest(name, [*FIELDS, *ALIASES])}")


def find_config_file(path: str | Path) -> Path:
    """A config file by its path, also relative to the repository, or by its path in DINO's
    repository. UserError with the nearest name."""
    path = Path(path)
    if not path.exists() and not path.is_absolute() and (CONFIG_DIR.parent / path).exists():
        path = CONFIG_DIR.parent / path
    if not path.exists() and path.name in RELEASED_CONFIGS:
        ours = CONFIG_DIR / f"{RELEASED_CONFIGS[path.name]}.py"
        logger.info("%s does not exist; using configs/%s, the same settings", path, ours.name)
        path = ours
    if not path.exists():
        known = [str(p.relative_to(CONFIG_DIR.parent)) for p in CONFIG_DIR.rglob("*.py")]
        raise UserError(f"{path}: no such config file{nearest(str(path), known)}")
    return path


def merge_config(base: dict[str, Any], own: dict[str, Any], path: Path) -> dict[str, Any]:
    """The parsed options of base files, and over them the assignments of the file at `path`."""
    return resolve_selection(base | parse_values(own, str(path)))


def parse_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """{today's name: value of the option's type}; UserError names what is wrong."""
    parsed = {}
    for name, value in values.items():
        check_fixed(name, value)
        if known := known_name(name, where):
            parsed[known] = parse_value(known, value)
    return parsed


def resolve_selection(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces the released switches by the query_selection that they mean together.

    --two_stage, or two_stage_type other than "no", selects tokens; --use_mqs or embed_init_tgt
    keeps the content learned all the same.
    """
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
    """Read a config file, put `overrides` on top and check everything.

    Raises UserError for an unknown name, naming the nearest known one, and for a value of the
    wrong type or outside its limits.
    """
    return make_config(path, parse_values(overrides or {}, "overrides"))


def make_config(path: str | Path | None, overrides: dict[str, Any]) -> Config:
    """As `load_config`, with overrides that are parsed already."""
    values = read_assignments(find_config_file(path), merge_config) if path else {}
    values |= overrides
    name = values.get("modelname", Config.modelname)
    return Config(**resolve_selection(find_model(name).detector.implied | values))


class Parser(argparse.ArgumentParser):
    """Flags of all options; a mistake is a UserError, an unknown flag names the nearest."""

    def error(self, message: str):
        raise UserError(message)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` -c, --options and a flag for every option of the config."""
    add = parser.add_argument
    add("-c", "--config_file", metavar="FILE", help="config file, see configs/")
    add("--options", nargs="+", default=[], metavar="K=V", help="config values, e.g. lr=2e-4")
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
                off, extra["help"] = f"switch off: {text}", argparse.SUPPRESS
                section.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=off)
            section.add_argument(*spellings.get(f.name, []), f"--{f.name}", **extra)
    parser.set_defaults(**dict.fromkeys(FIELDS))
    for name in (*RETIRED, *SELECTION_SWITCHES):
        # torch.distributed.launch, which published commands use, writes --local-rank.
        add(
            f"--{name}",
            f"--{name.replace('_', '-')}",
            nargs="?",
            const=True,
            help=argparse.SUPPRESS,
        )
    for name in FIXED:
        add(f"--{name}", nargs="*", help=argparse.SUPPRESS)


def parse_command_line(argv: Sequence[str] | None = None) -> Config:
    """The config a command line asks for; `--help` prints and exits, mistakes are UserErrors."""
    models = ", ".join(f"{m} = configs/{spec.config}.py" for m, spec in MODELS.items())
    parser = Parser(
        prog="main.py",
        usage="main.py [-m NAME | -c FILE] [--OPTION VALUE ...]",
        description="Train and evaluate DAB-DETR, DN-DETR and DINO on data in COCO format.",
        epilog=f"-m NAME alone means that model's published settings: {models}. "
        f"Backbones: {', '.join(BACKBONES)}.",
        allow_abbrev=False,
    )
    add_options(parser)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            known_name(word.lstrip("-").split("=")[0], "command line")
        raise UserError(f"command line: {word!r} belongs to no option")
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
    if "modelname" in values:
        name = values["modelname"]
        if name in WITH_DENOISING and values.get("use_dn"):
            values["modelname"] = WITH_DENOISING[name]
            logger.info("-m %s with --use_dn is taken as %s", name, values["modelname"])
            name = values["modelname"]
        path = path or CONFIG_DIR / f"{find_model(name).config}.py"
    return make_config(path, values)
