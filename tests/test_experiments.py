"""tools/experiment.py: runs, what is made from them, and the descriptions in experiments/."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from datasets.toy import make_toy_coco
from experiments import AP, Arm, Experiment, Toy, by_layer, load, logged, names
from experiments.programs import after_toy
from models import dn_components
from models.errors import UserError
from tests.conftest import QUERIES
from tests.kill_runs import read_log
from tools import experiment as tool
from tools.results import duplicates_per_object, epochs_to_reach, interval, plot, read_runs, table
from util.config import parse_command_line

ROOT = Path(__file__).resolve().parents[1]
# A model that trains in seconds, whatever an arm is.
TINY = ["backbone=timm/test_resnet", "batch_norm_type=BatchNorm2d", "pretrained_backbone=False"]
TINY += ["hidden_dim=32", "nheads=4", "dim_feedforward=32", "enc_layers=1", "dec_layers=2"]
TINY += ["num_queries=20", "data_aug_scales=[48]", "data_aug_max_size=64", "num_workers=0"]
TINY += ["data_aug_scales2_crop=[]", "num_feature_levels=3", "batch_size=2"]


def runs_of(name: str, data: Path, root: Path, *more: str) -> list[tool.Run]:
    """Those of the first seed."""
    described = load(name)
    runs = tool.list_runs(name, described, data, [*TINY, *more], root)[: len(described.arms)]
    for run in runs:
        if "rcnn" in run.settings["config"]:
            named = lambda option: f"--{option.split('=')[0]}" in QUERIES
            run.settings["options"] = [o for o in run.settings["options"] if not named(o)]
    return runs


def train(run: tool.Run) -> None:
    """In this process, which is faster than `run_here`."""
    program = importlib.import_module(run.settings["program"])
    assert program.main([*run.prepare(), "--output_dir", str(run.outputs)]) == 0
    assert run.collect() and run.finished


@pytest.mark.parametrize("name", names())
def test_descriptions_are_valid(name: str, tmp_path: Path):
    """Every arm's options exist and fit its model; all figures have names of their own."""
    described = load(name)
    titles = [figure.title for figure in described.figures]
    assert len(set(titles)) == len(titles) and described.claim.endswith(".")
    for run in tool.list_runs(name, described, tmp_path, [], tmp_path):
        cfg = parse_command_line(run.prepare())
        expected = described.arms[run.arm].options.get("epochs", described.epochs)
        assert cfg.epochs == expected or expected is None


@pytest.mark.parametrize("name", [name for name in names() if load(name).data == "coco"])
def test_full_size_comparisons_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps and an evaluation of every arm, with a small model."""
    data = make_toy_coco(tmp_path / "toy", num_train=4, num_val=2, size=48)
    monkeypatch.setattr(dn_components, "group_mask", dn_components.group_mask)  # an arm changes it
    for run in runs_of(name, data, tmp_path, "epochs=1", "lr_drop=1"):
        train(run)


@pytest.mark.full
def test_a_killed_comparison_goes_on(tmp_path: Path):
    """`kill -9` of the tool and its runs: finished runs are kept, the other one is resumed."""
    command = [sys.executable, str(ROOT / "tools/experiment.py"), "mask_toy", "--seeds", "1"]
    command += ["--jobs", "1", "--output_dir", str(tmp_path), "--options", *TINY, "epochs=4"]
    make_toy_coco(tmp_path / f"outputs/experiments/{load('mask_toy').data}", 16, 4, 48)
    tool_process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    results = tmp_path / "results/mask_toy"
    first = results / "with_the_mask/seed_0/log.txt"
    second = tmp_path / "outputs/experiments/mask_toy/without_the_mask/seed_0/log.txt"
    end = time.monotonic() + 200
    while not (second.exists() and second.read_text()):  # created before its first line
        assert tool_process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(tool_process.pid, signal.SIGKILL)
    tool_process.wait()
    finished, begun = first.stat().st_mtime_ns, read_log(second.parent)
    assert 0 < len(begun) < 4
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert first.stat().st_mtime_ns == finished
    again = read_log(results / "without_the_mask/seed_0")
    assert again[: len(begun)] == begun and len(again) == 4
    assert "| without the mask - with the mask |" in (tmp_path / "docs/RESULTS.md").read_text()
    assert (results / "curves.png").stat().st_size > 10_000


def test_finetuning_arms_share_a_toy_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    data = make_toy_coco(tmp_path / "toy", num_train=4, num_val=2, size=48)
    monkeypatch.setattr(after_toy, "TOY", Toy(num_train=4, num_val=2, size=48))
    for run in runs_of("finetune_cards", data, tmp_path, "epochs=1")[2:]:
        train(run)
    toy = tmp_path / "outputs/experiments/finetune_cards/toy_trained/seed_0"
    assert [line["epoch"] for line in read_log(toy)] == list(range(after_toy.EPOCHS))
    printed = capsys.readouterr().out
    ignored, by_name = printed.index("\nignored: "), printed.index("6 of 6 classes are known")
    assert f"{toy / 'checkpoint.pth'}:\nloaded: " in printed[:ignored] and ignored < by_name


def test_changed_options_start_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = make_toy_coco(tmp_path / "toy", num_train=4, num_val=2, size=48)
    for dropout in (0.0, 0.1):
        run = runs_of("convergence_toy", data, tmp_path, "epochs=1", f"dropout={dropout}")[0]
        assert not run.finished and not run.collect()
        train(run)
    assert "its options have changed, starting again" in capsys.readouterr().out
    assert json.loads((run.outputs / "config.json").read_text())["dropout"] == 0.1


def test_a_failed_run_is_named(tmp_path: Path):
    data = make_toy_coco(tmp_path / "toy", num_train=4, num_val=2, size=48)
    run = runs_of("convergence_toy", data, tmp_path, "num_queries=1")[0]
    with pytest.raises(UserError, match=r"DAB-DETR, seed 0: exit status 2, see .*output\.txt"):
        tool.run_here([run], jobs=1, processes=1)
    assert "num_queries" in (run.outputs / "output.txt").read_text()


def test_unknown_names(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert tool.main(["convergence_toi"]) == 2
    assert "did you mean convergence_toy?" in capsys.readouterr().err
    with pytest.raises(UserError, match="no arm is called 'dino'"):
        arms = {"DINO": Arm("toy/dino", against="dino")}
        Experiment("", "", Toy(), 1, arms)


def lines(*aps: float) -> list[dict]:
    return [{"test_coco_eval_bbox": [ap, 2 * ap], "loss_0": 2 * ap, "loss": ap} for ap in aps]


def test_figures():
    log = lines(0.1, 0.3)
    assert AP.by_epoch(log) == [0.1, 0.3] and AP.value(log) == 0.3
    assert [figure.value(log) for figure in by_layer("loss", "loss", 2)] == pytest.approx(
        [0.4, 0.2]
    )
    assert math.isnan(logged("none", "ema_test_coco_eval_bbox", 0).value(log))


def test_a_zoo_row():
    line = {"n_parameters": 1_230_000, "train_images_per_second": 30.0, "epoch_time": "0:01:30"}
    first = {**line, "test_coco_eval_bbox": [0.1, 0.2]}
    last = {**line, "train_images_per_second": 40.0, "epoch_time": "1:00:00"}
    last["test_coco_eval_bbox"] = [0.4567, 0.7]
    text = table(load("zoo"), {"dino": {0: [first, last]}})
    assert "| dino | 1 | 0.457 | 0.700 | 1.2 | 61.5 | 35 |" in text


def test_epochs_to_reach():
    assert epochs_to_reach([0.1, 0.3, 0.2], 0.2) == pytest.approx(1.5)
    assert epochs_to_reach([0.4], 0.1) == pytest.approx(0.25)
    assert epochs_to_reach([0.1, 0.1], 0.2) == math.inf


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.4, 0.1, 5), rng.normal(0.3, 0.1, 5)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    printed = interval(list(ours - theirs), "+.6f")
    assert printed == f"{np.mean(ours - theirs):+.6f} [{low:+.6f}, {high:+.6f}]"


def test_tables_and_plots(tmp_path: Path):
    arms = {"A": Arm("toy/dino"), "B": Arm("toy/dino", against="A")}
    described = Experiment("", "", Toy(), 2, arms, figures=[AP], seeds=(0, 1))
    courses = {"A": [(0.1, 0.2), (0.2, 0.4)], "B": [(0.3, 0.4), (0.4, 0.8)]}
    finished = tool.list_runs("x", described, tmp_path, [], tmp_path)
    for run in finished:
        run.results.mkdir(parents=True)
        log = lines(*courses[run.arm][run.settings["seed"]])
        (run.results / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    runs = read_runs(described, finished)
    rows = [line.strip("| ").split(" | ") for line in table(described, runs).splitlines()]
    assert rows[2] == ["A", "2", "0.300 ± 0.141"] and rows[3] == ["B", "2", "0.600 ± 0.283"]
    name, difference, needed = rows[-1]
    assert name == "B - A" and difference.startswith("+0.300 [-")
    # 0.2 after two thirds of an epoch, 0.4 after one.
    assert needed.startswith("0.8 [") and needed.endswith("of 2 (42%)")
    plot(described, runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_duplicates(tmp_path: Path):
    """Of two objects, one is found three times, once with a low score; a detection of another class
    and one beside all objects do not count."""
    truth = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 10]},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 90, 90], "iscrowd": 1},
    ]
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 9], "score": 0.5},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 9], "score": 0.2},
        {"image_id": 1, "category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [20, 20, 10, 10], "score": 0.9},
    ]
    (tmp_path / "annotations").mkdir()
    annotations = tmp_path / "annotations/instances_val2017.json"
    annotations.write_text(json.dumps({"annotations": truth}))
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert duplicates_per_object(tmp_path, tmp_path) == 0.5


def test_runs_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch):
    def places(gpus: int, jobs: int | None, processes: int) -> list[dict[str, str]]:
        monkeypatch.setattr(tool.torch.cuda, "device_count", lambda: gpus)
        queue = tool.free_places(jobs, processes)
        return [queue.get() for _ in range(queue.qsize())]

    visible = lambda *names: [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    assert places(4, None, 1) == visible("0", "1", "2", "3")
    assert places(5, None, 2) == visible("0,1", "2,3")
    assert places(4, 1, 2) == visible("0,1")
    monkeypatch.setattr(tool.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places(0, None, 1) == 6 * [{"OMP_NUM_THREADS": "1"}]
    assert places(0, 2, 1) == 2 * [{"OMP_NUM_THREADS": "3"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert places(0, None, 1) == 6 * [{"OMP_NUM_THREADS": "2"}]
