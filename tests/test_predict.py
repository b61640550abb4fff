"""Predictor.predict: sources of every kind, batches, results."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import supervision
import torch
from PIL import Image

from models import Predictor, images, load_detector
from models.detections import Detections
from models.detector import Detector
from models.errors import UserError
from models.images import read_image, read_source
from models.predictor import WINDOW


@pytest.fixture(scope="module")
def predictor(saved: Path) -> Predictor:
    return load_detector(saved)


@pytest.fixture(scope="module")
def paths(toy: Path) -> list[Path]:
    """Images of several sizes."""
    found = sorted((toy / "val2017").glob("*.jpg"))
    assert len({read_image(path).shape for path in found}) > 3
    return found


def assert_equal(found: list[Detections], expected: list[Detections]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.image, b.image) and len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=1e-4)
        assert (a.labels == b.labels).float().mean() > 0.8  # equal scores may change places


def test_sources_of_every_kind_give_the_same(predictor, paths, tmp_path, monkeypatch):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for path in paths[:3]:
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    directory, tensors = tmp_path / "in", [read_image(path) for path in paths[:3]]
    expected = [predictor.predict(image, threshold=0)[0] for image in tensors]
    pictures = [Image.open(path) for path in paths[:3]]
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    sources = {
        "paths": [str(path) for path in paths[:3]],
        "directory": directory,
        "pattern": str(tmp_path / "**" / "*.jpg"),
        "PIL": pictures,
        "arrays": arrays,
        "reversed BGR": [array[..., ::-1].copy()[..., ::-1] for array in arrays],
        "tensors": tensors,
        "generator": (image for image in tensors),
        "mixed": [paths[0], pictures[1], [arrays[2]]],
    }
    for source in sources.values():
        assert_equal(predictor.predict(source, threshold=0), expected)
    names = [found.source for found in predictor.predict(sources["mixed"])]
    assert names == [str(paths[0]), "image 0", "image 1"]
    monkeypatch.setattr(images, "simplejpeg", None)
    assert_equal(predictor.predict(sources["paths"], threshold=0), expected)


def test_arrays_and_pictures_are_not_changed(paths):
    with Image.open(paths[0]) as opened:
        picture = opened.convert("RGB")
    picture.getexif()[0x0112] = 6  # to be turned
    array = np.asarray(picture)
    (_, turned), (_, same) = read_source([picture, array])
    assert turned.shape[1:] == (array.shape[1], array.shape[0])
    assert torch.equal(turned.permute(1, 2, 0), torch.from_numpy(np.rot90(array, -1).copy()))
    same.zero_()
    assert picture.size == (array.shape[1], array.shape[0]) and np.asarray(picture).any()


def test_batches_are_not_padded_and_results_are_in_order(predictor, paths, monkeypatch):
    one_by_one = [predictor.predict(path, threshold=0)[0] for path in paths]
    batches, prepare = [], predictor.prepare

    def spy(images):
        batches.append(prepare(images))
        return batches[-1]

    monkeypatch.setattr(predictor, "prepare", spy)
    twice = predictor.predict(paths + paths, threshold=0, batch_size=2)
    assert_equal(twice, one_by_one + one_by_one)
    assert [found.source for found in twice] == [str(path) for path in paths + paths]
    assert not any(batch.mask.any() for batch in batches)
    assert len(batches) == len(paths)  # every image waited for its double


def test_a_stream_keeps_few_images(predictor, monkeypatch):
    """All images have sizes of their own, but for a few at the beginning, which wait."""
    taken = 0

    def source():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield torch.full((3, 32, 32 + i), i, dtype=torch.uint8)

    ahead = []
    for given, found in enumerate(predictor.stream(source(), threshold=0, batch_size=2)):
        assert found.image.shape[2] == 32 + given
        ahead.append(taken - given)
    assert len(ahead) == 40
    assert 2 <= max(ahead) <= 2 * WINDOW + 1


def test_equal_images_wait_only_for_a_batch(predictor):
    """As a webcam's."""
    taken = iter(range(100))
    source = (torch.full((3, 32, 48), next(taken), dtype=torch.uint8) for _ in range(9))
    stream = predictor.stream(source, batch_size=1)
    next(stream)
    assert next(taken) == 1


def test_half_precision_is_close(saved, predictor, paths):
    half = load_detector(saved, half=True).predict(paths[:2], threshold=0)
    for a, b in zip(half, predictor.predict(paths[:2], threshold=0), strict=True):
        assert a.scores.dtype == a.boxes.dtype == torch.float32
        assert not torch.equal(a.scores, b.scores)
        torch.testing.assert_close(a.scores, b.scores, atol=0.01, rtol=0.1)


def test_compile_is_passed_on(saved, monkeypatch):
    """`test_compile.py` compares the results."""
    calls = []
    monkeypatch.setattr(Detector, "compile_parts", lambda model: calls.append(model))
    load_detector(saved)
    assert not calls
    assert calls == [load_detector(saved, compile=True).model]


def test_detections(predictor, paths):
    (found,) = predictor.predict(paths[0], threshold=0)
    threshold = float(found.scores[3])
    (found,) = predictor.predict(paths[0], threshold)
    assert len(found) == 4 == len(found.names)
    class_map, height, width = predictor.class_map, *found.image.shape[1:]
    assert found.names == [class_map.names[label] for label in found.labels.tolist()]
    assert dict(found).keys() == {"boxes", "labels", "scores"}
    assert (found.boxes >= 0).all() and (found.boxes[:, ::2] <= width).all()

    rows = found.to_coco(image_id=17)
    for row, box, label, score in zip(rows, found.boxes, found.labels, found.scores, strict=True):
        assert row["image_id"] == 17 and row["category_id"] == class_map.ids[int(label)]
        x0, y0, x1, y1 = box.tolist()
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        assert row["area"] == pytest.approx((x1 - x0) * (y1 - y0), abs=0.1)
        assert row["score"] == float(score)

    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections) and len(theirs) == 4
    assert np.array_equal(theirs.xyxy, found.boxes) and theirs["class_name"].tolist() == found.names
    assert np.array_equal(theirs.confidence, found.scores)

    name = found.names[0]
    assert repr(found).startswith(f"Detections({paths[0]}, {width} x {height}: ")
    assert f"{found.names.count(name)} {name}" in repr(found)
    assert len(str(found).splitlines()) == 5 and f"{threshold:.2f}" in str(found).splitlines()[4]
    (nothing,) = predictor.predict(paths[0], threshold=1)
    assert "nothing" in repr(nothing) and len(nothing.to_supervision()) == 0
    assert nothing.to_coco() == [] and nothing.draw().size == found.draw().size
    assert nothing.draw() != found.draw()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jpg", r"none\.jpg: cannot be read as an image"),
        ("none/*.jpg", r"none/\*\.jpg: no file matches"),
        (".", "holds no images"),
        (np.zeros((4, 5)), r"shape \(4, 5\) and type float64; an image is \(H, W, 3\) uint8"),
        (np.zeros((4, 5, 3)), "float64"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (torch.zeros(3, 4, 5), r"type float32; an image is \(3, H, W\) uint8"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"\(4, 5, 3\)"),
        ([None], "NoneType is no image"),
        (7, "int is no image"),
        ("none.mp4", "none.mp4: cannot be opened as a video"),
        ("0", "0: cannot be opened as a video"),
    ],
)
def test_errors(source, message, predictor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        predictor.predict(source)
