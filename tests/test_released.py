"""The authors' original command lines and config files.

    python -m tests.test_released      # prints the README's table of the command lines

`released/commands.json` has the command lines in the READMEs and scripts of DAB-DETR, DN-DETR and
DINO, with COCO, CHECKPOINT, BACKBONES and JOB as paths; `released/dino_configs.json` the values of
DINO's config files, as differences from the first.
"""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import run_with_submitit
from models.errors import UserError
from util.config import CONFIG_DIR, Config, load_config, parse_command_line

FOLDER = Path(__file__).parent / "released"
COMMANDS = json.loads((FOLDER / "commands.json").read_text())
DINO_CONFIGS = json.loads((FOLDER / "dino_configs.json").read_text())
FIRST = DINO_CONFIGS["DINO_4scale.py"]

# Their -c or -m: our config.
CONFIGS = {
    "config/DINO/DINO_4scale.py": "dino_4scale_r50",
    "config/DINO/DINO_5scale.py": "dino_5scale_r50",
    "config/DINO/DINO_4scale_swin.py": "dino_4scale_swin_l",
    "config/DINO/DINO_4scale_convnext.py": "dino_4scale_convnext_xl",
    "dab_detr": "dab_detr_r50",
    "dab_deformable_detr": "dab_deformable_detr_r50",
    "dab_deformable_detr --use_dn": "dn_dab_deformable_detr_r50",
    "dn_dab_detr": "dn_dab_detr_r50",
    "dn_deformable_detr": "dn_dab_deformable_detr_r50",
    "dn_dab_deformable_detr": "dn_dab_deformable_detr_r50",
    "dn_dab_deformable_detr_deformable_encoder_only": (
        "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat"
    ),
}
# Options for locations and resources, not settings.
PLACES = ("--output_dir", "--coco_path", "--resume", "backbone_dir=BACKBONES")
PLACES += ("--job_dir", "--job_name", "--timeout", "--ngpus", "--nodes")


def config_of(argv: list[str]) -> str:
    """The name of the config with a command line's published settings."""
    name = argv[argv.index("-c" if "-c" in argv else "-m") + 1]
    both = f"{name} --use_dn"
    return CONFIGS[both if "--use_dn" in argv and both in CONFIGS else name]


def parse(command: dict[str, Any]) -> Config:
    argv = command["argv"]
    if command["program"] == "run_with_submitit.py":
        _, argv = run_with_submitit.build_parser().parse_known_args(argv)
    return parse_command_line(argv)


def differences(cfg: Config, other: Config) -> dict[str, Any]:
    """{option: its value in cfg} for the options that differ."""
    values = dataclasses.asdict(other)
    return {k: v for k, v in dataclasses.asdict(cfg).items() if values[k] != v}


def table() -> str:
    """The README's table: each command line without PLACES, and its config."""
    rows = {}
    for argv in (command["argv"] for command in COMMANDS):
        words = list(argv)
        for option in set(PLACES) & set(argv):
            start = words.index(option)
            del words[start : start + (2 if option.startswith("--") else 1)]
        rows[" ".join(words)] = config_of(argv)
    lines = (f"| `{line}` | `{config}` |\n" for line, config in sorted(rows.items()))
    return "| released options | config |\n| --- | --- |\n" + "".join(lines)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c["source"])
def test_published_command_gives_the_published_settings(command: dict[str, Any]):
    """Those of its config, except for paths, --eval and the evaluation batch size."""
    cfg, argv = parse(command), command["argv"]
    found = differences(cfg, load_config(f"configs/{config_of(argv)}.py"))
    paths = {"coco_path": "COCO", "resume": "CHECKPOINT", "backbone_dir": "BACKBONES"}
    for option, path in paths.items():
        assert found.pop(option, None) == (path if path in " ".join(argv) else None)
    assert found.pop("output_dir", None) == (
        argv[argv.index("--output_dir") + 1] if "--output_dir" in argv else None
    )
    assert found.pop("eval", False) == ("--eval" in argv)
    # One README starts on one GPU with batch size 1; the published one is for 8 GPUs.
    assert found.pop("batch_size", 1) == 1
    assert found == {}


def test_switch_to_the_denoising_model_is_logged_in_a_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        cfg = parse_command_line(["-m", "dab_deformable_detr", "--use_dn"])
    assert cfg.modelname == "dn_dab_deformable_detr"
    (line,) = caplog.messages
    assert "dab_deformable_detr" in line and "dn_dab_deformable_detr" in line


def test_readme_lists_the_commands():
    assert table() in Path("README.md").read_text()


def test_readme_table_of_published_runs_matches_the_configs():
    row = re.compile(
        r"^\| `(\w+)` \| (\d+) x (\d+)[^|]*\| (\d+), (\d+)[^|]*\| (\S+), (\S+) \|", re.MULTILINE
    )
    rows = row.findall(Path("README.md").read_text())
    assert {name for name, *_ in rows} == {path.stem for path in CONFIG_DIR.glob("*.py")}
    for name, gpus, images, *numbers in rows:
        cfg = load_config(f"configs/{name}.py")
        drop = cfg.lr_drop_list[0] if cfg.multi_step_lr else cfg.lr_drop
        expected = cfg.batch_size, cfg.epochs, drop, cfg.lr, cfg.lr_backbone
        assert (int(images), *map(float, numbers)) == expected, name
        family = name.removeprefix("dn_").split("_r50")[0]
        assert int(gpus) * int(images) == {"deformable_detr": 32, "anchor_detr": 8}.get(family, 16)


@pytest.mark.parametrize("name", DINO_CONFIGS)
def test_released_config_file_loads(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Silently, with our config's settings except those only in their scripts or files."""
    path, values = tmp_path / name, FIRST | DINO_CONFIGS[name]
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()))
    with caplog.at_level(logging.INFO):
        cfg = load_config(path)
    ours = load_config(f"configs/{CONFIGS[f'config/DINO/{name}']}.py")
    found = differences(cfg, ours)
    expected = {"dn_box_noise_scale": 0.4, "log_matching": True}
    assert found == expected | {"num_classes": 91, "dn_labelbook_size": 91}
    assert caplog.messages == []


OTHER_VALUES = {
    "position_embedding": "learned",
    "pre_norm": True,
    "dataset_file": "coco_panoptic",
    "fix_refpoints_hw": 0.1,
    "decoder_layer_noise": True,
    "query_dim": 2,
    "two_stage_type": "early",
    "two_stage_learn_wh": True,
    "decoder_module_seq": ["ca", "sa", "ffn"],
    "lr_backbone_names": ["backbone.0", "input_proj"],
    "matcher_type": "SimpleMinsumMatcher",
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_unsupported_value_is_rejected(name: str, tmp_path: Path):
    """In a file, in --options and as a flag, in one line that names it."""
    value = OTHER_VALUES[name]
    path = tmp_path / "theirs.py"
    path.write_text(f"{name} = {value!r}\n")
    words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    commands = [["-c", str(path)], ["--options", f"{name}={','.join(words)}"]]
    if name != "two_stage_type":
        commands += [[f"--{name}", *([] if value is True else words)]]
    for argv in commands:
        with pytest.raises(UserError, match=f"^{name}: .* is not supported, only") as error:
            parse_command_line(argv)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "--num_results 300 --note first --eos_coef 0.1 --remove_difficult --return_interm_layers",
        "--position_embedding sine --masks FALSE --fix_refpoints_hw -1 --pre_norm false",
        "--options dn_label_coef=1.0 dn_bbox_coef=1.0 decoder_module_seq=[sa,ca,ffn] masks=0",
        "--options lr_backbone_names=['backbone.0'] frozen_weights=None query_dim=4",
    ],
)
def test_options_with_a_single_choice_have_no_effect(line: str):
    assert parse_command_line(line.split()) == Config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backbone_freeze_keywords = None", {"backbone_freeze_keywords": []}),
        ("finetune_ignore = 'class_embed'", {"finetune_ignore": ["class_embed"]}),
        ("data_aug_scales = 480", {"data_aug_scales": [480]}),
        ("return_interm_indices = (1, 2)", {"return_interm_indices": [1, 2]}),
        ("num_classes = None", {"num_classes": None}),
        ("lr = None", "lr: None is not a number"),
        ("lr = [1e-4]", "lr: [0.0001] is not a number"),
        ("epochs = '12 or so'", "epochs: '12 or so' is not a whole number"),
        ("data_aug_scales = None", "data_aug_scales"),
        ("data_aug_scales = [480, None]", "data_aug_scales: None is not a whole number"),
        ("use_dn = None", "use_dn: None is not true or false"),
        ("backbone = 50", "backbone: 50 is not a string"),
    ],
)
def test_odd_values_in_a_file(text: str, expected: dict | str, tmp_path: Path):
    """None, or a scalar for a list: accepted, or a one-line error."""
    path = tmp_path / "mine.py"
    path.write_text(text + "\n")
    if isinstance(expected, dict):
        assert {k: getattr(load_config(path), k) for k in expected} == expected
        return
    with pytest.raises(UserError) as error:
        load_config(path)
    assert expected in str(error.value) and "\n" not in str(error.value)


if __name__ == "__main__":
    print(table(), end="")
