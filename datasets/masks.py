"""Masks of a data set in COCO's format: polygons, and RLE, compressed or not."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class Masks:
    """What `segmentation` outlines, in arrays, which processes share, as JSON.

    `shapes` are the bytes of all annotations, which begin and end at `ends` (annotations + 1,); an
    annotation without a mask has none. `bad`: the number of polygons and RLEs that were left out.
    """

    def __init__(self, shapes: np.ndarray, ends: np.ndarray, bad: int):
        self.shapes, self.ends, self.bad = shapes, ends, bad
        self.exist = np.diff(ends) > 0  # (annotations,) bool

    def rle(self, row: int, size: Sequence[float]) -> dict[str, Any]:
        """The mask of annotation number `row`, in an image of size (h, w), as pycocotools' RLE."""
        from pycocotools import mask  # not needed without masks

        shapes = json.loads(self.shapes[slice(*self.ends[row : row + 2])].tobytes())
        if isinstance(shapes[0], list) or isinstance(shapes[0]["counts"], list):
            shapes = mask.frPyObjects(shapes, *(int(side) for side in size))
        return mask.merge(shapes)


def read_shapes(items: list[dict], sizes: np.ndarray, file: Path) -> dict[str, Any]:
    """The arguments of `Masks` for a file's annotations; `sizes` (annotations, 2) are those of
    their images."""
    texts, bad = [], 0
    for item, (height, width) in zip(items, sizes.tolist(), strict=True):
        given = item.get("segmentation") or []
        parts = given if isinstance(given, list) else [given]
        is_good = is_polygon if parts is given else is_rle
        good = [part for part in parts if is_good(part, height, width)]
        bad += len(parts) - len(good)
        texts.append(json.dumps(good).encode() if good else b"")
    if bad or b"" in texts:
        message = "%s: left out %d bad polygons or RLEs; %d annotations have no mask"
        logger.warning(message, file, bad, texts.count(b""))
    shapes = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return {"shapes": shapes, "ends": np.cumsum([0, *map(len, texts)]), "bad": bad}


def is_polygon(part: Any, height: float, width: float) -> bool:
    """Whether it has at least 3 points, x and y of each, and reaches into the image."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    if not all_numbers(part, int | float) or not math.isfinite(sum(part)):
        return False
    x, y = part[::2], part[1::2]
    return min(x) < width and max(x) > 0 and min(y) < height and max(y) > 0


def is_rle(shape: Any, height: float, width: float) -> bool:
    """Whether it has the image's size and, if it is not compressed, its number of pixels."""
    if not isinstance(shape, dict) or shape.get("size") != [height, width]:
        return False
    if not isinstance(counts := shape.get("counts"), list):
        return isinstance(counts, str) and counts != ""
    return all_numbers(counts, int) and min(counts) >= 0 and sum(counts) == height * width


def all_numbers(values: Iterable[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)
