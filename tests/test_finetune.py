"""--finetune and the options that it sets, each by itself: real runs of small models."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from main import main
from models import build_model
from models.class_map import COCO_NUM_CLASSES, ClassMap
from models.options import DetectorOptions
from models.registry import MODELS
from models.weights import load_weights, with_matched_rows
from tests.conftest import DETECTOR, Pair
from tests.test_distributed import run_both
from tests.test_main import assert_same_state, edit, fails_with, read_log  # noqa: F401  a fixture
from util.checkpoint import read_checkpoint
from util.config import RECIPE, parse_command_line

SIZES = ["--data_aug_scales", "48", "64", "--data_aug_max_size", "64", "--num_workers", "0"]
TINY = ["--backbone", "timm/test_resnet"]
FROZEN = ["--lr", "0", "--lr_backbone", "0"]  # AP stays as it is
ALONE = ["--warmup_epochs", "1.5", "--use_ema", "--ema_warmup", "--onecyclelr", "FALSE"]


def renamed(names: list[str]) -> Callable[[dict], None]:
    """Changes a data set: its categories, in ascending order, get these names and ids from 50."""

    def change(data: dict) -> None:
        ids = {
            c["id"]: 50 + i for i, c in enumerate(sorted(data["categories"], key=lambda c: c["id"]))
        }
        data["categories"] = [{"id": 50 + i, "name": name} for i, name in enumerate(names)]
        for annotation in data["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]

    return change


@pytest.fixture
def other(edit: Callable) -> Callable[[list[str]], list[str]]:  # noqa: F811
    """Arguments for the toy data set with other names of its categories."""

    def arguments(names: list[str]) -> list[str]:
        for split in ("train", "val"):
            root = edit(renamed(names), split)
        return [
            *SIZES,
            "--device",
            "cpu",
            "--batch_size",
            "4",
            "--epochs",
            "1",
            "--coco_path",
            str(root),
        ]

    return arguments


def trained(out: Path) -> tuple[dict, dict[str, int]]:
    """The weights of a run, and its labels by name."""
    state = read_checkpoint(out / "checkpoint.pth")
    return state["model"], {name: label for label, _, name in state["class_map"]["categories"]}


def test_rows_follow_the_names_of_classes(saved: Path, checkpoint: dict, other, tmp_path, capsys):
    """Without -c or -m: the model is the checkpoint's. Other classes keep their first values, and
    a query that it lacks its own."""
    args = [*other(["hexagon", "Star", "x", "y", "circle", "z"]), *FROZEN, "--num_queries", "14"]
    out = tmp_path / "out"
    assert main(["--finetune", str(saved), *args, "--output_dir", str(out)]) == 0
    assert f"finetune: {saved}: 2 of 6 classes are known by name" in capsys.readouterr().out
    old, (new, label_of) = checkpoint["model"], trained(out)
    before = {name: label for label, _, name in checkpoint["class_map"]["categories"]}
    for name in ("class_embed.weight", "class_embed.bias", "label_enc.weight"):
        for ours, theirs in (("Star", "star"), ("circle", "circle")):
            assert torch.equal(new[name][label_of[ours]], old[name][before[theirs]])
    assert torch.equal(new["label_enc.weight"][-1], old["label_enc.weight"][-1])
    fresh = [label_of[name] for name in ("hexagon", "x", "y", "z")]
    assert new["class_embed.bias"][fresh].tolist() == pytest.approx([-math.log(99)] * 4)
    assert not torch.isin(new["label_enc.weight"][fresh], old["label_enc.weight"]).any()
    assert torch.equal(new["refpoint_embed.weight"][:12], old["refpoint_embed.weight"])
    layer = "transformer.encoder.layers.0.linear1.weight"
    assert torch.equal(new[layer], old[layer])
    config = json.loads((out / "config.json").read_text())
    # Sizes that the command line gives are not changed.
    expected = RECIPE | {"max_enlargement": 0, "data_aug_scales": [48, 64], "num_queries": 14}
    assert {name: config[name] for name in expected} == expected
    assert "ema_test_coco_eval_bbox" in read_log(out)[0]


def test_released_files_know_coco_names(checkpoint: dict, other, tmp_path: Path, capsys):
    """Their labels are COCO's category ids; a file of other classes knows none."""
    weights, path = dict(checkpoint["model"]), tmp_path / "released.pth"
    args = ["-m", "dn_dab_detr", "--finetune", str(path)]
    args += [f"--{k}={v}" for k, v in DETECTOR.items() if "data_aug" not in k and k != "modelname"]
    args += [*other(["person", "a", "b", "Dog", "c", "d"]), *FROZEN]
    for rows, known in ((COCO_NUM_CLASSES, 2), (7, 0)):
        for name, extra in (
            ("class_embed.weight", 0),
            ("class_embed.bias", 0),
            ("label_enc.weight", 1),
        ):
            weights[name] = torch.randn(rows + extra, *weights[name].shape[1:])
        torch.save({"model": weights, "args": argparse.Namespace(lr=1e-4), "epoch": 9}, path)
        out = tmp_path / str(rows)
        assert main([*args, "--output_dir", str(out)]) == 0
        assert f"{known} of 6 classes are known by name" in capsys.readouterr().out
        new, label_of = trained(out)
        same = [
            torch.isin(row, weights["class_embed.weight"]).all()
            for row in new["class_embed.weight"]
        ]
        assert sum(same) == known
        for name, category_id in {"person": 1, "Dog": 18}.items() if known else ():
            assert torch.equal(
                new["label_enc.weight"][label_of[name]], weights["label_enc.weight"][category_id]
            )


@pytest.mark.parametrize("name", [k for k, spec in MODELS.items() if spec.detector.has_queries])
@pytest.mark.parametrize("size", [(3, 8), (9, 30)])
def test_every_detector_takes_fewer_or_more_classes_and_queries(name: str, size: tuple[int, int]):
    """All of its weights fit, and those of classes are where the names say."""
    classes, queries = size
    options = {**MODELS[name].detector.implied, **DETECTOR, "modelname": name}
    options |= {"use_dn": MODELS[name].detector.has_denoising, "return_interm_indices": [3]}
    make = lambda n, q: build_model(DetectorOptions.of(options, num_classes=n, num_queries=q))[0]
    torch.manual_seed(0)
    old, new = make(6, 16), make(classes, queries)
    named = lambda names: ClassMap(len(names), dict(enumerate(names)), dict(enumerate(names)))
    theirs, ours = named("abcdef"), named("zfaxywvut"[:classes])  # f is 5 of 6, a is 0
    first = {key: value.clone() for key, value in new.state_dict().items()}
    state = with_matched_rows(old.state_dict(), new, ours, theirs)
    report = load_weights(new, state)
    assert report.loaded == len(first)
    for key, value in new.state_dict().items():
        before = old.state_dict()[key]
        if "class_embed" in key or "label_enc" in key:
            assert torch.equal(value[1:3], before[[5, 0]]), key
            assert torch.equal(value[3:classes], first[key][3:classes]), key
            assert torch.equal(value[classes:], before[6:]), key
        elif value.shape == before.shape:
            assert torch.equal(value, before), key
        else:
            number = min(len(value), len(before))
            assert torch.equal(value[:number], before[:number]), key
            assert torch.equal(value[number:], first[key][number:]), key


def test_another_model_is_an_error(saved: Path, other, tmp_path: Path, capsys):
    args = [*other(list("abcdef")), "--output_dir", str(tmp_path / "out"), "--finetune"]
    why = "does not fit the model in", "first ", "skip them with --finetune_ignore"
    fails_with(capsys, [*args, str(saved), "--hidden_dim", "32"], f"finetune: {saved}", *why)
    fails_with(capsys, [*args, str(saved), "--enc_layers", "2"], "encoder.layers.1", *why)
    fails_with(capsys, [*args, str(tmp_path / "absent.pth")], "absent.pth")
    both = [str(saved), "--pretrain_model_path", str(saved)]
    fails_with(capsys, [*args, *both], "finetune and pretrain_model_path are mutually exclusive")


def test_what_is_given_wins_over_the_recipe(saved: Path, tmp_path: Path):
    values = lambda *args: vars(parse_command_line(["--finetune", str(saved), *args]))
    assert values().items() >= RECIPE.items()
    assert values()["hidden_dim"] == 64 and values()["data_aug_scales"][-1] == 800
    given = {"warmup_epochs": 0.5, "use_ema": False, "patience": 3, "max_enlargement": 1.0}
    args = [f"--{name}={value}" for name, value in given.items()]
    assert values(*args).items() >= given.items()
    assert values("--options", "patience=4")["patience"] == 4
    assert values("--onecyclelr")["warmup_epochs"] == 0
    assert values("--data_aug_max_size", "500")["max_enlargement"] == 0
    config = tmp_path / "mine.py"
    config.write_text("use_ema = False\ndata_aug_scales = [64]\n")
    expected = {
        "use_ema": False,
        "max_enlargement": 1.67,
        "data_aug_scales": [64],
        "num_queries": 300,
    }
    assert values("-c", str(config)).items() >= expected.items()
    assert vars(parse_command_line([])).items() >= dict.fromkeys(RECIPE, 0).items()


def test_rates_rise_step_by_step_and_a_resumed_run_equals_an_uninterrupted_one(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 6 steps per epoch, 9 warm up. The average's warm-up and the count to the end go on too."""
    rates = []
    step = torch.optim.AdamW.step

    def recorded(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    args = [
        *small,
        *ALONE,
        "--optimizer",
        "adamw",
        "--epochs",
        "3",
        "--lr",
        "1e-3",
        "--lr_drop",
        "2",
    ]
    args += ["--lr_backbone", "1e-4", "--save_checkpoint_interval", "1", "--patience", "5"]
    out, half = tmp_path / "out", tmp_path / "half"
    assert main(args) == 0
    factors = torch.tensor([*(n / 9 for n in range(1, 10)), 1, 1, 1, *[0.1] * 6]).view(-1, 1)
    assert sorted(rates[9]) == [1e-4, 1e-3]  # exactly
    expected = factors * torch.tensor(rates[9])
    torch.testing.assert_close(torch.tensor(rates), expected)
    logged = torch.tensor([line["train_lr"] for line in read_log(out)])
    torch.testing.assert_close(logged, expected[[5, 11, 17], 0])
    rates.clear()
    start = str(out / "checkpoint0000.pth")
    assert main([*args, "--output_dir", str(half), "--resume", start]) == 0
    torch.testing.assert_close(torch.tensor(rates), expected[6:])
    whole, resumed = (read_checkpoint(d / "checkpoint.pth") for d in (out, half))
    assert_same_state(whole, resumed)
    assert whole["ema_updates"] == resumed["ema_updates"] == 18
    assert whole["epochs_since_best"] == resumed["epochs_since_best"]
    for a, b in zip(read_log(out)[1:], read_log(half), strict=True):
        assert all(a[k] == b[k] for k in a if "coco" in k or "loss" in k or k == "train_lr")


def test_training_stops_when_ap_does_not_rise(small: list[str], tmp_path: Path, pair: Pair, capsys):
    """In all processes, and not later if resumed."""
    args = [*small, *TINY, *FROZEN, "--onecyclelr", "FALSE", "--epochs", "9", "--patience", "2"]
    args += ["--batch_norm_type", "FrozenBatchNorm2d", "--save_checkpoint_interval", "1"]
    assert main(args) == 0
    out = tmp_path / "out"
    assert [line["epoch"] for line in read_log(out)] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert re.search(r"patience: stopped, as AP has not exceeded 0\.00. for 2 epochs", printed)
    assert main(args) == 0
    assert [line["epoch"] for line in read_log(out)] == [0, 1, 2]
    start = ["--resume", str(out / "checkpoint0001.pth"), "--output_dir"]
    assert main([*args, *start, str(tmp_path / "again")]) == 0
    assert [line["epoch"] for line in read_log(tmp_path / "again")] == [2]
    run_both(pair, [*args, "--output_dir", str(tmp_path / "two")], tmp_path)
    assert [line["epoch"] for line in read_log(tmp_path / "two")] == [0, 1, 2]


def test_sizes_follow_the_images(small: list[str], toy: Path, tmp_path: Path, capsys):
    """The shorter side of median length becomes at most 1.5 times as long, in evaluation too; all
    sizes keep their proportions."""
    images = json.loads((toy / "annotations/instances_train2017.json").read_text())["images"]
    median = torch.tensor([min(i["width"], i["height"]) for i in images]).double().quantile(0.5)
    args = [*small, *TINY, "--data_aug_scales", "100", "200", "--data_aug_max_size", "400"]
    args += ["--data_aug_scales2_crop", "60", "120", "--max_enlargement", "1.5", "--debug"]
    assert main(args) == 0
    factor, out = 1.5 * median.item() / 200, tmp_path / "out"
    assert 0.2 < factor < 0.5
    config = read_checkpoint(out / "checkpoint.pth")["config"]
    given = {"data_aug_scales": [100, 200], "data_aug_scales2_crop": [60, 120]}
    given |= {"data_aug_scales2_resize": [400, 500, 600]}
    for name, sizes in given.items():
        assert config[name] == [round(size * factor) for size in sizes]
    assert config["data_aug_max_size"] == round(400 * factor)
    assert json.loads((out / "config.json").read_text()) == config
    again = tmp_path / "again"
    resume = ["--eval", "--resume", str(out / "checkpoint.pth"), "--output_dir", str(again)]
    assert main([*args, *resume]) == 0
    stats = json.loads((again / "eval.json").read_text())
    assert stats["test_loss"] == read_log(out)[0]["test_loss"]
    # Larger images leave them as they are.
    capsys.readouterr()
    assert main([*args, "--max_enlargement", "9", "--overwrite"]) == 0
    assert "max_enlargement" not in capsys.readouterr().out
