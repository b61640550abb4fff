"""Data sets in COCO's instances format; their errors are reported when they are loaded."""

import contextlib
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
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert

from datasets.layouts import find_split
from datasets.transforms import eval_transforms, train_transforms
from models.class_map import ClassMap
from models.errors import UserError
from models.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.distributed import once_per_node

logger = logging.getLogger(__name__)

TRUTH = ("image_id", "category_id", "bbox", "area", "iscrowd")  # what evaluation needs
MAX_UNREADABLE = 20  # consecutive unreadable images at which training stops


def read_image(path: str | Path, size: tuple[float, float] | None = None) -> Tensor:
    """An image file of any mode as (3, H, W) uint8 RGB, rotated to its EXIF orientation.

    size: (height, width) in the annotations. If it matches the stored image but not the rotated
    one, the boxes were drawn without regard to EXIF, and the image is not rotated.
    Transparency is ignored. UserError if the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            stored = (image.height, image.width)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            if image.format == "JPEG" and image.mode == "RGB" and orientation == 1:
                with contextlib.suppress(ValueError):  # a broken file, which PIL may still read
                    pixels = decode_jpeg(Path(path).read_bytes())  # PIL's pixels in less time
                    return torch.from_numpy(pixels).permute(2, 0, 1)
            swaps_sides = orientation in (5, 6, 7, 8)
            if not swaps_sides or size != stored or stored[0] == stored[1]:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits; PIL would clip at 255
                grey = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            elif image.mode == "P":  # PIL would warn about transparency
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # decoders may raise anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels last in memory, for fast resizing


class CocoDetection(torch.utils.data.Dataset):
    """A data set of images and targets.

    `dataset[i]` is (image, target): image (3, H, W) float32, normalised; target {"labels": (n,)
    int64, "boxes": (n, 4) float32 cxcywh in [0, 1] of the transformed image, "image_id": (), and
    "orig_size" and "size": (2,) int64 (h, w) before and after the transforms}. Targets exclude
    crowds and boxes that are not finite, empty or outside the image; they may have n = 0.

    class_map: the labels of a trained model, or a function from categories to labels.
    train: augmentation depends only on (seed, epoch, i). An unreadable image is replaced by the
    next one, and its file is listed in the target's "skipped"; with `strict`, or without `train`,
    it raises UserError.
    In a distributed run all processes must build it: one of each node reads the annotations.
    annotated: False for a test set, which has no annotations and, if class_map is given, need not
    have categories.
    """

    def __init__(
        self,
        image_dir: str | Path,
        annotation_file: str | Path,
        transforms: Callable,
        class_map: ClassMap | Callable[[list[dict]], ClassMap] = ClassMap.from_categories,
        train: bool = False,
        seed: int = 0,
        strict: bool = False,
        annotated: bool = True,
    ):
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        self.transforms, self.train, self.seed, self.strict = transforms, train, seed, strict
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._warned_about_size = False

        for name, value in once_per_node(lambda: self._load(class_map, annotated)).items():
            setattr(self, name, value)

    def _load(self, class_map: Any, annotated: bool) -> dict[str, Any]:
        """The attributes of the data set. Their long ones are arrays: workers would copy lists, by
        counting references to their elements, and processes of a node share arrays."""
        data = self._load_json()
        images = self._section(data, "images")
        ids = self._field(images, "image", "id", _is_int, "an integer")
        names = self._field(images, "image", "file_name", _is_name, "a path")
        self._check_files(names)
        sides = [self._field(images, "image", k, _is_number, "pixels") for k in ("height", "width")]
        # (images, 2); infinite if unknown, as boxes are clipped to these sizes.
        sides = np.array(sides, dtype=np.float64).T
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
            data = json.loads(self.annotation_file.read_bytes(), object_hook=_without_segmentation)
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

    def _field(self, items: list[dict], kind: str, key: str, valid: Callable, wanted: str) -> list:
        """`key` of every item. UserError for the first invalid value, and for a duplicate id."""
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

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation depends on, also in the workers."""
        self._epoch.fill_(epoch)

    def most_objects(self) -> tuple[int, str]:
        """The largest number of objects in an image, and the image's file name."""
        counts = np.diff(self._offsets)
        return int(counts.max()), self.file_name(counts.argmax())

    def ground_truth(self, image_ids: Iterable[int]) -> dict[str, np.ndarray]:
        """Annotations of some images for COCO's evaluation, as columns: "image_id", "category_id",
        "area", "iscrowd" (n,), "bbox" (n, 4) as in the file; crowds and missing areas filled in."""
        chosen = np.isin(self._image_id, list(image_ids))
        return {key: getattr(self, f"_{key}")[chosen] for key in TRUTH}

    def drawable_truth(self, image_id: int) -> dict[str, Any]:
        """An image's annotations, including crowds, as arguments of `util.visualize.draw_boxes`."""
        truth = self.ground_truth([image_id])
        boxes = box_convert(torch.from_numpy(truth["bbox"]).float(), "xywh", "xyxy")
        labels = [self.class_map.label_of[i] for i in truth["category_id"].tolist()]
        return {"boxes": boxes, "labels": labels, "crowd": truth["iscrowd"].tolist()}

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if index >= len(self):
            raise IndexError(index)  # ends a loop over the data set
        image, position, skipped = self._read(index)
        size, declared_size = tuple(image.shape[-2:]), tuple(self._sizes[position].tolist())
        if size != declared_size and np.inf not in declared_size and not self._warned_about_size:
            self._warned_about_size = True  # once per worker
            message = "%s: (height, width) of %s is %s, not %s: check that boxes match the image"
            name = self.file_name(position)
            logger.warning(message, self.annotation_file, name, size, declared_size)
        objects = slice(*self._offsets[position : position + 2])
        corners = self._boxes[objects].clip(0, np.array([*size[::-1]] * 2, dtype=np.float32))
        kept = (corners[:, 2:] > corners[:, :2]).all(1)
        boxes = torch.from_numpy(corners[kept])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": torch.from_numpy(self._labels[objects][kept])}
        image = tv_tensors.Image(image)
        seed = np.random.SeedSequence((self.seed, int(self._epoch), index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, which fork_rng does not restore here.
            torch.default_generator.manual_seed(int(seed))
            image, target = self.transforms(image, target)
        target["image_id"] = torch.tensor(self.image_ids[position])
        target["orig_size"] = torch.tensor(size)
        target["size"] = torch.tensor(image.shape[-2:])
        return image, {**target, "skipped": skipped} if skipped else target

    def _read(self, index: int) -> tuple[Tensor, int, list[str]]:
        """The image at `index`, or in training the next readable one; its index; skipped files."""
        skipped: list[str] = []
        while True:
            position = (index + len(skipped)) % len(self)
            name = self.file_name(position)
            try:
                return self.image(position), position, skipped
            except UserError as error:
                skipped.append(name)
                if self.strict or not self.train or len(skipped) == MAX_UNREADABLE:
                    remedy = f"replace it or remove it from {self.annotation_file}"
                    raise UserError(f"{error}: {remedy}") from None


def _without_segmentation(item: dict) -> dict:
    """Dropping these while parsing halves the time and memory needed to load COCO."""
    item.pop("segmentation", None)
    return item


_is_name = lambda value: isinstance(value, str) and value != ""
_is_int = lambda value: type(value) is int and abs(value) < 2**63
_is_in = lambda ids: lambda value: _is_int(value) and value in ids
_is_number = lambda value: value is None or isinstance(value, int | float)
_is_box = lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def collate(batch: list[tuple[Tensor, dict]]) -> tuple[NestedTensor, list[dict]]:
    """A padded batch of images and the list of their targets."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images), list(targets)


def build_dataset(
    cfg: Any, split: str, class_map: ClassMap | Callable[[list[dict]], ClassMap] | None = None
) -> CocoDetection:
    """The "train", "val" or "test" split of the data set that `cfg` names, see `layouts`.
    class_map: as in CocoDetection; by default from the categories and `cfg.num_classes`."""
    paths = once_per_node(lambda: {"paths": find_split(cfg, split)})["paths"]
    train, test = split == "train", split == "test"
    resize = cfg.data_aug_scales, cfg.data_aug_max_size
    crop = cfg.data_aug_scales2_resize, cfg.data_aug_scales2_crop, cfg.fix_size
    transforms = train_transforms(*resize, *crop) if train else eval_transforms(*resize)
    class_map = class_map or partial(ClassMap.from_categories, num_classes=cfg.num_classes)
    options = {"seed": cfg.seed, "strict": cfg.strict_data, "annotated": not test}
    return CocoDetection(*paths, transforms, class_map, train, **options)
