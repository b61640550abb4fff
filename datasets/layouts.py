"""Finds the images and the annotations of a data set, in the layouts that people have.

The first of these that is there, below `coco_path`:

    annotations/instances_train2017.json    COCO 2017, its images in train2017/
    train/_annotations.coco.json            COCO as Roboflow exports it, with its images
    data.yaml                               YOLO; coco_path may also be the YAML file itself
    Annotations/*.xml                       Pascal VOC, with JPEGImages/, ImageSets/Main/train.txt
    train/*.xml                             Pascal VOC as Roboflow exports it, with its images

YOLO and VOC are converted to COCO's JSON in the user's cache directory, anew when a file changes.
The options train_images, train_annotations, val_images and val_annotations override all this.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from models.errors import UserError
from models.images import SUFFIXES, displayed_size

# What the splits are called, in the order in which they are looked for.
WORDS = {"train": ("train", "trainval"), "val": ("val", "valid", "validation", "test")}
Location = tuple[Path, Path]  # image directory, annotation file


def find_split(cfg: Any, split: str) -> Location:
    """Where the "train", "val" or "test" (COCO's test-dev) split of the data set that `cfg` names
    is. UserError if there is none, or if a file to convert is damaged."""
    names = f"{split}_images", f"{split}_annotations"
    images, annotations = (getattr(cfg, name, "") for name in names)
    if images or annotations:
        if not (images and annotations):
            raise UserError(f"{' and '.join(names)}: pass both or neither")
        return Path(images), Path(annotations)
    if not cfg.coco_path:
        raise UserError("coco_path is not set: pass the data set's directory with --coco_path")
    root = Path(cfg.coco_path)
    name = "image_info_test-dev2017" if split == "test" else f"instances_{split}2017"
    coco = root / f"{split}2017", root / "annotations" / f"{name}.json"
    if split == "test" or coco[1].exists():
        return coco
    folders = [root / word for word in WORDS[split]]
    if found := next((f for f in folders if (f / "_annotations.coco.json").exists()), None):
        return found, found / "_annotations.coco.json"
    file = root if root.suffix in (".yaml", ".yml") else root / "data.yaml"
    if file.exists():
        return from_yolo(file, split)
    if any(root.glob("Annotations/*.xml")):
        return from_voc(root, split)
    if found := next((f for f in folders if any(f.glob("*.xml"))), None):
        return from_roboflow_voc(root, found)
    return coco  # the error about its absence says what is missing


def cached(split: str, inputs: Iterable[Path], make: Callable[[], dict]) -> Path:
    """A file with the dict that `make` returns, written when one of `inputs` is new or changed."""
    stats = [(str(path.resolve()), path.stat()) for path in sorted(inputs)]
    stamp = repr([split, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "dn_dino" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        content = json.dumps(make())
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(content)
        os.replace(part, path)
    return path


def from_yolo(file: Path, split: str) -> Location:
    """A split of a data.yaml: `names`, and for each split a directory of images or a list of them
    (.txt). The labels of images/x.jpg are in labels/x.txt: in every line a class from 0 on, then
    centre, width and height, or the corners of a segment, relative to the image as it is displayed,
    by its EXIF orientation. Without that file an image has no objects. Category ids are YOLO's
    classes. hotcoco's reader knows neither segments nor orientations."""
    try:
        config = yaml.safe_load(file.read_text())
        names = config["names"]
        names = names if isinstance(names, dict) else dict(enumerate(names))
        places = next(config[word] for word in WORDS[split] if config.get(word))
    except (yaml.YAMLError, KeyError, TypeError, StopIteration) as e:
        raise UserError(f"{file}: is not YOLO's data.yaml with names, train and val") from e
    root = file.parent / (config.get("path") or "")
    root = root if root.is_dir() else file.parent
    images: list[Path] = []
    for place in [places] if isinstance(places, str) else places:
        # Roboflow writes ../train/images for what is beside data.yaml.
        paths = root / place, root / place.removeprefix("../")
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"{file}: {split}: {root / place} is not there; correct the path")
        if path.is_file():
            images += [path.parent / line for line in path.read_text().split("\n") if line.strip()]
        else:
            images += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    labels = {image: yolo_labels(image) for image in images}

    def make() -> dict:
        content: dict[str, list] = {"images": [], "annotations": []}
        content["categories"] = [{"id": int(i), "name": str(name)} for i, name in names.items()]
        for image_id, (image, label) in enumerate(labels.items(), 1):
            width, height = displayed_size(image)
            row = {"id": image_id, "file_name": os.path.relpath(image, root)}
            content["images"].append({**row, "width": width, "height": height})
            for category, box in yolo_boxes(label) if label.exists() else ():
                if category not in names:
                    raise UserError(f"{label}: class {category} is not among names of {file}")
                bbox = [v * s for v, s in zip(box, (width, height) * 2, strict=True)]
                ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
                extent = {"bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
                content["annotations"].append({**ids, "category_id": category, **extent})
        return content

    return root, cached(split, [file, *images, *filter(Path.exists, labels.values())], make)


def yolo_labels(image: Path) -> Path:
    """The label file of an image: labels/ in the place of the last images/ in its path."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def yolo_boxes(file: Path) -> list[tuple[int, list[float]]]:
    """Classes and boxes [x, y, width, height] of a label file, relative to the image."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            category, *values = (float(word) for word in line.split())
            if len(values) == 4:
                x, y, w, h = values
                box = [x - w / 2, y - h / 2, w, h]
            elif len(values) >= 6 and len(values) % 2 == 0:
                xs, ys = values[::2], values[1::2]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            else:
                raise ValueError(f"{len(values)} numbers after the class")
        except ValueError as e:
            if line.strip():
                raise UserError(f"{file}: line {number} is no box or segment ({e})") from e
            continue
        found.append((int(category), box))
    return found


def from_voc(root: Path, split: str) -> Location:
    """A split of Pascal VOC: the images that ImageSets/Main lists."""
    lists = [root / "ImageSets" / "Main" / f"{word}.txt" for word in WORDS[split]]
    listed = next((path for path in lists if path.exists()), None)
    if listed is None:
        raise UserError(f"{lists[0]}: is not there; it lists the images of the split, one per line")
    stems = {line.split()[0] for line in listed.read_text().splitlines() if line.strip()}
    files = sorted(root.glob("Annotations/*.xml"))
    make = lambda: read_voc(files, [file for file in files if file.stem in stems])
    return root / "JPEGImages", cached(split, [listed, *files], make)


def from_roboflow_voc(root: Path, folder: Path) -> Location:
    """Images and XML files in one directory for each split."""
    files = sorted(root.glob("*/*.xml"))
    make = lambda: read_voc(files, [file for file in files if file.parent == folder])
    return folder, cached(folder.name, files, make)


def read_voc(files: Sequence[Path], chosen: Sequence[Path]) -> dict:
    """COCO's content from the `chosen` ones of Pascal VOC's XML files; categories, by name, are
    those of all files. VOC's pixels count from 1, and a box includes its last ones. Objects marked
    as difficult become crowds, which do not count. hotcoco's reader stops at an inverted box."""
    roots, names = {}, set()
    for file in files:
        try:
            roots[file] = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as e:
            raise UserError(f"{file}: is not XML ({e}); replace or remove it") from e
        names |= {str(item.findtext("name")) for item in roots[file].iterfind("object")}
    number = {name: i for i, name in enumerate(sorted(names), 1)}
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for name, i in number.items()]
    for image_id, file in enumerate(chosen, 1):
        try:
            width, height = (int(roots[file].findtext(f"size/{k}")) for k in ("width", "height"))
            name = roots[file].findtext("filename") or f"{file.stem}.jpg"
            row = {"id": image_id, "file_name": name, "width": width, "height": height}
            content["images"].append(row)
            for item in roots[file].iterfind("object"):
                corners = "xmin", "ymin", "xmax", "ymax"
                x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{k}")) for k in corners)
                bbox = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
                crowd = int(item.findtext("difficult") == "1")
                extent = {"bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": crowd}
                category = number[str(item.findtext("name"))]
                content["annotations"].append({**ids, "category_id": category, **extent})
        except (TypeError, ValueError) as e:
            raise UserError(f"{file}: a size or a corner of a box is missing or no number") from e
    return content
