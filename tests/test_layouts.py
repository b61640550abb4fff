"""Data sets in the layouts of Roboflow, YOLO and Pascal VOC, read as the same data in COCO's."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hotcoco import COCO
from PIL import Image

from datasets import layouts
from datasets.coco import CocoDetection, build_dataset
from main import main
from models.errors import UserError
from util.config import Config

SPLITS = ("train", "val")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dn_dino"


def annotations(toy: Path, split: str) -> Path:
    return toy / "annotations" / f"instances_{split}2017.json"


def roboflow(toy: Path, root: Path) -> None:
    for split, word in zip(SPLITS, ("train", "valid"), strict=True):
        shutil.copytree(toy / f"{split}2017", root / word)
        shutil.copy(annotations(toy, split), root / word / "_annotations.coco.json")


def yolo(toy: Path, root: Path) -> None:
    """hotcoco writes the labels; images without objects get no file, as many tools leave it out."""
    for split in SPLITS:
        coco, labels = COCO(str(annotations(toy, split))), root / "labels" / split
        coco.to_yolo(str(labels))
        shutil.copytree(toy / f"{split}2017", root / "images" / split)
        content = yaml.safe_load((labels / "data.yaml").read_text())
        (labels / "data.yaml").unlink()
        for path in labels.iterdir():
            if not path.read_text().strip():
                path.unlink()
    content |= {split: f"images/{split}" for split in SPLITS}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def voc(toy: Path, root: Path) -> None:
    (root / "ImageSets/Main").mkdir(parents=True)
    for split in SPLITS:
        COCO(str(annotations(toy, split))).to_voc(str(root))
        shutil.copytree(toy / f"{split}2017", root / "JPEGImages", dirs_exist_ok=True)
        names = [path.stem for path in sorted((toy / f"{split}2017").iterdir())]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))


def roboflow_voc(toy: Path, root: Path) -> None:
    for split, word in zip(SPLITS, ("train", "valid"), strict=True):
        COCO(str(annotations(toy, split))).to_voc(str(root / word))
        for path in (root / word / "Annotations").iterdir():
            shutil.move(path, root / word)
        for name in ("Annotations", "labels.txt"):
            path = root / word / name
            path.rmdir() if path.is_dir() else path.unlink()
        shutil.copytree(toy / f"{split}2017", root / word, dirs_exist_ok=True)


def objects(dataset: CocoDetection) -> dict[str, list[tuple]]:
    """{image's name: (category name, box) of its usable objects}."""
    found = {}
    for i in range(len(dataset)):
        span = slice(*dataset._offsets[i : i + 2])
        names = [dataset.class_map.names[label] for label in dataset._labels[span].tolist()]
        rows = zip(names, dataset._boxes[span].tolist(), strict=True)
        found[Path(dataset.file_name(i)).name] = list(rows)
    return found


@pytest.mark.parametrize("write", [roboflow, yolo, voc, roboflow_voc])
def test_same_objects_in_every_layout(toy, tmp_path, write):
    root = tmp_path / "data"
    write(toy, root)
    limit = {roboflow: 0, yolo: 1e-3}.get(write, 1.01)  # VOC's corners are whole pixels
    for split in SPLITS:
        expected = objects(build_dataset(Config(coco_path=str(toy)), split))
        dataset = build_dataset(Config(coco_path=str(root)), split)
        found = objects(dataset)
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            assert len(found[name]) == len(rows)
            for (ours, box), (theirs, truth) in zip(found[name], rows, strict=True):
                assert ours == theirs and np.abs(np.subtract(box, truth)).max() <= limit
        assert dataset[0][0].shape[0] == 3  # the images are found
    assert sorted(dataset.class_map.names.values()) == sorted(
        build_dataset(Config(coco_path=str(toy)), "val").class_map.names.values()
    )


def test_named_files(toy, tmp_path):
    shutil.copy(annotations(toy, "val"), tmp_path / "some.json")
    cfg = Config(val_images=str(toy / "val2017"), val_annotations=str(tmp_path / "some.json"))
    assert len(build_dataset(cfg, "val")) == 8
    with pytest.raises(UserError, match="--coco_path"):
        build_dataset(cfg, "train")
    with pytest.raises(UserError, match="train_images and train_annotations: pass both"):
        build_dataset(Config(train_images=str(toy), coco_path=str(toy)), "train")


@pytest.fixture
def tiny(tmp_path) -> Path:
    """YOLO's layout by hand: two images of 100 x 50 pixels, one of them turned by EXIF."""
    root = tmp_path / "tiny"
    for name in ("images/a", "labels/a"):
        (root / name).mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (100, 50)).save(root / "images/a/one.jpg")
    Image.new("RGB", (100, 50)).save(root / "images/a/two.jpg", exif=turned)
    (root / "labels/a/one.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6\n")
    (root / "labels/a/two.txt").write_text("0 0.5 0.5 0.5 0.1\n")
    names = "names:\n  0: cat\n  1: dog\n"
    (root / "data.yaml").write_text(f"{names}train: ../images/a\nval: [images/a]\n")
    return root


def rows_of(root: Path) -> list[tuple]:
    """(image's name, category id, box) of every annotation of the training split."""
    folder, path = layouts.find_split(Config(coco_path=str(root)), "train")
    content = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert all((folder / name).exists() for name in names.values())
    rows = content["annotations"]
    return [
        (names[r["image_id"]], r["category_id"], [round(v, 6) for v in r["bbox"]]) for r in rows
    ]


def test_yolo_boxes_segments_and_orientation(tiny):
    expected = [
        ("images/a/one.jpg", 1, [40, 15, 20, 20]),
        ("images/a/one.jpg", 0, [10, 10, 20, 20]),  # a segment's extent
        ("images/a/two.jpg", 0, [12.5, 45, 25, 10]),  # it is displayed 50 wide and 100 high
    ]
    assert rows_of(tiny) == expected
    assert rows_of(tiny / "data.yaml") == expected
    assert build_dataset(Config(coco_path=str(tiny)), "train").image(1).shape == (3, 100, 50)
    (tiny / "list.txt").write_text("images/a/one.jpg\n")
    text = (tiny / "data.yaml").read_text()
    (tiny / "data.yaml").write_text(text.replace("../images/a", "list.txt"))
    assert rows_of(tiny) == expected[:2]


def test_converted_once_and_again_after_a_change(tiny, cache):
    rows_of(tiny)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    rows_of(tiny)
    assert file.stat().st_mtime_ns == written
    label = tiny / "labels/a/two.txt"
    label.write_text("1 0.5 0.5 0.5 0.1\n")
    os.utime(label, ns=(0, 0))  # a changed file may even be older
    assert rows_of(tiny)[2][1] == 1 and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels/a/one.txt", "7 0.5 0.5 0.2 0.4", r"one\.txt: class 7 is not among names"),
        ("labels/a/one.txt", "1 0.5 0.5 0.2", r"one\.txt: line 1 is no box or segment"),
        ("labels/a/one.txt", "dog 0.5 0.5 0.2 0.4", r"one\.txt: line 1 .*dog"),
        ("images/a/two.jpg", "no image", r"two\.jpg: cannot be read as an image"),
        ("data.yaml", "train: images/a", r"data\.yaml: is not YOLO's data\.yaml"),
        ("data.yaml", "names: [a", r"data\.yaml: is not YOLO's data\.yaml"),
        ("data.yaml", "names: [a, b]\ntrain: images/b", "images/b is not there"),
    ],
)
def test_yolo_errors(tiny, cache, name, text, message):
    (tiny / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        rows_of(tiny)
    assert "\n" not in str(error.value) and not cache.exists()


def test_voc_pixels_count_from_one_and_difficult_objects_are_crowds(toy, tmp_path):
    root = tmp_path / "data"
    voc(toy, root)
    path = sorted(root.glob("Annotations/*.xml"))[0]
    size = "<size><width>100</width><height>50</height></size>"
    box = "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>20</ymax></bndbox>"
    body = f"<object><name>dog</name><difficult>1</difficult>{box}</object>"
    name = f"<filename>{path.stem}.jpg</filename>"
    path.write_text(f"<annotation>{name}{size}{body}</annotation>")
    (root / "ImageSets/Main/train.txt").write_text(f"{path.stem}\n")
    _, file = layouts.find_split(Config(coco_path=str(root)), "train")
    (row,) = json.loads(file.read_text())["annotations"]
    assert row["bbox"] == [0, 10, 100, 10] and row["iscrowd"] == 1
    for text in ("<annotation><object>", f"<annotation>{name}</annotation>"):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{path.name}: (is not XML|a size or a corner)"):
            layouts.find_split(Config(coco_path=str(root)), "train")
    (root / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(UserError, match=r"ImageSets/Main/val\.txt: is not there"):
        layouts.find_split(Config(coco_path=str(root)), "val")


def test_training_on_yolo(toy, tmp_path, small, capsys):
    yolo(toy, tmp_path / "data")
    assert main([*small, "--coco_path", str(tmp_path / "data")]) == 0
    assert "24 training images" in capsys.readouterr().out
