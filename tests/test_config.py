"""Options: one source for defaults, help, parsing and validation; the published command lines."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import UserError
from models.registry import MODELS
from util.config import CONFIG_DIR, load_config, parse_command_line


def parse(line: str):
    return parse_command_line(shlex.split(line))


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_loads(path: Path):
    cfg = load_config(path)
    assert json.loads(json.dumps(dataclasses.asdict(cfg))) == dataclasses.asdict(cfg)
    assert cfg.modelname in path.stem or path.stem.startswith("base")


def test_config_overrides_base_and_default():
    cfg = load_config("configs/dn_dab_detr_r101_dc5_3pat.py", {"num_queries": 100})
    assert (cfg.backbone, cfg.dilation, cfg.num_patterns) == ("resnet101", True, 3)
    assert (cfg.use_dn, cfg.epochs, cfg.num_queries, cfg.lr) == (True, 12, 100, 1e-4)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "-m dn_dab_detr --output_dir logs/R50 --batch_size 1 --coco_path DIR --resume CKPT "
            "--use_dn --eval",
            {"modelname": "dn_dab_detr", "use_dn": True, "eval": True, "batch_size": 1}
            | {"resume": "CKPT", "coco_path": "DIR", "num_queries": 300, "dn_number": 5},
        ),
        (
            "-m dn_dab_detr --epochs 50 --lr_drop 40 --dilation --num_patterns 3 --amp",
            {"epochs": 50, "lr_drop": 40, "dilation": True, "num_patterns": 3, "amp": True},
        ),
        ("-m dab_detr", {"modelname": "dab_detr", "use_dn": False}),
        (
            "-m dn_dab_detr --scalar 3 --label_noise_scale 0.1 --box_noise_scale 0.3",
            {"dn_number": 3, "dn_label_noise_ratio": 0.1, "dn_box_noise_scale": 0.3},
        ),
        (
            "-c configs/dn_dab_detr_r50.py --options dn_scalar=2 use_ema=TRUE lr=1e-3 "
            "data_aug_scales=[96,128] num_classes=None use_dn=False",
            {"dn_number": 2, "use_ema": True, "lr": 1e-3, "data_aug_scales": [96, 128]}
            | {"num_classes": None, "use_dn": False},
        ),
        ("--options lr=1 --lr 2", {"lr": 2.0}),
        (
            "-c configs/dn_dab_detr_r50.py --pretrain_model_path CKPT "
            "--finetune_ignore label_enc.weight class_embed",
            {"finetune_ignore": ["label_enc.weight", "class_embed"]},
        ),
        ("--multi_step_lr --lr_drop_list 3 5", {"lr_drop_list": [3, 5], "multi_step_lr": True}),
        ("--use_dn false --no_pretrained_backbone", {"pretrained_backbone": False}),
        ("--pretrained_backbone False", {"pretrained_backbone": False}),
        ("--data_aug_scales2_crop", {"data_aug_scales2_crop": []}),
        ("--data_aug_scales2_crop none", {"data_aug_scales2_crop": []}),
        ("--dn_number 0 --use_dn", {"use_dn": False}),
        ("-m dn_dab_deformable_detr_deformable_encoder_only", {"epochs": 50, "lr_drop": 40}),
        ("-m dino", {"eval_batch_size": 1, "batch_size": 2, "dn_num_boxes": "mean"}),
        ("--find_unused_params --dataset_file coco --local-rank=0 --epochs 3", {"epochs": 3}),
    ],
)
def test_command_lines(line: str, expected: dict):
    cfg = parse(line)
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num_querys 5", "unknown option num_querys; did you mean num_queries?"),
        ("--options num_querys=5", "unknown option num_querys; did you mean num_queries?"),
        ("--options num_queries", "not of the form name=value"),
        ("-m dn_dab_dter", "did you mean dn_dab_detr?"),
        ("--modelname absent", "no model absent"),
        ("--lr fast", "lr: 'fast' is not a number"),
        ("--epochs 0", "epochs: 0 is less than 1"),
        ("--batch_size 0", "batch_size: 0 is less than 1"),
        ("--batch_size 1.5", "batch_size: '1.5' is not a whole number"),
        ("--amp maybe", "amp: 'maybe' is not true or false"),
        ("--amp_dtype fp8", "amp_dtype: 'fp8' is not one of bf16, fp16"),
        ("--dn_label_noise_ratio 1.5", "dn_label_noise_ratio: 1.5 is more than 1"),
        ("--lr nan", "lr: 'nan' is not a number"),
        ("-m dab_detr --use_dn", "dab_detr has no denoising part"),
        ("--hidden_dim 30 --nheads 4", "hidden_dim: 30 is not a multiple"),
        ("--backbone resnet51", "did you mean resnet50?"),
        ("--backbone timm/resnet10", "did you mean timm/resnet1"),
        ("--onecyclelr --multi_step_lr", "mutually exclusive"),
        ("--onecyclelr --drop_lr_now", "mutually exclusive"),
        ("--onecyclelr --warmup_epochs 1", "mutually exclusive"),
        ("--overwrite --resume auto", "mutually exclusive"),
        ("-m dino --num_patterns 3", "num_patterns: dino has none"),
        ("-m dino --random_refpoints_xy", "random_refpoints_xy: anchors are not learned with"),
        ("--position_embedding learned", "'learned' is not supported, only 'sine'"),
        ("-m dino --masks", "masks: dino has no mask head; use detr, dn_detr"),
        ("-m dino --dn_labelbook_size 70 --num_classes 91", "70 is less than num_classes, 91"),
        ("-c configs/dn_dab_detr_r5.py", "did you mean configs/dn_dab_detr_r50.py?"),
        ("stray", "unexpected argument 'stray'"),
        ("--lr", "expected one argument"),
    ],
)
def test_errors_are_one_clear_line(line: str, message: str):
    with pytest.raises(UserError) as error:
        parse(line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_file_is_named(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("lr = 1e-3\nweight_decy = 0.1\n")
    with pytest.raises(UserError, match=r"mine\.py: unknown option weight_decy; .* weight_decay"):
        load_config(path)
    path.write_text("lr = = 2\n")
    with pytest.raises(UserError, match=r"mine\.py: not a config file: SyntaxError"):
        load_config(path)
    path.write_text("_base_ = 'absent.py'\n")
    with pytest.raises(UserError, match=r"absent\.py: no such config file"):
        load_config(path)


def test_later_base_overrides_earlier(tmp_path: Path):
    (tmp_path / "a.py").write_text("lr = 1e-3\nepochs = 7\n")
    (tmp_path / "b.py").write_text("epochs = 8\nbatch_size = 3\n")
    (tmp_path / "c.py").write_text("_base_ = ['a.py', 'b.py']\nbatch_size = 4\n")
    cfg = load_config(tmp_path / "c.py")
    assert (cfg.lr, cfg.epochs, cfg.batch_size) == (1e-3, 8, 4)


def test_help_explains_every_option():
    command = [sys.executable, "main.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for f in dataclasses.fields(load_config()):
        assert f.metadata["help"]
        assert re.search(rf"--(no_)?{f.name}\b", text), f.name
    for name in MODELS:
        assert name in text


def test_error_exits_with_status_2():
    command = [sys.executable, "main.py", "--epochs", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "main.py: error: epochs: 0 is less than 1\n"


@pytest.mark.parametrize(
    ("line", "selection"),
    [
        ("-m dn_dab_dino_deformable_detr --two_stage --contrastive --use_mqs --use_lft", "mixed"),
        ("-m dn_dab_dino_deformable_detr --two_stage --use_mqs FALSE", "pure"),
        ("-m dn_dab_deformable_detr --two_stage", "pure"),
        ("-m dn_deformable_detr", "static"),
        ("-c configs/dino_4scale_r50.py --options embed_init_tgt=TRUE", "mixed"),
        ("-c configs/dino_4scale_r50.py --options embed_init_tgt=False", "pure"),
        ("-c configs/dino_4scale_r50.py --options two_stage_type=no", "static"),
        ("-c configs/dino_4scale_r50.py --options two_stage_type=standard", "mixed"),
    ],
)
def test_released_query_selection_switches(line, selection):
    assert parse_command_line(line.split()).query_selection == selection


def test_published_dino_command_of_dn_detr():
    line = (
        "-m dn_dab_dino_deformable_detr --two_stage --contrastive --use_mqs --use_lft"
        " --scalar 100 --use_dn"
    )
    cfg = parse_command_line(line.split())
    assert cfg == load_config("configs/dn_dab_dino_deformable_detr_r50.py")
