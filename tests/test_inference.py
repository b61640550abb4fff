"""Detection on images from the command line and from a notebook, and its drawings."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors

from datasets.coco import CocoDetection
from datasets.toy import CATEGORIES
from datasets.transforms import eval_transforms
from models import build_model, draw, load_detector
from models.cli import main
from models.draw import class_colour, draw_boxes, side_by_side
from models.errors import UserError
from models.images import read_image
from tests.conftest import DETECTOR
from util import visualize
from util.checkpoint import load_weights, save_checkpoint
from util.config import load_config
from util.visualize import plot_log

ROOT = Path(__file__).parent.parent
GREY = torch.full((3, 600, 700), 128, dtype=torch.uint8)


@pytest.fixture(scope="module")
def released(checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint in the authors' format, and its config."""
    directory = tmp_path_factory.mktemp("released")
    state = {"model": checkpoint["model"], "args": Namespace(hidden_dim=64), "epoch": 49}
    save_checkpoint(directory / "checkpoint.pth", state)
    (directory / "config.py").write_text("\n".join(f"{k} = {v!r}" for k, v in DETECTOR.items()))
    return directory / "checkpoint.pth", directory / "config.py"


def predict(argv: list[str]) -> int:
    return main(["predict", *argv])


def by_hand(checkpoint: dict, paths: list[Path], weights: str = "model") -> list[dict]:
    """The results of a model built and run without a Predictor, for one image after another."""
    cfg = load_config(overrides=checkpoint["config"])
    model, _, postprocess = build_model(cfg)
    load_weights(model, checkpoint[weights])
    transform = eval_transforms(cfg.data_aug_scales, cfg.data_aug_max_size)
    results = []
    for image in map(read_image, paths):
        with torch.no_grad():
            outputs = model.eval()([transform(tv_tensors.Image(image))])
        results += postprocess(outputs, torch.tensor([image.shape[-2:]]))
    return results


def check_against(expected: list[dict], content: dict, threshold: float) -> None:
    """detections.json has the expected detections, clipped to the images, in COCO format."""
    ids = list(CATEGORIES)
    for image, result in zip(content["images"], expected, strict=True):
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        keep = result["scores"] >= threshold
        assert len(found) == keep.sum() > 0
        assert [a["category_id"] for a in found] == [ids[i] for i in result["labels"][keep]]
        scores = torch.tensor([a["score"] for a in found])
        torch.testing.assert_close(scores, result["scores"][keep], atol=1e-5, rtol=1e-4)
        boxes = torch.tensor([a["bbox"] for a in found])
        boxes[:, 2:] += boxes[:, :2]
        limits = torch.tensor([image["width"], image["height"]] * 2)
        assert (boxes >= 0).all()
        assert (boxes <= limits + 0.002).all()
        clipped = result["boxes"][keep].clamp(min=0).minimum(limits)
        torch.testing.assert_close(boxes, clipped, atol=5e-3, rtol=1e-4)


def test_images_from_the_command_line(toy, checkpoint, saved, tmp_path):
    paths = sorted((toy / "val2017").glob("*.jpg"))[:2]
    expected = by_hand(checkpoint, paths)
    threshold = min(float(result["scores"][5:7].mean()) for result in expected)
    command = [sys.executable, "inference.py", "--resume", saved, "--images", *paths]
    command += ["--output_dir", tmp_path / "new" / "out", "--threshold", str(threshold)]
    options = ["--batch_size", "2", "--device", "cpu"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in 2 images" in done.stdout
    content = json.loads((tmp_path / "new" / "out" / "detections.json").read_text())
    check_against(expected, content, threshold)
    assert content["categories"] == [{"id": i, "name": n} for i, n in CATEGORIES.items()]
    for path, entry in zip(paths, content["images"], strict=True):
        assert Path(entry["file_name"]) == path
        with Image.open(path) as image, Image.open(tmp_path / "new/out" / path.name) as drawn:
            assert image.size == (entry["width"], entry["height"])
            assert max(drawn.size) == draw.SMALLEST
            assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.01)
    # The file can be evaluated and trained on.
    COCO(tmp_path / "new/out/detections.json").loadRes(content["annotations"])
    out = tmp_path / "new" / "out"
    dataset = CocoDetection("/", out / "detections.json", eval_transforms([64], 96))
    assert len(dataset) == 2


def test_validation_set(toy, checkpoint, saved, tmp_path):
    argv = ["--resume", str(saved), "--coco_path", str(toy), "--num_images", "3"]
    argv += ["--output_dir", str(tmp_path), "--threshold", "0", "--device", "cpu"]
    assert predict(argv) == 0
    content = json.loads((tmp_path / "detections.json").read_text())
    truth = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    assert [p["id"] for p in content["images"]] == [p["id"] for p in truth["images"][:3]]
    paths = [toy / "val2017" / p["file_name"] for p in truth["images"][:3]]
    expected = by_hand(checkpoint, paths)
    check_against(expected, content, 0)
    assert len(list(tmp_path.glob("*.jpg"))) == 3
    first = truth["images"][0]
    label = list(CATEGORIES).index
    drawn = {label(a["category_id"]) for a in truth["annotations"] if a["image_id"] == first["id"]}
    with Image.open(tmp_path / first["file_name"]) as picture:
        scale = draw.SMALLEST / max(first["width"], first["height"])
        assert picture.width == pytest.approx(2 * scale * first["width"], abs=40)
        assert picture.height == pytest.approx(scale * first["height"], abs=60)
        left = np.asarray(picture)[:, : picture.width // 2].astype(int)
    assert drawn
    for i in drawn:  # the ground truth is on the left, up to JPEG's colour errors
        assert (np.abs(left - class_colour(i)).max(axis=2) < 20).sum() > 50


def test_averaged_weights(toy, checkpoint, saved):
    path = next((toy / "val2017").glob("*.jpg"))
    for ema, weights in ((False, "model"), (True, "ema_model")):
        detector = load_detector(saved, ema=ema)
        (result,) = detector.predict([read_image(path)], threshold=0)
        (expected,) = by_hand(checkpoint, [path], weights)
        torch.testing.assert_close(result["scores"], expected["scores"])
        draw_boxes(read_image(path), **result, names=detector.class_map.names)


def test_labels_without_category_are_dropped(toy, checkpoint, tmp_path):
    state = json.loads(json.dumps(checkpoint["class_map"]))
    del state["categories"][1:]
    save_checkpoint(tmp_path / "checkpoint.pth", checkpoint | {"class_map": state})
    detector = load_detector(tmp_path / "checkpoint.pth")
    (result,) = detector.predict([GREY], threshold=0)
    assert set(result["labels"].tolist()) <= {0}


def test_released_checkpoint(toy, released, tmp_path, capsys):
    path, config = released
    detector = load_detector(path, config)
    assert detector.labels_are_ids
    assert detector.class_map.ids == {i: i for i in range(len(CATEGORIES))}
    argv = ["--resume", str(path), "-c", str(config), "--threshold", "0", "--device", "cpu"]
    argv += ["--output_dir", str(tmp_path / "out")]
    image = str(next((toy / "val2017").glob("*.jpg")))
    assert predict([*argv, "--images", image]) == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["categories"][3] == {"id": 3, "name": "3"}
    assert {a["category_id"] for a in content["annotations"]} <= set(range(len(CATEGORIES)))
    # A data set defines the labels, as in evaluation.
    assert predict([*argv, "--coco_path", str(toy), "--num_images", "1"]) == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["categories"] == [{"id": i, "name": n} for i, n in CATEGORIES.items()]
    capsys.readouterr()
    assert predict(argv[:2] + argv[4:] + ["--images", image]) == 2
    assert "no config" in capsys.readouterr().err


def test_directories_and_duplicate_names(toy, saved, tmp_path):
    for name in ("a/x.jpg", "b/x.PNG", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(next((toy / "val2017").glob("*.jpg")), tmp_path / name)
    argv = ["--resume", str(saved), "--images", str(tmp_path / "b"), str(tmp_path / "a")]
    assert predict([*argv, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"1_x.jpg", "2_x.jpg", "detections.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--resume": "none.pth"}, "none.pth"),
        ({"--images": "none.jpg"}, "none.jpg"),
        ({"--images": "broken.jpg"}, "broken.jpg"),
        ({"--images": "empty"}, "holds no images"),
        ({"--images": None}, "--source (or --images) or --coco_path"),
        ({"--coco_path": "empty"}, "--source (or --images) or --coco_path"),
        ({"--coco_path": "empty", "--images": None}, "instances_val2017.json"),
        ({"--output_dir": "broken.jpg"}, "broken.jpg"),
        ({"--output_dir": "images"}, "contains the input images"),
        ({"--threshold": "30"}, "threshold"),
        ({"--batch_size": "0"}, "batch_size"),
        ({"--num_images": "x"}, "num_images"),
        ({"--device": "cuda:77"}, "cuda:77"),
        ({"-m": "dab_detr"}, "does not fit the model"),
        ({"-m": "dab"}, "dn_dab_detr"),
        ({"-c": "none.py"}, "none.py"),
        ({"--resume": "bare.pth", "--ema": ""}, "leave out --ema"),
    ],
)
def test_errors(change, message, toy, saved, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "images"):
        Path(name).mkdir()
    Path("broken.jpg").write_bytes(b"not an image")
    shutil.copy(next((toy / "val2017").glob("*.jpg")), "images/a.jpg")
    before = Path("images/a.jpg").read_bytes()
    save_checkpoint("bare.pth", checkpoint | {"ema_model": None})
    options = {"--resume": str(saved), "--images": "images", "--output_dir": "out"} | change
    argv = [word for pair in options.items() if pair[1] is not None for word in pair if word]
    assert predict(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dn-dino predict: error: ")
    assert message in error
    assert error.count("\n") == 1 or "-m" in change  # a list of weights may follow
    assert Path("images/a.jpg").read_bytes() == before


def test_boxes_are_drawn_at_their_coordinates():
    boxes = torch.tensor([[100.0, 200.0, 300.0, 400.0], [350.0, 220.0, 500.0, 390.0]])
    pixels = np.asarray(draw_boxes(GREY, boxes, [0, 4], names={0: "cat"}))
    assert pixels.shape == (600, 700, 3)
    for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), (0, 4), strict=True):
        colour = class_colour(label)
        edge, around = [x0, x0 + 1, x1 - 2, x1 - 1], [x0 - 1, x0 + 2, x1 - 3, x1]
        assert (pixels[y0 + 20 : y1 - 20, edge] == colour).all()
        assert (pixels[y0 + 20 : y1 - 20, around] == 0).all()
        assert (pixels[[y0, y0 + 1, y1 - 2, y1 - 1], x0 + 80 : x1 - 20] == colour).all()
        assert (pixels[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5] == 128).all()
        assert (pixels[y0 - 4, x0 : x0 + 6] == colour).all()  # the caption's background
    assert class_colour(0) != class_colour(4)
    changed = (pixels != 128).any(axis=2)
    changed[180:402, 98:502] = False
    assert not changed.any()


def test_captions_stay_in_the_image_and_apart():
    corners = [[0, 0, 9, 9], [690, 0, 700, 9], [0, 590, 9, 600], [690, 590, 700, 600]]
    boxes = torch.tensor([*corners, [200, 200, 400, 400], [200, 200, 400, 400]])
    labels, names = [0, 1, 2, 3, 4, 5], {i: f"a class {i}" for i in range(6)}
    picture = draw_boxes(GREY, boxes, labels, torch.linspace(0.9, 0.1, 6), names)
    font = draw.load_font(14)
    width = round(font.getlength("a class 1 0.90")) + 6
    for label in labels:
        background = (np.asarray(picture) == class_colour(label)).all(axis=2)
        filled = background.sum(axis=1).max()  # the caption's longest row without text
        assert filled >= width if label < 5 else filled > 0
    both = (np.asarray(picture) == class_colour(5)).all(axis=2)
    assert both.any(axis=1).sum() > 10  # its box is hidden, its caption is not


def test_drawing_edge_cases():
    small = GREY[:, :96, :128]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert draw_boxes(small, **none).size == (640, 480)
    outside = torch.tensor([[-50.0, -50.0, 900.0, 900.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw_boxes(GREY[:, :1, :1], outside, [3, 90]).size == (640, 640)
    narrow = draw_boxes(GREY[:, :, :9], outside, [3, 90], names={3: "a name that is far too long"})
    assert narrow.size == (10, 640)
    sheet = side_by_side(small, {"one": none, "two": {**none, "scores": torch.zeros(0)}})
    assert sheet.width > 2 * 640
    plain, crowd = (draw_boxes(GREY, outside[:1], [1], crowd=[flag]) for flag in (False, True))
    assert plain != crowd


def write_log(path: Path, epochs: int, test: bool, scale: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_dn", "loss_bbox_dn")
    with open(path, "w") as file:
        for epoch in range(epochs):
            row = {f"train_{name}": scale * (k + 1) / (epoch + 1) for k, name in enumerate(names)}
            if test:
                row["test_loss"] = 2 * scale / (epoch + 1)
                row["test_coco_eval_bbox"] = [0.1 * epoch, 0.15 * epoch, *[-1.0] * 10]
                row["ema_test_coco_eval_bbox"] = [-1.0] * 12
            row |= {"epoch": epoch, "epoch_time": "0:00:12", "train_lr": 1e-4}
            file.write(json.dumps(row) + "\n")
    return path


def test_plot(tmp_path):
    with_test = write_log(tmp_path / "a" / "log.txt", 4, test=True)
    without = write_log(tmp_path / "b" / "log.txt", 1, test=False)
    sizes = []
    for logs in (with_test, [without], [with_test, without.parent]):
        plot_log(logs, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            sizes.append((picture.width > 1000, len(np.unique(np.asarray(picture)))))
    assert all(wide and shades > 20 for wide, shades in sizes)
    plot_log(with_test, tmp_path / "plot.svg")
    assert "AP50" in (tmp_path / "plot.svg").read_text()


def test_log_of_a_resumed_run(tmp_path):
    path = write_log(tmp_path / "log.txt", 4, test=True)
    again = write_log(tmp_path / "again.txt", 2, test=True, scale=3.0).read_text()
    path.write_text(path.read_text() + again)
    rows = visualize.read_log(path)
    assert list(rows) == [0, 1, 2, 3]
    assert [row["train_loss"] for row in rows.values()] == [3.0, 1.5, 1 / 3, 0.25]
    assert [rows[1][f"test_{key}"] for key in ("AP", "AP50")] == [0.1, 0.15]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "no losses"),
        (b'{"epoch": 0, "train_loss": 1.0}\n{"epoch": 1, "train_l', "line 2"),
        (b"[1, 2]\n", "line 1"),
        (b'"text"\n', "line 1"),
        (b'{"train_loss": 1.0}\n', "line 1"),
        (b'{"epoch": 0, "test_coco_eval_bbox": 0.3}\n', "line 1"),
        (b'{"epoch": 0, "train_loss": "high"}\n', "no losses"),
        (b'{"epoch": 0, "train_loss": NaN}\n', "no losses"),
        (b"\x89PNG\r\n\xff\xfe", "not a text file"),
    ],
)
def test_invalid_logs(content, message, tmp_path, capsys):
    path = tmp_path / "log.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        plot_log(path, tmp_path / "plot.png")
    assert visualize.main([str(path), "--output", str(tmp_path / "plot.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "log.txt" in error
    assert not (tmp_path / "plot.png").exists()


def test_plot_command(tmp_path):
    log = write_log(tmp_path / "run" / "log.txt", 3, test=True)
    output = tmp_path / "plot.png"
    assert visualize.main([str(log.parent), str(log), "--output", str(output)]) == 0
    assert output.stat().st_size > 10_000
    for name in ("none/plot.png", "plot.xyz"):
        with pytest.raises(UserError, match="cannot be written"):
            plot_log(log, tmp_path / name)
