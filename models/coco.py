"""Annotations in COCO's instances format; their errors are reported when they are loaded."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from .class_map import ClassMap
from .errors import UserError, import_extra
from .images import read_image

logger = logging.getLogger(__name__)

TRUTH = ("image_id", "category_id", "bbox", "area", "iscrowd")  # what evaluation needs


class CocoAnnotations:
    """The images, categories and annotations of a data set.

    class_map: the labels of a trained model, or a function from categories to labels.
    annotated: False for a test set, which has no annotations and, if class_map is given, need not
    have categories.
    masks: also read what `segmentation` outlines. Objects without a mask are then not usable.
    """

    image_ids: np.ndarray
    categories: list[dict]
    class_map: ClassMap
    _names: np.ndarray  # of the image files, as bytes
    _offsets: np.ndarray  # (images + 1,) of each image's usable objects
    _image_id: np.ndarray  # (annotations,)
    _row: np.ndarray  # (annotations,) in the file, and `_object_row` (usable objects,)
    _shapes: np.ndarray  # with masks, the JSON of every annotation's mask, as bytes
    _shape_ends: np.ndarray  # (annotations in the file + 1,) where each of those begins and ends
    _sizes: np.ndarray  # (images, 2) height and width, infinite if unknown

    def __init__(
        self,
        image_dir: str | Path,
        annotation_file: str | Path,
        class_map: ClassMap | Callable[[list[dict]], ClassMap] = ClassMap.from_categories,
        annotated: bool = True,
        masks: bool = False,
    ):
        self.masks = masks
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        for name, value in self._share(lambda: self._load(class_map, annotated)).items():
            setattr(self, name, value)

    def _share(self, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `load`, which a subclass may share between processes."""
        return load()

    def _load(self, class_map: Any, annotated: bool) -> dict[str, Any]:
        """The attributes of the data set. Their long ones are arrays: workers would copy lists, by
        counting references to their elements, and processes of a node share arrays."""
        data = self._load_json()
        images = self._section(data, "images")
        ids = self._field(images, "image", "id", _is_int, "an integer")
        names = self._field(images, "image", "file_name", _is_name, "a path")
        self._check_files(names)
        columns = (
            self._field(images, "image", k, _is_number, "pixels") for k in ("height", "width")
        )
        # (images, 2); infinite if unknown, as boxes are clipped to these sizes.
        sides = np.array(list(columns), dtype=np.float64).T
        sizes = np.where(sides > 0, sides, np.inf)

        categories = self._section(data, "categories", annotated or callable(class_map))
        self._field(categories, "category", "id", _is_int, "an integer")
        try:
            class_map = class_map(categories) if callable(class_map) else class_map
        except UserError as error:
            raise UserError(f"{self.annotation_file}: {error}") from None
        self._check_category_names(categories, class_map)
        items = self._section(data, "annotations", annotated)
        arrays = self._annotations(items, ids, sizes, class_map)
        if annotated and not len(arrays["_labels"]):
            wanted = "non-empty, non-crowd box" + self.masks * " with a mask"
            self._fail("has no usable object", f"at least one {wanted} is needed")
        if self.masks and annotated and np.inf in sizes:
            self._fail("an image has no 'height' or 'width'", "masks need both")
        names = np.array([name.encode(errors="surrogatepass") for name in names])
        arrays |= {"image_ids": np.array(ids), "_names": names, "_sizes": sizes}
        return {**arrays, "categories": categories, "class_map": class_map}

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        raise UserError(f"{self.annotation_file}: {problem}: {remedy}")

    def _load_json(self) -> dict[str, Any]:
        try:
            hook = None if self.masks else _without_segmentation
            data = json.loads(self.annotation_file.read_bytes(), object_hook=hook)
        except OSError as error:
            self._fail(f"cannot be read ({error.strerror})", "check the path to the annotations")
        except ValueError as error:
            self._fail(f"is not valid JSON ({error})", "download or export it again")
        return data if isinstance(data, dict) else {}

    def _section(self, data: dict[str, Any], key: str, required: bool = True) -> list[dict]:
        items = data.get(key, [])
        listed = isinstance(items, list) and all(isinstance(item, dict) for item in items)
        if not listed or (required and not items):
            problem = "is missing or empty" if listed else "is not a list of objects"
            self._fail(f"'{key}' {problem}", "COCO's instances format is expected")
        return items

    def _field(self, items: list[dict], kind: str, key: str, valid: Callable, wanted: str) -> Any:
        """The list of `key` of every item. UserError for the first invalid value and a duplicate
        id."""
        values = [item.get(key) for item in items]
        for position, value in enumerate(values):
            if not valid(value):
                name = f"{kind} {items[position].get('id', f'number {position + 1}')}"
                found = repr(value) if key in items[position] else "missing"
                self._fail(f"'{key}' of {name} is {found}", f"it must be {wanted}")
        if key == "id" and len(set(values)) < len(values):
            duplicate = Counter(values).most_common(1)[0][0]
            self._fail(f"{kind} id {duplicate} occurs more than once", "make the ids unique")
        return values

    def _check_files(self, names: list[str]) -> None:
        """UserError if image files are missing. Lists directories: stat for each file is slow."""
        paths = [os.path.split(name) for name in names]
        remedy = "check the path to the images"
        try:
            listings = {d: set(os.listdir(self.image_dir / d)) for d in {d for d, _ in paths}}
        except OSError as e:
            raise UserError(f"{e.filename}: cannot be listed ({e.strerror}): {remedy}") from None
        missing = [os.path.join(d, name) for d, name in paths if name not in listings[d]]
        if missing:
            images = f"{len(missing)} of the {len(paths)} images of {self.annotation_file}"
            problem = f"{self.image_dir / missing[0]}: no such file; {images} are missing"
            raise UserError(f"{problem}: {remedy}")

    def _check_category_names(self, categories: list[dict], class_map: ClassMap) -> None:
        """Warn about ids with another name in the model: exports may number differently."""
        known = {id_: class_map.names[label] for label, id_ in class_map.ids.items()}
        for category in categories:
            id_, name = category["id"], str(category.get("name"))
            if "name" in category and known.get(id_, name).lower() != name.lower():
                message = "%s: category %d is %r here, but %r in the model: check the ids"
                logger.warning(message, self.annotation_file, id_, name, known[id_])

    def _annotations(
        self, items: list[dict], image_ids: list[int], sizes: np.ndarray, class_map: ClassMap
    ) -> dict[str, Any]:
        """Annotations as arrays: usable objects in the order of their images, from `_offsets` on;
        for evaluation all valid ones. `ignored`: numbers of boxes that are empty or not finite, and
        outside the image, and of those that were clipped to it."""
        column = partial(self._field, items, "annotation")
        index_of = {id_: position for position, id_ in enumerate(image_ids)}
        image = column("image_id", _is_in(index_of), "the id of an image in this file")
        image = np.array([index_of[i] for i in image], dtype=np.int64)
        label_of, known = class_map.label_of, "the id of a category of the model"
        category = column("category_id", _is_in(label_of), known)
        label = np.array([label_of[i] for i in category], dtype=np.int64)
        boxes = column("bbox", _is_box, "[x, y, width, height]")
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        area = np.array(column("area", _is_number, "square pixels"), dtype=np.float64)
        area = np.where(np.isfinite(area), area, boxes[:, 2] * boxes[:, 3])
        crowd = np.array([bool(item.get("iscrowd")) for item in items], dtype=bool)

        valid = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)
        truth = np.array(image_ids)[image], np.array(category), boxes, area, crowd
        arrays = {f"_{key}": values[valid] for key, values in zip(TRUTH, truth, strict=True)}

        arrays["_row"], usable = np.flatnonzero(valid), valid & ~crowd
        if self.masks:
            arrays |= self._read_shapes(items, sizes[image])
            usable &= np.diff(arrays["_shape_ends"]) > 0
        usable = np.flatnonzero(usable)
        usable = usable[np.argsort(image[usable], kind="stable")]
        xyxy = np.concatenate([boxes[usable, :2], boxes[usable, :2] + boxes[usable, 2:]], axis=1)
        clipped = xyxy.clip(0, sizes[image[usable]][:, [1, 0, 1, 0]])
        inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
        arrays |= {"_boxes": clipped[inside].astype(np.float32), "_labels": label[usable][inside]}
        arrays["_object_row"] = usable[inside]
        starts = np.arange(len(image_ids) + 1)
        arrays["_offsets"] = np.searchsorted(image[usable][inside], starts)
        # Rounding moves many boxes a fraction of a pixel outside: no warning for those.
        moved = np.abs(clipped - xyxy)[inside].max(1, initial=0) > 1
        counts = [int(chosen.sum()) for chosen in (~valid, ~inside, moved)]
        if any(counts):
            message = "%s: ignored %d empty or non-finite boxes and %d outside the image"
            logger.warning(f"{message}, clipped %d to the image", self.annotation_file, *counts)
        return arrays | {"ignored": counts}

    def _read_shapes(self, items: list[dict], sizes: np.ndarray) -> dict[str, Any]:
        """`_shapes` and `_shape_ends`; `bad_shapes`: numbers of polygons or RLEs left out, and of
        annotations without any other. `sizes` (annotations, 2) are those of their images."""
        texts, bad = [], 0
        for item, (height, width) in zip(items, sizes.tolist(), strict=True):
            given = item.get("segmentation") or []
            parts = given if isinstance(given, list) else [given]
            good = [part for part in parts if _is_polygon(part, height, width)]
            if isinstance(given, dict) and _is_rle(given, height, width):
                good = parts
            bad += len(parts) - len(good)
            texts.append(json.dumps(good).encode() if good else b"")
        lost = texts.count(b"")
        if bad or lost:
            message = "%s: left out %d bad polygons or RLEs; %d objects have no mask"
            logger.warning(message, self.annotation_file, bad, lost)
        ends = np.cumsum([0, *map(len, texts)])
        shapes = np.frombuffer(b"".join(texts), dtype=np.uint8)
        return {"_shapes": shapes, "_shape_ends": ends, "bad_shapes": (bad, lost)}

    def rle(self, row: int, size: Sequence[int]) -> dict[str, Any]:
        """The mask of an annotation by its row in the file, in an image of size (h, w), as
        pycocotools' RLE."""
        mask = import_extra("pycocotools.mask", "eval")
        shapes = json.loads(self._shapes[slice(*self._shape_ends[row : row + 2])].tobytes())
        if isinstance(shapes[0], list) or isinstance(shapes[0]["counts"], list):
            shapes = mask.frPyObjects(shapes, *size)
        return mask.merge(shapes)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Path of the image at `index`, relative to `image_dir`."""
        return self._names[index].decode(errors="surrogatepass")

    def image(self, index: int) -> Tensor:
        """The image at `index` without transforms, (3, H, W) uint8 RGB."""
        return read_image(self.image_dir / self.file_name(index), tuple(self._sizes[index]))

    def most_objects(self) -> tuple[int, str]:
        """The largest number of objects in an image, and the image's file name."""
        counts = np.diff(self._offsets)
        return int(counts.max()), self.file_name(int(counts.argmax()))

    def ground_truth(self, image_ids: Iterable[int], masks: bool = False) -> dict[str, np.ndarray]:
        """Annotations of some images for COCO's evaluation, as columns: "image_id", "category_id",
        "area", "iscrowd" (n,), "bbox" (n, 4) as in the file; crowds and missing areas filled in.
        With `masks` those that have one, and "segmentation" (n,), an RLE."""
        chosen = np.isin(self._image_id, list(image_ids))
        if masks:
            chosen &= np.diff(self._shape_ends)[self._row] > 0
        columns = {key: getattr(self, f"_{key}")[chosen] for key in TRUTH}
        if masks:
            sizes = dict(zip(self.image_ids.tolist(), self._sizes.tolist(), strict=True))
            rows = zip(self._row[chosen].tolist(), columns["image_id"].tolist(), strict=True)
            rles = [self.rle(row, [int(side) for side in sizes[id_]]) for row, id_ in rows]
            columns["segmentation"] = np.array(rles, dtype=object)
        return columns

    def drawable_truth(self, image_id: int) -> dict[str, Any]:
        """An image's annotations, including crowds, as arguments of `draw.draw_boxes`."""
        truth = self.ground_truth([image_id], self.masks)
        boxes = box_convert(torch.from_numpy(truth["bbox"]).float(), "xywh", "xyxy")
        labels = [self.class_map.label_of[i] for i in truth["category_id"].tolist()]
        drawable = {"boxes": boxes, "labels": labels, "crowd": truth["iscrowd"].tolist()}
        if self.masks:
            drawable["masks"] = decode(truth["segmentation"])
        return drawable


def decode(rles: Sequence[dict] | np.ndarray, size: Sequence[int] = (0, 0)) -> Tensor:
    """Masks (n, h, w), uint8, from pycocotools' RLEs; `size` is that of none."""
    mask = import_extra("pycocotools.mask", "eval")
    if not len(rles):
        return torch.zeros(0, *size, dtype=torch.uint8)
    return torch.from_numpy(mask.decode(list(rles))).permute(2, 0, 1).contiguous()


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """The RLE of masks (n, h, w), bool, fit for JSON."""
    mask = import_extra("pycocotools.mask", "eval")
    columns = masks.permute(0, 2, 1).contiguous().to("cpu", torch.uint8).numpy()
    rles = [mask.encode(x.T) for x in columns]
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def _without_segmentation(item: dict) -> dict:
    """Dropping these while parsing halves the time and memory needed to load COCO."""
    item.pop("segmentation", None)
    return item


_is_name = lambda value: isinstance(value, str) and value != ""
_is_int = lambda value: type(value) is int and abs(value) < 2**63
_is_in = lambda ids: lambda value: _is_int(value) and value in ids
_is_number = lambda value: value is None or isinstance(value, int | float)
_is_box = lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_polygon(part: Any, height: float, width: float) -> bool:
    """Whether it has at least 3 points, x and y of each, and reaches into the image."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    if not all(isinstance(value, int | float) for value in part) or not math.isfinite(sum(part)):
        return False
    x, y = part[::2], part[1::2]
    return min(x) < width and max(x) > 0 and min(y) < height and max(y) > 0


def _is_rle(shape: dict, height: float, width: float) -> bool:
    """Whether it has the image's size, and if it is not compressed, its number of pixels."""
    counts = shape.get("counts")
    if shape.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        runs = all(_is_int(n) and n >= 0 for n in counts)
        return runs and sum(counts) == height * width
    return isinstance(counts, str) and counts != ""
