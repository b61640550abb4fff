"""Annotations in COCO's instances format; their errors are reported when they are loaded."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from .class_map import ClassMap
from .errors import UserError
from .images import read_image

logger = logging.getLogger(__name__)

TRUTH = ("image_id", "category_id", "bbox", "area", "iscrowd")  # what evaluation needs


class CocoAnnotations:
    """The images, categories and annotations of a data set.

    class_map: the labels of a trained model, or a function from categories to labels.
    annotated: False for a test set, which has no annotations and, if class_map is given, need not
    have categories.
    """

    masks = False  # whether `segmentation` is read too
    image_ids: np.ndarray
    categories: list[dict]
    class_map: ClassMap
    _names: np.ndarray  # of the image files, as bytes
    _offsets: np.ndarray  # (images + 1,) of each image's usable objects
    _image_id: np.ndarray  # (annotations,)
    _sizes: np.ndarray  # (images, 2) height and width, infinite if unknown

    def __init__(
        self,
        image_dir: str | Path,
        annotation_file: str | Path,
        class_map: ClassMap | Callable[[list[dict]], ClassMap] = ClassMap.from_categories,
        annotated: bool = True,
    ):
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
            self._fail("has no usable object", "at least one non-empty, non-crowd box is needed")
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

        usable = np.flatnonzero(valid & ~crowd)
        usable = usable[np.argsort(image[usable], kind="stable")]
        xyxy = np.concatenate([boxes[usable, :2], boxes[usable, :2] + boxes[usable, 2:]], axis=1)
        clipped = xyxy.clip(0, sizes[image[usable]][:, [1, 0, 1, 0]])
        inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
        arrays |= {"_boxes": clipped[inside].astype(np.float32), "_labels": label[usable][inside]}
        arrays |= {"_row": np.flatnonzero(valid), "_object_row": usable[inside]}  # in the file
        starts = np.arange(len(image_ids) + 1)
        arrays["_offsets"] = np.searchsorted(image[usable][inside], starts)
        # Rounding moves many boxes a fraction of a pixel outside: no warning for those.
        moved = np.abs(clipped - xyxy)[inside].max(1, initial=0) > 1
        counts = [int(chosen.sum()) for chosen in (~valid, ~inside, moved)]
        if any(counts):
            message = "%s: ignored %d empty or non-finite boxes and %d outside the image"
            logger.warning(f"{message}, clipped %d to the image", self.annotation_file, *counts)
        return arrays | {"ignored": counts}

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

    def ground_truth(self, image_ids: Iterable[int]) -> dict[str, np.ndarray]:
        """Annotations of some images for COCO's evaluation, as columns: "image_id", "category_id",
        "area", "iscrowd" (n,), "bbox" (n, 4) as in the file; crowds and missing areas filled in."""
        chosen = np.isin(self._image_id, list(image_ids))
        return {key: getattr(self, f"_{key}")[chosen] for key in TRUTH}

    def drawable_truth(self, image_id: int) -> dict[str, Any]:
        """An image's annotations, including crowds, as arguments of `draw.draw_boxes`."""
        return self.drawable(self.ground_truth([image_id]))

    def drawable(self, truth: dict[str, np.ndarray]) -> dict[str, Any]:
        """Some of `ground_truth` as arguments of `draw.draw_boxes`."""
        boxes = box_convert(torch.from_numpy(truth["bbox"]).float(), "xywh", "xyxy")
        labels = [self.class_map.label_of[i] for i in truth["category_id"].tolist()]
        return {"boxes": boxes, "labels": labels, "crowd": truth["iscrowd"].tolist()}


def _without_segmentation(item: dict) -> dict:
    """Dropping these while parsing halves the time and memory needed to load COCO."""
    item.pop("segmentation", None)
    return item


_is_name = lambda value: isinstance(value, str) and value != ""
_is_int = lambda value: type(value) is int and abs(value) < 2**63
_is_in = lambda ids: lambda value: _is_int(value) and value in ids
_is_number = lambda value: value is None or isinstance(value, int | float)
_is_box = lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
