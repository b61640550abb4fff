"""`dn-dino eval`, `inspect` and `benchmark`, the help of every command, and torch.hub."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import hubconf
from main import main as train
from models import load_detector
from models.cli import COMMANDS, main
from models.coco import CocoAnnotations
from models.commands.eval import evaluate
from tests.conftest import DETECTOR
from util.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"\n  dn-dino {command} " in capsys.readouterr().out


def test_eval_gives_the_figures_of_main(saved, toy, tmp_path, capsys):
    """To the last digit, if main.py does not pad the images either."""
    (tmp_path / "tiny.py").write_text("\n".join(f"{k} = {v!r}" for k, v in DETECTOR.items()))
    argv = ["-c", str(tmp_path / "tiny.py"), "--resume", str(saved), "--coco_path", str(toy)]
    argv += ["--eval", "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert train(argv) == 0
    expected = json.loads((tmp_path / "eval.json").read_text())["test_coco_eval_bbox"]
    table = capsys.readouterr().out.split("test\n")[-1]
    files = toy / "val2017", toy / "annotations" / "instances_val2017.json"
    predictor = load_detector(saved)
    dataset = CocoAnnotations(*files, predictor.class_map)
    figures = evaluate(predictor, dataset, batch_size=1).summarize()
    assert figures == expected and max(figures) > 0.01
    assert evaluate(predictor, dataset, batch_size=4).summarize() == pytest.approx(
        figures, abs=0.01
    )
    command = ["eval", str(saved), "--batch_size", "1", "--device", "cpu"]
    names = ["--images", str(files[0]), "--annotations", str(files[1])]
    for data in (["--coco_path", str(toy)], names):
        assert main([*command, *data]) == 0
        printed = capsys.readouterr().out
        assert printed.count("\n") == 12 and table.startswith(printed)


def test_eval_errors(saved, toy, tmp_path, monkeypatch, capsys):
    command = ["eval", str(saved), "--device", "cpu"]
    data = ["--coco_path", str(toy)]
    for more, message in (
        ([], "either --coco_path, or --images and --annotations"),
        ([*data, "--images", "x", "--annotations", "y"], "either --coco_path"),
        ([*data, "--split", "val2018"], "instances_val2018.json"),
        ([*data, "--batch_size", "0"], "batch_size: at least 1"),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # its import fails
    assert main([*command, *data]) == 2
    assert "pip install dn_dino[eval]" in capsys.readouterr().err


def test_inspect(saved, checkpoint, tmp_path, capsys):
    assert main(["inspect", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = {line.split()[0]: line[11:] for line in lines if not line.startswith(" ")}
    assert titles["origin"] == "main.py, after epoch 3; with averaged weights (EMA)"
    size = sum(p.numel() for p in load_detector(saved).model.parameters()) / 1e6
    model, backbone, parameters = titles["model"].split(", ")
    assert (model, backbone) == ("dn_dab_detr", "backbone timm/test_resnet")
    frozen = 0.01  # M: the weights of frozen norms are no parameters
    assert float(parameters.split()[0]) == pytest.approx(size, abs=frozen)
    assert titles["input"] == "shorter side 96 pixels, longer side at most 128"
    assert titles["classes"].startswith("6: 3 circle, 7 square, 12 triangle")
    options = {line.strip() for line in lines if line.startswith(" ")}
    assert titles["config"] == f"differs from dn_dab_detr_r50 in {len(options)} options"
    assert {"hidden_dim = 64, not 256", "backbone = 'timm/test_resnet', not 'resnet50'"} < options
    assert not any(option.startswith(("num_classes", "use_dn ")) for option in options)

    state = {"model": checkpoint["model"], "args": Namespace(modelname="dn_dab_detr"), "epoch": 49}
    save_checkpoint(tmp_path / "released.pth", state)
    assert main(["inspect", str(tmp_path / "released.pth")]) == 0
    printed = capsys.readouterr().out
    assert "the authors' code, after epoch 49; with weights only" in printed
    assert "dn_dab_detr, backbone unknown" in printed
    assert "6 labels without names, used as category ids" in printed and "config" not in printed


def test_benchmark(saved, capsys):
    command = ["benchmark", str(saved), "--device", "cpu", "--runs", "3", "--batch_size", "2"]
    assert main([*command, "--size", "48", "64", "--half"]) == 0
    machine, setting, _, *stages, speed = capsys.readouterr().out.splitlines()
    assert "threads" in machine
    assert setting == "input 2 x 3 x 48 x 64, half precision, 3 runs"
    medians = {row[0]: float(row[1]) for row in map(str.split, stages)}
    assert list(medians) == ["preprocess", "model", "postprocess", "all"]
    assert medians["all"] >= medians["model"] > 0
    assert re.fullmatch(r"[\d.]+ images/s, peak memory \d+ MB", speed)
    assert main(command) == 0
    assert "input 2 x 3 x 96 x 128, single precision" in capsys.readouterr().out
    assert main([*command[:-2], "--size", "8", "64"]) == 2


HUB = """
import sys, torch
repository, checkpoint = sys.argv[1:]
hub = dict(source="local", trust_repo=True)
model = torch.hub.load(repository, "dn_dab_detr_r50", checkpoint=checkpoint, **hub)
print(len(model.predict(torch.zeros(3, 40, 60, dtype=torch.uint8), threshold=0)[0]))
options = dict(num_classes=3, backbone="timm/test_resnet", enc_layers=1, dec_layers=1)
random = torch.hub.load(repository, "dab_detr_r50", **options, **hub)
print(random.class_map.num_classes, len(random.model.transformer.encoder.layers))
try:
    torch.hub.load(repository, "dino_4scale_r50", checkpoint=checkpoint, **hub)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_torch_hub(saved, tmp_path):
    """Outside the repository, without a warning."""
    command = [sys.executable, "-c", HUB, str(ROOT), str(saved)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    found, built, refused = done.stdout.strip().splitlines()
    assert 0 < int(found) <= 20 and built == "3 1"
    assert refused.startswith("UserError ") and "holds a dn_dab_detr, not a dino" in refused
    entries = [vars(hubconf)[path.stem] for path in ROOT.glob("configs/*.py")]
    assert len(entries) > 10 and all("Without a checkpoint" in entry.__doc__ for entry in entries)
    assert hubconf.dino_4scale_r50.__doc__.startswith("DINO, ResNet-50, 4 scales")
