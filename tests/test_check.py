"""`main.py --check_data` on a data set with known faults."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageEnhance

from datasets.check import difference_hash, look_alikes
from main import main
from models.images import read_image


@pytest.fixture
def faulty(toy, tmp_path) -> Path:
    """The toy data with one fault of every kind."""
    root = tmp_path / "data"
    shutil.copytree(toy, root)
    path = root / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    first, second, third, *_ = (a for a in data["annotations"] if not a["iscrowd"])
    data["annotations"].append(first | {"id": 10**8})  # annotated twice
    for i, bbox in enumerate([[3, 3, 0, 5], [500, 500, 9, 9], [0, 0, 63, 63], [1, 1, 2, 2]], 1):
        data["annotations"].append(second | {"id": 10**8 + i, "bbox": bbox})
    data["categories"].append({"id": 99, "name": "unicorn", "supercategory": "shape"})
    empty = data["images"][-1]["id"]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != empty]
    data["images"][-1]["width"] += 5
    path.write_text(json.dumps(data))
    images = root / "train2017"
    with Image.open(images / names[third["image_id"]]) as image:  # recompressed, brighter, smaller
        smaller = ImageEnhance.Brightness(image).enhance(1.05).resize((56, 48))
        copy = sorted((root / "val2017").iterdir())[0]
        smaller.save(copy, quality=70)
    return root


def test_every_fault_is_reported(faulty, small, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*small, "--coco_path", str(faulty), "--check_data"]) == 0
    text = capsys.readouterr().out
    train = text.split("val: ")[0]
    for pattern in (
        "24 images",
        r"images without objects: \d+: .*0024\.jpg",
        r"another size than annotated: 1: \d+24\.jpg",
        "ignored: 1 empty or not finite, 1 outside",
        r"boxes over 90% of the image: [1-9]",
        r"boxes annotated twice: 1: ",
    ):
        assert re.search(pattern, train), pattern
    assert re.search(r"unicorn +id +99 .* none in train and val", text)
    assert re.search(r"train and val\n  [1-9]\d*: \d+\.jpg = \d+\.jpg", text)
    html = (out / "data.html").read_text()
    assert "unicorn" in html and "data:image/jpeg;base64," in html
    assert not (out / "checkpoint.pth").exists()


def test_status_2_only_where_training_fails(faulty, small, capsys):
    args = [*small, "--coco_path", str(faulty), "--check_data"]
    (faulty / "train2017/000000000002.jpg").write_text("no image")
    path = faulty / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    (image,) = (i for i in data["images"] if i["file_name"] == "000000000002.jpg")
    del image["width"], image["height"]  # nothing tells its size
    path.write_text(json.dumps(data))
    assert main(args) == 0  # it is skipped
    assert "unreadable images: 1: 000000000002.jpg" in capsys.readouterr().out
    assert main([*args, "--strict_data"]) == 2
    assert "training would fail" in capsys.readouterr().err
    assert main([*args, "--num_queries", "1", "--num_select", "1"]) == 2
    assert main([*args, "--batch_size", "30"]) == 0 and main([*args, "--accumulate", "30"]) == 2
    next((faulty / "val2017").iterdir()).write_text("no image")
    assert main(args) == 2


def test_hashes():
    flip = 1 << 5 | 1 << 40 | 1 << 63
    value = 0x0123456789ABCDEF
    assert look_alikes([value, value ^ flip, value ^ (flip | 1), 7]) == [(0, 1), (1, 2)]
    image = torch.zeros(3, 16, 18, dtype=torch.uint8)
    image[..., :9] = 200  # brighter on the left: one step in every row
    assert difference_hash(image).bit_count() in (8, 16)
    assert difference_hash(image.flip(2)) == 0


def test_photos_that_differ_do_not_look_alike(toy):
    images = [read_image(path) for path in sorted((toy / "train2017").iterdir())]
    assert look_alikes([difference_hash(image) for image in images]) == []
