"""The command line end to end: real files, real training, a killed process."""

import argparse
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from pycocotools.coco import COCO

from main import main
from tests.conftest import wait_for_first_epoch
from tests.kill_runs import kill, start_main
from util.checkpoint import latest_checkpoint, read_checkpoint

# Everything stateful: schedule, average, random numbers of dropout and denoising.
STATEFUL = ["--epochs", "3", "--save_checkpoint_interval", "1", "--use_ema", "--dropout", "0.1"]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def assert_same_state(a: dict, b: dict) -> None:
    for key in ("model", "ema_model"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    for index, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][index][k]) for k, v in state.items())
    for first, second in zip(a["rng"], b["rng"], strict=True):
        assert torch.equal(first["torch"], second["torch"])


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of an uninterrupted run of three epochs."""
    from tests.conftest import SMALL

    out = tmp_path_factory.mktemp("trained")
    args = [*SMALL, *STATEFUL, "--coco_path", str(toy), "--output_dir", str(out)]
    assert main(args) == 0
    return out


def test_run_writes_its_outputs(trained: Path):
    log = read_log(trained)
    assert [line["epoch"] for line in log] == [0, 1, 2]
    for key in ("train_loss", "train_loss_ce", "train_loss_bbox_dn_0", "train_lr", "test_loss"):
        assert all(isinstance(line[key], float) for line in log), key
    assert all(len(line["test_coco_eval_bbox"]) == 12 for line in log)
    assert all(len(line["ema_test_coco_eval_bbox"]) == 12 for line in log)
    assert {"n_parameters", "epoch_time", "train_class_error"} <= set(log[0])
    terms = sum(v for k, v in log[0].items() if k.startswith("train_loss_") and "unsc" not in k)
    assert log[0]["train_loss"] == pytest.approx(terms, rel=1e-4)
    config = json.loads((trained / "config.json").read_text())
    assert config["hidden_dim"] == 32
    assert (trained / "command.txt").read_text().startswith("python main.py -c ")
    assert list(trained.glob("events.out.tfevents.*"))
    checkpoint = read_checkpoint(trained / "checkpoint.pth")
    required = ("model", "ema_model", "optimizer", "lr_scheduler", "epoch", "rng", "config")
    assert set(required) <= set(checkpoint)
    assert checkpoint["epoch"] == 2
    names = {name: i for _, i, name in checkpoint["class_map"]["categories"]}
    assert names == {"circle": 3, "square": 7, "triangle": 12, "star": 25, "ring": 44, "cross": 81}


def test_matching_log_continues_after_a_stop(toy: Path, tmp_path: Path):
    from tests.conftest import SMALL

    args = [*SMALL, "--use_dn", "--onecyclelr", "FALSE", "--coco_path", str(toy), "--output_dir"]
    whole, half = str(tmp_path / "whole"), str(tmp_path / "half")
    assert main([*args, whole, "--log_matching", "--epochs", "2"]) == 0
    assert main([*args, half, "--match_unstable_error"]) == 0
    assert main([*args, half, "--log_matching", "--epochs", "2", "--resume", "auto"]) == 0
    whole, half = (read_log(Path(out)) for out in (whole, half))
    names = [
        f"test_{k}{i}" for k in ("anchor_distance", "matching_instability") for i in ("_0", "")
    ]
    assert all(line[name] > 0 for line in whole for name in names[:2])
    assert not any(name in whole[0] for name in names[2:])  # no previous epoch
    assert all(0 <= whole[1][name] <= 10 for name in names[2:])
    assert [{n: line.get(n) for n in names} for line in whole] == [
        {n: line.get(n) for n in names} for line in half
    ]
    assert whole[0]["train_dn_groups"] == 5 and whole[0]["train_dn_queries"] >= 5


def test_one_cycle_cannot_be_extended(small: list[str], capsys: pytest.CaptureFixture):
    assert main([*small, "--onecyclelr"]) == 0
    assert main([*small, "--onecyclelr", "--resume", "auto", "--epochs", "2"]) == 2
    assert "resume with its own onecyclelr, epochs, batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_run_equals_uninterrupted_one(small: list[str], trained: Path, epoch: int):
    """Bit for bit, from any epoch."""
    start = str(trained / f"checkpoint{epoch:04}.pth")
    assert main([*small, *STATEFUL, "--resume", start]) == 0
    out = Path(small[-1])
    assert [line["epoch"] for line in read_log(out)] == list(range(epoch + 1, 3))
    assert_same_state(*(read_checkpoint(d / "checkpoint.pth") for d in (out, trained)))
    both = read_log(out)[-1], read_log(trained)[-1]
    assert both[0]["test_coco_eval_bbox"] == both[1]["test_coco_eval_bbox"]
    assert both[0]["train_loss"] == both[1]["train_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_resume(optimizer: str, small: list[str], tmp_path: Path, capsys):
    """Bit for bit, but only with the same optimiser."""
    args = [*small, "--epochs", "2", "--save_checkpoint_interval", "1", "--optimizer"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main([*args, optimizer, "--output_dir", str(whole)]) == 0
    start = str(whole / "checkpoint0000.pth")
    assert main([*args, optimizer, "--output_dir", str(half), "--resume", start]) == 0
    states = [read_checkpoint(out / "checkpoint.pth") for out in (whole, half)]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    state = states[0]["optimizer"]["state"].values()
    assert any("momentum" in s for s in state) == (optimizer == "muon")
    other = {"adamw": "muon", "muon": "adamw"}[optimizer]
    fails_with(capsys, [*args, other, "--resume", start], "its own optimizer, lr")


def test_killed_run_resumes(small: list[str], trained: Path):
    """kill -9 after the first epoch, then --resume auto: the same result."""
    out, output = Path(small[-1]), Path(small[-1]).with_suffix(".txt")
    process = start_main([*small, *STATEFUL, "--resume", "auto"], output)
    wait_for_first_epoch(output, process.is_alive)
    kill(process)
    assert process.exitcode == -signal.SIGKILL
    assert main([*small, *STATEFUL, "--resume", "auto"]) == 0
    assert [line["epoch"] for line in read_log(out)] == [0, 1, 2]
    assert_same_state(*(read_checkpoint(d / "checkpoint.pth") for d in (out, trained)))


def test_eval_reproduces_the_metrics(small: list[str], trained: Path, capsys):
    """Also per class, and with a results file that pycocotools reads."""
    checkpoint = str(trained / "checkpoint.pth")
    args = ["--eval", "--resume", checkpoint, "--save_results", "--eval_per_class"]
    assert main([*small, *args, "--use_ema", "--draw_images", "3"]) == 0
    out, toy = Path(small[-1]), Path(small[small.index("--coco_path") + 1])
    stats = json.loads((out / "eval.json").read_text())
    for key in ("test_coco_eval_bbox", "ema_test_coco_eval_bbox"):
        assert stats[key] == read_log(trained)[-1][key]
    printed = capsys.readouterr().out
    assert "Average Precision" in printed
    assert "triangle" in printed
    truth = COCO(toy / "annotations" / "instances_val2017.json")
    found = truth.loadRes(str(out / "results.json"))
    assert set(found.getCatIds()) == {3, 7, 12, 25, 44, 81}
    assert len(found.getAnnIds()) == 8 * 10 * 6  # images * queries * classes, fewer than num_select
    pictures = {path.stem: Image.open(path) for path in (out / "pictures").iterdir()}
    assert set(pictures) == {Path(image["file_name"]).stem for image in truth.dataset["images"][:3]}
    assert all(picture.width > picture.height for picture in pictures.values())  # two, side by side


def test_detections_for_the_evaluation_server(small: list[str], trained: Path, tmp_path: Path):
    toy = Path(small[small.index("--coco_path") + 1])
    root = tmp_path / "coco"
    shutil.copytree(toy / "val2017", root / "test2017")
    info = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    del info["annotations"]
    (root / "annotations").mkdir()
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    args = ["--test", "--resume", str(trained / "checkpoint.pth"), "--coco_path", str(root)]
    assert main([*small, *args]) == 0
    (path,) = Path(small[-1]).glob("detections_test-dev2017_*_results.json")
    detections = json.loads(path.read_text())
    assert {d["image_id"] for d in detections} == {image["id"] for image in info["images"]}
    assert all(set(d) == {"image_id", "category_id", "bbox", "score"} for d in detections)


def test_released_checkpoint(small: list[str], trained: Path, tmp_path: Path):
    """Published file format, no class map: category ids are labels, as in the released code."""
    ours = read_checkpoint(trained / "checkpoint.pth")
    weights = dict(ours["model"])
    label_of = {i: label for label, i, _ in ours["class_map"]["categories"]}
    for name, rows in (
        ("class_embed.weight", 82),
        ("class_embed.bias", 82),
        ("label_enc.weight", 83),
    ):
        wide = torch.full((rows, *weights[name].shape[1:]), -9.0)
        for category_id, label in label_of.items():
            wide[category_id] = weights[name][label]
        wide[-1] = weights[name][-1] if name.startswith("label_enc") else wide[-1]
        weights[name] = wide
    path = tmp_path / "released.pth"
    args = argparse.Namespace(modelname="dn_dab_detr", num_classes=82, lr=1e-4)
    released = {"model": weights, "optimizer": ours["optimizer"], "lr_scheduler": {}, "epoch": 2}
    torch.save(released | {"args": args}, path)
    assert main([*small, "--eval", "--resume", str(path)]) == 0
    stats = json.loads((Path(small[-1]) / "eval.json").read_text())
    assert stats["test_coco_eval_bbox"] == read_log(trained)[-1]["test_coco_eval_bbox"]


def test_finetuning_on_other_classes(small: list[str], trained: Path, edit: Callable, capsys):
    """Loads the weights except those that --finetune_ignore names."""

    def two_classes(data: dict) -> None:
        data["categories"] = [{"id": 500, "name": "b"}, {"id": 20, "name": "a"}]
        for annotation in data["annotations"]:
            annotation["category_id"] = 500 if annotation["category_id"] > 20 else 20

    for split in ("train", "val"):
        root = edit(two_classes, split)
    args = ["--pretrain_model_path", str(trained / "checkpoint.pth"), "--lr", "0"]
    ignore = ["--finetune_ignore", "label_enc.weight", "class_embed"]
    assert main([*small, *args, *ignore, "--lr_backbone", "0", "--coco_path", str(root)]) == 0
    assert "ignored: 3" in capsys.readouterr().out
    old, new = (read_checkpoint(d / "checkpoint.pth") for d in (trained, Path(small[-1])))
    rows = new["class_map"]["categories"]
    assert rows == [[0, 20, "a"], [1, 500, "b"]]
    assert new["model"]["class_embed.weight"].shape[0] == 2
    assert torch.equal(old["model"]["refpoint_embed.weight"], new["model"]["refpoint_embed.weight"])


def test_nonfinite_loss_stops_the_run(small: list[str], capsys):
    assert (
        main([*small, "--lr", "1e38", "--clip_max_norm", "0", "--save_checkpoint_interval", "1"])
        == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "loss_" in line
    assert "at epoch 0, step " in line
    assert "checkpoint_nonfinite.pth" in line
    out = Path(small[-1])
    assert read_checkpoint(out / "checkpoint_nonfinite.pth")["nonfinite"] is True
    assert latest_checkpoint(out) is None


def test_gradient_overflow_stops_the_run(small: list[str], capsys):
    assert main([*small, "--cls_loss_coef", "1e30"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the norm of the gradients is inf at epoch 0, step 0" in line
    weights = read_checkpoint(Path(small[-1]) / "checkpoint_nonfinite.pth")["model"].values()
    assert all(w.isfinite().all() for w in weights)


@pytest.mark.parametrize(
    "model",
    [
        "dab_deformable_detr",
        "dn_dab_deformable_detr",
        "dn_dab_deformable_detr_deformable_encoder_only",
        "dn_dab_dino_deformable_detr",
        "dino",
    ],
)
def test_deformable_models_train_and_evaluate_from_released_files(model, small, tmp_path, capsys):
    """In the authors' format: with an argparse Namespace, the optimiser and so on."""
    options = small[small.index("--backbone") :]
    options += ["--pretrained_backbone", "False", "--dn_number", "2", "--num_patterns", "0"]
    assert main(["-m", model, *options]) == 0
    ours = read_checkpoint(tmp_path / "out" / "checkpoint.pth")
    names = ("model", "optimizer", "lr_scheduler", "epoch")
    released = {name: ours[name] for name in names} | {"args": argparse.Namespace(modelname=model)}
    torch.save(released, tmp_path / "released.pth")
    first = read_log(tmp_path / "out")[-1]["test_coco_eval_bbox"]
    again = ["--resume", str(tmp_path / "released.pth"), "--num_classes", "6", "--eval"]
    capsys.readouterr()
    assert main(["-m", model, *options, *again]) == 0
    ap = re.search(r"\(AP\).*= (-?[0-9.]+)", capsys.readouterr().out)[1]
    assert float(ap) == pytest.approx(first[0], abs=6e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision(small: list[str], dtype: str):
    tiny = ["--backbone", "timm/test_resnet"]  # fp16 is slow on CPUs
    assert main([*small, *tiny, "--amp", "--amp_dtype", dtype, "--debug"]) == 0
    (line,) = read_log(Path(small[-1]))
    assert line["train_loss"] > 0
    assert math.isfinite(line["train_grad_norm"])  # even if fp16 skips a step


@pytest.mark.parametrize(
    "options", [["--multi_step_lr", "--lr_drop_list", "1", "2"], ["--lr_drop", "1"]]
)
def test_schedules(small: list[str], options: list[str]):
    args = [*small, *options, "--epochs", "3", "--lr", "1e-3", "--onecyclelr", "false"]
    assert main([*args, "--param_dict_type", "large_wd"]) == 0
    rates = [line["train_lr"] for line in read_log(Path(small[-1]))]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5])


# -- bad input: one clear line, exit status 2


@pytest.fixture
def edit(toy: Path, tmp_path: Path) -> Callable:
    """edit(change, split): the root of a copy of the toy set whose JSON `change` edits."""

    def apply(change: Callable[[dict], None], split: str = "train") -> Path:
        root = tmp_path / "edited"
        if not root.exists():
            shutil.copytree(toy, root)
        path = root / "annotations" / f"instances_{split}2017.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return root

    return apply


def fails_with(capsys, args: list[str], *parts: str) -> None:
    """`main` exits with 2 and prints one line that contains all `parts`."""
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in ("main.py: error: ", *parts):
        assert part in error


def test_more_queries_than_tokens(toy: Path, tmp_path: Path, capsys):
    args = ["-c", "configs/toy/dino.py", "--coco_path", str(toy), "--output_dir", str(tmp_path)]
    sizes = ["--data_aug_scales", "48", "--data_aug_max_size", "64", "--num_queries", "900"]
    fails_with(capsys, [*args, *sizes], "num_queries: 900 queries cannot be selected from the")


def test_missing_data(small: list[str], tmp_path: Path, capsys):
    fails_with(capsys, [*small, "--coco_path", "absent"], "absent/annotations/instances_train")
    empty = tmp_path / "empty"
    (empty / "annotations").mkdir(parents=True)
    (empty / "annotations" / "instances_train2017.json").write_text("{'images': ")
    fails_with(capsys, [*small, "--coco_path", str(empty)], "instances_train2017.json", "JSON")


def test_bad_annotations(small: list[str], edit: Callable, capsys):
    def corrupt(data: dict) -> None:
        boxes = [[1, 1, float("nan"), 5], [1, 1, -4, 5], [1, 1, 0, 5], [5, 5, 900, 900]]
        for annotation, box in zip(data["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    root = edit(corrupt)
    assert main([*small, "--coco_path", str(root), "--debug"]) == 0
    printed = capsys.readouterr().out
    assert "ignored 3 empty or non-finite boxes" in printed
    assert "clipped 1 to the image" in printed


def test_unknown_ids(small: list[str], edit: Callable, capsys):
    root = edit(lambda data: data["annotations"][2].update(category_id=999))
    fails_with(capsys, [*small, "--coco_path", str(root)], "instances_train2017.json", "999")
    root = edit(lambda data: data["annotations"][2].update(category_id=3, image_id=777))
    fails_with(capsys, [*small, "--coco_path", str(root)], "instances_train2017.json", "777")


def test_data_without_objects(small: list[str], edit: Callable, capsys):
    root = edit(lambda data: data["annotations"].clear())
    fails_with(capsys, [*small, "--coco_path", str(root)], "instances_train2017.json")


def test_more_objects_than_queries(small: list[str], capsys):
    fails_with(capsys, [*small, "--num_queries", "1"], "objects", "--num_queries")


def test_missing_image(small: list[str], edit: Callable, capsys):
    root = edit(lambda data: None)
    path = sorted((root / "train2017").iterdir())[3]
    path.unlink()
    fails_with(capsys, [*small, "--coco_path", str(root)], str(path))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_truncated_image(small: list[str], edit: Callable, capsys, workers: str):
    root = edit(lambda data: None)
    args = [*small, "--coco_path", str(root), "--num_workers", workers, "--overwrite"]
    path = sorted((root / "train2017").iterdir())[3]
    path.write_bytes(path.read_bytes()[:600])
    assert main(args) == 0
    assert f"unreadable image skipped, 1 in this epoch: {path.name}" in capsys.readouterr().out
    fails_with(capsys, [*args, "--strict_data"], str(path))
    path = sorted((root / "val2017").iterdir())[3]
    path.write_bytes(path.read_bytes()[:600])
    fails_with(capsys, args, str(path))


def test_image_modes(small: list[str], edit: Callable):
    """Greyscale, palette, CMYK and 16-bit images train like any other."""
    root = edit(lambda data: None)
    paths = sorted((root / "train2017").iterdir())
    for path, mode in zip(paths, ("L", "P", "CMYK", "I;16"), strict=False):
        image = Image.open(path).convert("L" if mode == "I;16" else mode)
        kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
        image.convert(mode).save(path, format=kind)
    assert main([*small, "--coco_path", str(root), "--strict_data"]) == 0


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def test_bad_checkpoints(small: list[str], trained: Path, tmp_path: Path, capsys, monkeypatch):
    args, path = [*small, "--eval", "--resume"], tmp_path / "x.pth"
    fails_with(capsys, [*args, str(path)], "x.pth")
    path.write_bytes(b"")
    fails_with(capsys, [*args, str(path)], "x.pth", "empty")
    good = (trained / "checkpoint.pth").read_bytes()
    path.write_bytes(good[: len(good) // 2])
    fails_with(capsys, [*args, str(path)], "x.pth", "truncated")
    torch.save({"model": Malicious()}, path)
    monkeypatch.chdir(tmp_path)
    command = [
        str(Path(__file__).parent.parent / a) if a.startswith("configs/") else a for a in args
    ]
    fails_with(capsys, [*command, str(path)], "x.pth", "refused")
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_model(small: list[str], trained: Path, capsys):
    args = [*small, "--eval", "--resume", str(trained / "checkpoint.pth")]
    assert main([*args, "--hidden_dim", "64", "--dec_layers", "4"]) == 2
    error = capsys.readouterr().err
    assert "missing: " in error
    assert "mismatched: " in error
    assert "... and " in error
    assert "transformer.decoder.layers.2.linear1.weight" in error


def test_checkpoint_of_a_classifier(small: list[str], tmp_path: Path, capsys):
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "classifier.pth")
    assert main([*small, "--eval", "--resume", str(tmp_path / "classifier.pth")]) == 2
    error = capsys.readouterr().err
    assert "classifier.pth: does not fit the model" in error
    assert "unexpected: 1" in error


def test_unwritable_output(small: list[str], tmp_path: Path, capsys):
    (tmp_path / "out").write_text("a file")
    fails_with(capsys, small, str(tmp_path / "out"))


def test_other_training_settings(small: list[str], trained: Path, capsys):
    """Evaluation ignores them; training cannot resume with other parameter groups."""
    args = [*small, "--resume", str(trained / "checkpoint0000.pth"), "--lr_backbone", "1e-5"]
    assert main([*args, "--eval"]) == 0
    fails_with(capsys, [*args, "--epochs", "3"], "other parameter groups", "lr_backbone")


def test_processes_without_a_rendezvous(small: list[str], capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    fails_with(capsys, small, "world_size: process 0 of 8 cannot connect to the others", "torchrun")


def test_backbone_weights_from_a_file(small: list[str], tmp_path: Path, capsys):
    """As torchvision ships them: with a classifier and BatchNorm's step counters."""
    resnet = torchvision.models.resnet18()
    resnet.bn1.running_mean.fill_(0.25)
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    args = [*small, "--backbone", "resnet18", "--pretrained_backbone", "true"]
    args += ["--batch_norm_type", "FrozenBatchNorm2d", "--return_interm_indices", "2", "--debug"]
    args.append("--overwrite")
    assert main([*args, "--backbone_weights", str(path)]) == 0
    weights = read_checkpoint(Path(small[-1]) / "checkpoint.pth")["model"]
    for name in ("conv1.weight", "bn1.running_mean", "layer1.1.conv2.weight"):  # frozen
        assert torch.equal(weights[f"backbone.0.body.{name}"], resnet.state_dict()[name]), name
    torch.save({"conv1.weight": resnet.conv1.weight.detach()}, path)
    assert main([*args, "--backbone_weights", str(path)]) == 2
    error = capsys.readouterr().err
    assert "resnet18.pth" in error
    assert "missing: " in error


def test_timm_backbone_weights_from_a_file(small: list[str], tmp_path: Path):
    source = timm.create_model("resnet10t")
    path = tmp_path / "resnet10t.pth"
    torch.save(source.state_dict(), path)
    args = [*small, "--pretrained_backbone", "true", "--batch_norm_type", "FrozenBatchNorm2d"]
    assert main([*args, "--debug", "--backbone_weights", str(path)]) == 0
    weights = read_checkpoint(Path(small[-1]) / "checkpoint.pth")["model"]
    name = "layer1.0.conv1.weight"
    assert torch.equal(weights[f"backbone.0.body.{name}"], source.state_dict()[name])


def test_failed_download(small: list[str], capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    args = [*small, "--pretrained_backbone", "true", "--backbone", "resnet18"]
    fails_with(capsys, args, "resnet18", "--backbone_weights", "--no_pretrained_backbone")


def test_eval_without_checkpoint_or_device(small: list[str], capsys):
    fails_with(capsys, [*small, "--eval"], "--resume")
    fails_with(capsys, [*small, "--device", "cuda:77"], "cuda:77")
