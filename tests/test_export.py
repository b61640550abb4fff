"""`dn-dino convert --to released`: our checkpoint in the released format, and back."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from datasets.toy import CATEGORIES
from main import main as evaluate
from models import build_model
from models.class_map import ClassMap
from models.cli import main as dn_dino
from models.registry import MODELS
from tests.conftest import without_queries
from train_state import TrainState
from util.checkpoint import load_weights, read_checkpoint
from util.config import SELECTION_SWITCHES, load_config, parse_command_line

ROOT = Path(__file__).parent.parent
# The authors' commands for evaluating their files.
PUBLISHED = {
    "dn_dab_detr": "-m dn_dab_detr --use_dn --eval",
    "dino": "-c configs/dino_4scale_r50.py --eval --options dn_scalar=100 embed_init_tgt=TRUE "
    "dn_box_noise_scale=1.0",
}
SWITCHES = {  # two_stage, two_stage_type, use_mqs, embed_init_tgt
    "static": (False, "no", False, False),
    "pure": (True, "standard", False, False),
    "mixed": (True, "standard", True, True),
}


def export(checkpoint: str | Path, output: str | Path, *flags: str) -> int:
    command = ["convert", str(checkpoint), "--output", str(output), "--to", "released", *flags]
    return dn_dino(command)


def make_state(small: list[str], model: str, *options: str, seed: int = 0) -> TrainState:
    """As in main.py after epoch 3, with random weights and a different average."""
    torch.manual_seed(seed)
    flags = sizes(small) if MODELS[model].detector.has_queries else without_queries(sizes(small))
    cfg = parse_command_line(["-m", model, *flags, "--num_classes", "6", *options])
    class_map = ClassMap.from_categories([{"id": i, "name": n} for i, n in CATEGORIES.items()])
    state = TrainState(cfg, build_model(cfg)[0], class_map)
    state.position.epoch = 3
    if cfg.use_ema:
        state.begin_average()
    for module in (state.model, state.ema.module) if state.ema else (state.model,):
        for weight in module.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    return state


def sizes(small: list[str]) -> list[str]:
    """The small model's options that suit every model."""
    return [*small[small.index("--backbone") :], "--pretrained_backbone", "false"]


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    """A checkpoint and its export."""
    return str(tmp_path / "checkpoint.pth"), str(tmp_path / "released.pth")


@pytest.mark.parametrize("model", MODELS)
def test_round_trip(model: str, small: list[str], paths: tuple[str, str]):
    """Same outputs and, with the published command lines, same metrics and detections."""
    state, fresh = (make_state(small, model, seed=seed) for seed in (0, 1))
    state.save(Path(paths[0]))
    assert export(*paths) == 0
    released = read_checkpoint(paths[1])
    assert set(released) == {"model", "epoch", "args", "class_map"}
    assert released["epoch"] == 3
    assert released["class_map"] == state.class_map.state_dict()
    assert type(released["args"]) is Namespace
    images = [torch.randn(3, 64, 48), torch.randn(3, 48, 64)]
    with torch.no_grad():
        expected, other = state.model.eval()(images), fresh.model.eval()(images)
        load_weights(fresh.model, released)
        actual = fresh.model(images)
    for key in ("pred_logits", "pred_boxes") if state.model.has_queries else ("boxes", "scores"):
        found, wanted, others = (torch.cat(list(x[key])) for x in (actual, expected, other))
        assert torch.equal(found, wanted)
        assert found.shape != others.shape or not torch.allclose(found, others, atol=1e-3)
    evaluations = []
    for path in paths if model in PUBLISHED else ():
        command = ["--resume", path, "--save_results", *sizes(small), *PUBLISHED[model].split()]
        assert evaluate(command) == 0
        out = Path(small[-1])
        stats = json.loads((out / "eval.json").read_text())
        detections = json.loads((out / "results.json").read_text())
        assert len(stats["test_coco_eval_bbox"]) == 12
        assert len(detections) == 8 * 10 * 6  # images * queries * classes
        evaluations.append((stats["test_coco_eval_bbox"], detections))
    assert evaluations[1:] == evaluations[:1]


@pytest.mark.parametrize(("selection", "switches"), SWITCHES.items())
def test_args_in_released_spelling(selection, switches, small: list[str], paths: tuple[str, str]):
    noise = ["--dn_number", "7", "--dn_label_noise_ratio", "0.25", "--dn_box_noise_scale", "0.75"]
    state = make_state(small, "dino", "--query_selection", selection, *noise)
    state.save(Path(paths[0]))
    assert export(*paths) == 0
    args = vars(read_checkpoint(paths[1])["args"])
    expected = {"scalar": 7, "dn_scalar": 7, "label_noise_scale": 0.25, "box_noise_scale": 0.75}
    expected |= {"use_lft": True, "modelname": "dino", "hidden_dim": 32, "dn_labelbook_size": 6}
    expected |= dict(zip(SELECTION_SWITCHES, switches, strict=True))
    assert {name: args[name] for name in expected} == expected
    # The released spellings are equivalent to the current ones.
    current = ("dn_number", "dn_label_noise_ratio", "dn_box_noise_scale", "look_forward_twice")
    rest = {k: v for k, v in args.items() if k not in (*current, "query_selection")}
    state.cfg.dn_labelbook_size = 6
    assert load_config(overrides=rest) == load_config(overrides=args) == state.cfg


def test_averaged_weights_and_notes(small: list[str], paths: tuple[str, str]):
    make_state(small, "dn_dab_detr", "--use_ema").save(Path(paths[0]))
    ours = read_checkpoint(paths[0])
    for entry, flags in (("model", []), ("ema_model", ["--ema"])):
        command = [sys.executable, "-m", "models", "convert", *paths[:1], "--to", "released"]
        command += ["--output", paths[1], *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "no backbone timm/resnet10t" in done.stderr
        assert "3 -> 0, 7 -> 1, 12 -> 2" in done.stderr
        assert same(read_checkpoint(paths[1])["model"], ours[entry])
    assert not same(ours["model"], ours["ema_model"])


def test_errors(small: list[str], paths: tuple[str, str], tmp_path: Path, capsys):
    """One line, exit status 2, and an unchanged checkpoint."""
    make_state(small, "dn_dab_detr").save(Path(paths[0]))
    assert export(*paths) == 0
    before, new, link = Path(paths[0]).read_bytes(), tmp_path / "new.pth", tmp_path / "link.pth"
    link.symlink_to(paths[0])
    for resume, output, message, *flags in (
        (paths[0], paths[0], "--output: .* is the checkpoint itself"),
        (link, paths[0], "--output: .* is the checkpoint itself"),
        (paths[0], tmp_path, "--output: .* is a directory"),
        (paths[0], tmp_path / "absent" / "new.pth", "absent/new.pth: checkpoint not saved"),
        (
            paths[1],
            new,
            "released.pth: not converted: it holds no config; name the one it was trained with",
        ),
        (tmp_path / "absent.pth", new, "absent.pth: No such file"),
        (
            paths[0],
            new,
            "checkpoint.pth: not converted: it holds no averaged weights .* leave out --ema",
            "--ema",
        ),
    ):
        capsys.readouterr()
        assert export(resume, output, *flags) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(f"dn-dino convert: error: .*{message}.*\n", error)
        assert not new.exists()
    assert Path(paths[0]).read_bytes() == before
