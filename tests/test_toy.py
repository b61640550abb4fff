"""The toy COCO: deterministic, valid for pycocotools, varied, safe to interrupt and rerun."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from datasets import toy
from models.errors import UserError

# pycocotools does not yet support numpy 2's array protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
NUM_IMAGES = {"train2017": 200, "val2017": 40}


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def contents(root: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file under `root`."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def times(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "datasets.toy", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return toy.make_toy_coco(tmp_path_factory.mktemp("toy"), 200, 40)


@pytest.fixture(scope="module", params=toy.SPLITS)
def coco(request, root) -> COCO:
    return COCO(str(annotation_file(root, request.param)))


@pytest.fixture(scope="module")
def train(root) -> COCO:
    return COCO(str(annotation_file(root, "train2017")))


def test_layout(root):
    ids = []
    for split, count in NUM_IMAGES.items():
        content = json.loads(annotation_file(root, split).read_text())
        assert len(content["images"]) == count
        for image in content["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(root / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.mode == "RGB" and picture.format == "JPEG"
        assert len(list((root / split).iterdir())) == count
        ids += [("image", image["id"]) for image in content["images"]]
        ids += [("annotation", annotation["id"]) for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids)
    assert not list(root.rglob("*.tmp"))


def test_masks_fill_their_boxes(coco):
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert w > 0 and h > 0 and x >= 0 and y >= 0
        assert x + w <= image["width"] + 0.01 and y + h <= image["height"] + 0.01
        mask = coco.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"])
        ys, xs = np.nonzero(mask)
        corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        # A polygon's sharp tip is thinner than a pixel; a crowd's box is computed from its mask.
        tolerance = 0 if annotation["iscrowd"] else 2.01
        np.testing.assert_allclose(corners, [x, y, x + w, y + h], atol=tolerance)
        assert annotation["area"] == pytest.approx(
            mask.sum(), rel=0.1 * (not annotation["iscrowd"])
        )


def test_ring_mask_has_a_hole(train):
    rings = [a for a in train.anns.values() if toy.CATEGORIES[a["category_id"]] == "ring"]
    holes = []
    for ring in rings:
        x, y, w, h = ring["bbox"]
        image = train.imgs[ring["image_id"]]
        uncut = x > 0 and y > 0 and x + w < image["width"] and y + h < image["height"]
        if uncut and not ring["iscrowd"]:
            holes.append(train.annToMask(ring)[int(y + h / 2), int(x + w / 2)] == 0)
    assert len(holes) > 10 and all(holes)


def test_categories(train):
    ids = sorted(train.cats)
    assert len(ids) >= 6 and (np.diff(ids) > 1).any() and ids[0] != 0
    assert all(c["supercategory"] for c in train.cats.values())
    assert {a["category_id"] for a in train.anns.values()} == set(ids)


def test_variety(train):
    """All of COCO's size ranges, empty images, crowds, overlaps, cut objects and padding occur."""
    objects = [a for a in train.anns.values() if not a["iscrowd"]]
    areas = np.array([a["area"] for a in objects])
    for low, high in ((0, 32**2), (32**2, 96**2), (96**2, np.inf)):
        assert ((areas >= low) & (areas < high)).sum() >= 2
    counts = [len(train.getAnnIds(i, iscrowd=False)) for i in train.imgs]
    assert min(counts) == 0 and max(counts) == 8 and 3 < np.mean(counts) < 6
    assert any(a["iscrowd"] for a in train.anns.values())
    assert len({(i["width"], i["height"]) for i in train.imgs.values()}) > 50
    overlapping = cut = 0
    for image_id, image in train.imgs.items():
        boxes = np.array([a["bbox"] for a in train.imgToAnns[image_id]]).reshape(-1, 4)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        cut += (high >= [image["width"], image["height"]]).any(1).sum() + (low <= 0).any(1).sum()
        sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        overlapping += (sides > 1).all(2).sum() - len(boxes)
    assert overlapping > 100 and cut > 50


def test_objects_stay_visible():
    for index in range(40):
        rng = np.random.default_rng(index)
        scene = toy.Scene(rng, 96)
        for extent in rng.uniform(10, 90, 8):
            scene.add_object(extent)
        visible = np.bincount(scene.owner.ravel(), minlength=len(scene.full_areas))
        assert len(scene.annotations) == len(scene.full_areas) - 1
        assert (visible[1:] >= toy.MIN_VISIBLE * np.array(scene.full_areas[1:])).all()


def test_clip_polygon():
    inside = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(toy.clip_polygon(inside, 4, 4), inside)
    diamond = np.array([[0.0, -2.0], [2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
    quarter = toy.clip_polygon(diamond, 10, 10)
    assert toy.polygon_area(quarter) == pytest.approx(2.0)
    assert quarter.min() == 0 and quarter.max() == 2
    assert len(toy.clip_polygon(inside - 5, 4, 4)) == 0


@pytest.mark.parametrize("first", [False, True])
def test_encode_rle(first):
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    mask[0, 0] = first
    rle = toy.encode_rle(mask)
    runs = [np.full(n, k % 2, dtype=bool) for k, n in enumerate(rle["counts"])]
    np.testing.assert_array_equal(np.concatenate(runs).reshape(rle["size"], order="F"), mask)


def test_seed_determines_everything(tmp_path):
    first, again, other = (
        contents(toy.make_toy_coco(tmp_path / name, 6, 3, size=64, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    pictures = [content for name, content in first.items() if name.endswith(".jpg")]
    assert len(set(pictures)) == 9  # the splits share no image


def test_earlier_images_do_not_depend_on_the_counts(tmp_path):
    small = contents(toy.make_toy_coco(tmp_path / "small", 4, 3, size=64))
    large = contents(toy.make_toy_coco(tmp_path / "large", 9, 3, size=64))
    assert all(large[name] == small[name] for name in small if "train2017.json" not in name)
    few, many = (
        json.loads(c["annotations/instances_train2017.json"])["annotations"] for c in (small, large)
    )
    assert many[: len(few)] == few and len(many) > len(few)


def test_rerun_is_a_no_op_and_new_parameters_are_not(tmp_path):
    toy.make_toy_coco(tmp_path, 6, 3, size=64)
    before, before_contents = times(tmp_path), contents(tmp_path)
    toy.make_toy_coco(tmp_path, 6, 3, size=64)
    assert times(tmp_path) == before
    toy.make_toy_coco(tmp_path, 4, 3, size=64)
    assert len(list((tmp_path / "train2017").iterdir())) == 4
    toy.make_toy_coco(tmp_path, 6, 3, size=64)
    assert contents(tmp_path) == before_contents


def test_interrupted_run_is_completed(tmp_path, monkeypatch):
    whole = contents(toy.make_toy_coco(tmp_path / "whole", 6, 3, size=64))
    draw_scene = toy.draw_scene

    def interrupted(seed, split, index, size):
        if (split, index) == (1, 1):
            raise KeyboardInterrupt
        return draw_scene(seed, split, index, size)

    monkeypatch.setattr(toy, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.make_toy_coco(tmp_path / "part", 6, 3, size=64)
    assert not annotation_file(tmp_path / "part", "val2017").exists()
    monkeypatch.undo()
    (tmp_path / "part" / "val2017" / "000001000002.jpg").touch()  # truncated to zero bytes
    assert contents(toy.make_toy_coco(tmp_path / "part", 6, 3, size=64)) == whole

    annotation_file(tmp_path / "part", "train2017").unlink()
    assert contents(toy.make_toy_coco(tmp_path / "part", 6, 3, size=64)) == whole
    (tmp_path / "part" / "train2017" / "000000000002.jpg").unlink()
    assert contents(toy.make_toy_coco(tmp_path / "part", 6, 3, size=64)) == whole


@pytest.mark.parametrize("name", ["annotations/instances_val2017.json", "val2017/000000000139.jpg"])
def test_another_data_set_is_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b'{"info": {"description": "COCO 2017 Dataset"}}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="another data set"):
        toy.make_toy_coco(tmp_path, 2, 2, size=64)
    assert contents(tmp_path) == before


def test_command(tmp_path):
    root = tmp_path / "toy"
    done = run(
        *("--root", str(root), "--num_train", "3", "--num_val", "2", "--size", "32", "--seed", "4")
    )
    assert done.returncode == 0, done.stderr
    assert "train2017: 3 images" in done.stdout and "val2017: 2 images" in done.stdout
    expected = toy.make_toy_coco(tmp_path / "expected", 3, 2, size=32, seed=4)
    assert contents(root) == contents(expected)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "31", "size is 31"),
        ("--num_train", "-1", "num_train is -1"),
        ("--num_val", "1000000", "num_val is 1000000"),
        ("--seed", "-2", "seed is -2"),
        ("--root", "FILE/toy", "cannot write"),
    ],
)
def test_bad_arguments(tmp_path, option, value, message):
    (tmp_path / "file").touch()
    value = value.replace("FILE", str(tmp_path / "file"))
    done = run("--root", str(tmp_path / "toy"), option, value)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "toy").exists()
