"""Data sets in COCO's instances format, with the transforms of training and evaluation."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from datasets.layouts import find_split
from datasets.masks import Masks, read_shapes
from datasets.transforms import eval_transforms, train_transforms
from models.class_map import ClassMap
from models.coco import CocoAnnotations
from models.errors import UserError
from models.masks import decode
from models.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.distributed import once_per_node

logger = logging.getLogger(__name__)

MAX_UNREADABLE = 20  # consecutive unreadable images at which training stops


class CocoDetection(CocoAnnotations, torch.utils.data.Dataset):
    """A data set of images and targets.

    `dataset[i]` is (image, target): image (3, H, W) float32, normalised; target {"labels": (n,)
    int64, "boxes": (n, 4) float32 cxcywh in [0, 1] of the transformed image, "image_id": (), and
    "orig_size" and "size": (2,) int64 (h, w) before and after the transforms}. Targets exclude
    crowds and boxes that are not finite, empty or outside the image; they may have n = 0. With
    `masks` they also exclude objects without a mask and have "masks" (n, H, W) bool.

    class_map, annotated: as in `CocoAnnotations`.
    train: augmentation depends only on (seed, epoch, i). An unreadable image is replaced by the
    next one, and its file is listed in the target's "skipped"; with `strict`, or without `train`,
    it raises UserError.
    In a distributed run all processes must build it: one of each node reads the annotations.
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
        masks: bool = False,
    ):
        self.transforms, self.train, self.seed, self.strict = transforms, train, seed, strict
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._warned_about_size, self.masks = False, masks
        super().__init__(image_dir, annotation_file, class_map, annotated)
        if masks:
            self.shapes = Masks(self._shapes, self._ends, self._bad)

    def _share(self, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return once_per_node(load)

    def _annotations(
        self, items: list[dict], image_ids: list[int], sizes: np.ndarray, class_map: ClassMap
    ) -> dict[str, Any]:
        arrays = super()._annotations(items, image_ids, sizes, class_map)
        if not self.masks:
            return arrays
        if items and np.inf in sizes:
            self._fail("an image has no 'height' or 'width'", "masks need both")
        size_of = dict(zip(image_ids, sizes, strict=True))
        of_items = np.array([size_of[item["image_id"]] for item in items]).reshape(-1, 2)
        shapes = read_shapes(items, of_items, self.annotation_file)
        kept = Masks(**shapes).exist[arrays["_object_row"]]
        arrays |= {k: arrays[k][kept] for k in ("_boxes", "_labels", "_object_row")}
        if items and not kept.any():
            self._fail("no usable object has a mask", "--masks needs 'segmentation'")
        arrays["_offsets"] = np.append(0, kept.cumsum())[arrays["_offsets"]]
        return arrays | {f"_{key}": value for key, value in shapes.items()}

    def mask_truth(self, image_ids: Iterable[int]) -> dict[str, np.ndarray]:
        """As `ground_truth`, but of annotations with a mask, and "segmentation" (n,), the RLEs."""
        columns = self.ground_truth(image_ids)
        row = self._row[np.isin(self._image_id, list(image_ids))]
        kept = self.shapes.exist[row]
        columns, row = {key: column[kept] for key, column in columns.items()}, row[kept]
        size_of = dict(zip(self.image_ids.tolist(), self._sizes, strict=True))
        pairs = zip(row, columns["image_id"].tolist(), strict=True)
        rles = [self.shapes.rle(i, size_of[image_id]) for i, image_id in pairs]
        return columns | {"segmentation": np.array(rles, dtype=object)}

    def drawable_truth(self, image_id: int) -> dict[str, Any]:
        """As in `CocoAnnotations`; with masks, the annotations that have one."""
        if not self.masks:
            return super().drawable_truth(image_id)
        truth = self.mask_truth([image_id])
        return self.drawable(truth) | {"masks": decode(truth["segmentation"])}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation depends on, also in the workers."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if index >= len(self):
            raise IndexError(index)  # ends a loop over the data set
        image, position, skipped = self._read(index)
        size, declared_size = tuple(image.shape[-2:]), tuple(self._sizes[position].tolist())
        if size != declared_size and np.inf not in declared_size and self.masks:
            problem = f"{self.file_name(position)} is {size}, not {declared_size} (height, width)"
            raise UserError(f"{self.annotation_file}: {problem}: its masks do not fit, correct it")
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
        if self.masks:
            rles = [self.shapes.rle(row, size) for row in self._object_row[objects][kept]]
            target["masks"] = tv_tensors.Mask(decode(rles, size))
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


def collate(batch: list[tuple[Tensor, dict]]) -> tuple[NestedTensor, list[dict]]:
    """A padded batch of images and the list of their targets."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images), list(targets)


def build_transforms(cfg: Any, train: bool) -> Callable:
    resize = cfg.data_aug_scales, cfg.data_aug_max_size
    if not train:
        return eval_transforms(*resize)
    crop = cfg.data_aug_scales2_resize, cfg.data_aug_scales2_crop, cfg.fix_size
    return train_transforms(*resize, *crop)


def fitting_sizes(dataset: CocoAnnotations, cfg: Any) -> dict[str, Any]:
    """The options data_aug_*, all reduced by one factor so that a shorter side of median length is
    enlarged at most `cfg.max_enlargement` times; none if they need not be."""
    sides = dataset._sizes[np.isfinite(dataset._sizes).all(1)].min(1)
    largest = cfg.max_enlargement * (np.median(sides) if len(sides) else np.inf)
    factor = largest / max(cfg.data_aug_scales)
    if not 0 < factor < 1:
        return {}
    given = {name: value for name, value in vars(cfg).items() if name.startswith("data_aug")}
    shrink = lambda v: [shrink(x) for x in v] if isinstance(v, list) else max(round(v * factor), 8)
    return {name: shrink(value) for name, value in given.items()}


def build_dataset(
    cfg: Any, split: str, class_map: ClassMap | Callable[[list[dict]], ClassMap] | None = None
) -> CocoDetection:
    """The "train", "val" or "test" split of the data set that `cfg` names, see `layouts`.
    class_map: as in CocoDetection; by default from the categories and `cfg.num_classes`."""
    paths = once_per_node(lambda: {"paths": find_split(cfg, split)})["paths"]
    train, test = split == "train", split == "test"
    transforms = build_transforms(cfg, train)
    class_map = class_map or partial(ClassMap.from_categories, num_classes=cfg.num_classes)
    options = {"seed": cfg.seed, "strict": cfg.strict_data, "annotated": not test}
    options["masks"] = cfg.masks
    return CocoDetection(*paths, transforms, class_map, train, **options)
