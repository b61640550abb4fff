"""COCO's evaluation of boxes and masks by pycocotools, with hotcoco's curves where installed."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area
from torch import Tensor
from torchvision.ops import box_convert

from .coco import CocoAnnotations
from .masks import decode, encode

try:
    import hotcoco
except ImportError:
    hotcoco = None  # type: ignore[assignment]

Columns = dict[str, np.ndarray]
RESULT = ("image_id", "category_id", "bbox", "score")


def curves_by_pycocotools(images: int, categories: int, truth: Columns, found: Columns) -> dict:
    """COCOeval's `eval`: "precision" (IoUs, recalls, categories, sizes, limits), "recall" without
    the axis of recalls. Ids of images and categories are below their numbers. Columns: "image_id",
    "category_id" (n,), "bbox" (n, 4); "area", "iscrowd" (n,) of objects, "score" of detections. If
    there is "segmentation" (n,), RLEs, masks are evaluated, by their own areas."""
    rles = found.get("segmentation")
    areas = found["bbox"][:, 2] * found["bbox"][:, 3] if rles is None else area(list(rles))
    found = found | {"area": areas}
    indices = COCO(), COCO()
    with redirect_stdout(io.StringIO()):
        for index, columns in zip(indices, (truth, found), strict=True):
            index.dataset = {
                "images": [{"id": i, "height": 0, "width": 0} for i in range(images)],
                "categories": [{"id": i} for i in range(categories)],
                # From 1, as COCOeval cannot match id 0.
                "annotations": [{"id": i, **row} for i, row in enumerate(_rows(columns), start=1)],
            }
            index.createIndex()
        evaluation = COCOeval(*indices, "bbox" if rles is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def evaluate_by_hotcoco(images: int, names: Sequence[str], truth: Columns, found: Columns) -> Any:
    """hotcoco's COCOeval after `accumulate`; names: of the categories, otherwise as
    `curves_by_pycocotools`. Ids of objects and detections are their rows, from 1."""
    library: Any = hotcoco  # its types are narrower than what it takes
    with_masks = "segmentation" in found
    index = library.COCO.from_arrays(
        [{"id": i} for i in range(images)],
        [{"id": i, "name": name} for i, name in enumerate(names)],
        *(truth[key] for key in ("image_id", "category_id", "bbox")),
        **{key: truth[key] for key in ("area", "iscrowd")},
        segmentation=list(truth["segmentation"]) if with_masks else None,
    )
    if with_masks:  # without boxes, so that areas are those of the masks
        results = index.load_res(_rows(found, but="bbox"))
    else:
        columns = [found[key] for key in ("image_id", "bbox", "score", "category_id")]
        results = index.load_res(np.column_stack(columns))
    evaluation = library.COCOeval(index, results, "segm" if with_masks else "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def curves_by_hotcoco(images: int, categories: int, truth: Columns, found: Columns) -> dict:
    """The same bits as `curves_by_pycocotools`, much faster."""
    names = [str(i) for i in range(categories)]  # it warns of unnamed ones
    return evaluate_by_hotcoco(images, names, truth, found).eval


def _rows(columns: Columns, but: str = "") -> list[dict[str, Any]]:
    lists = {key: column.tolist() for key, column in columns.items() if key != but}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


class CocoEvaluator:
    """Collects detections and evaluates them, for the images in `results` only; masks too, if the
    data set is read with them."""

    def __init__(
        self,
        dataset: CocoAnnotations,
        curves: Callable = curves_by_hotcoco if hotcoco else curves_by_pycocotools,
    ):
        self.dataset, self.curves = dataset, curves
        # {image id: (k times the id, k category ids, boxes (k, 4) xywh, k scores, k RLEs or None)}
        self.results: dict[int, tuple[np.ndarray, ...]] = {}
        # COCO's 12 metrics and their lines, by the kinds that `summarize` was called for
        self.figures: dict[str, list[float]] = {}
        self._tables: dict[str, str] = {}

    def update(self, results: dict[int, dict[str, Tensor]]) -> None:
        """results: {image id: {"scores" (k,), "labels" (k,), "boxes" (k, 4) xyxy in pixels,
        and for masks "masks" (k, h, w) bool}}.
        Labels without a category are ignored, and so are scores and boxes that are not finite:
        COCOeval would count a NaN overlap as a match."""
        ids = self.dataset.class_map.ids
        for image_id, result in results.items():
            labels, scores = result["labels"].cpu().numpy(), result["scores"].double().cpu().numpy()
            boxes = box_convert(result["boxes"].double(), "xyxy", "xywh").cpu().numpy()
            keep = np.isin(labels, list(ids)) & np.isfinite(scores) & np.isfinite(boxes).all(1)
            category_ids = np.array([ids[i] for i in labels[keep].tolist()], dtype=np.int64)
            # Keeps all digits that float32 scores have, and more than boxes need.
            scores, boxes = scores[keep].round(8), boxes[keep].round(3)
            rles = np.full(len(scores), None)
            if self.dataset.masks:
                rles[:] = encode(result["masks"][torch.from_numpy(keep)])
            whose = np.full(len(scores), image_id)
            self.results[image_id] = whose, category_ids, boxes, scores, rles

    def join(self, parts: Sequence[dict[int, tuple]]) -> None:
        """Combine the `results` of several processes, in the data set's order."""
        results = {id_: result for part in parts for id_, result in part.items()}
        self.results = {
            id_: results[id_] for id_ in self.dataset.image_ids.tolist() if id_ in results
        }

    def _found(self, kind: str = "bbox") -> Columns:
        none = *np.empty((2, 0), dtype=np.int64), np.empty((0, 4)), *np.empty((2, 0))
        columns = map(np.concatenate, zip(none, *self.results.values(), strict=True))
        found = dict(zip((*RESULT, "segmentation"), columns, strict=True))
        return found if kind == "segm" else {key: found[key] for key in RESULT}

    def drawable(self, image_id: int, number: int) -> dict[str, Any]:
        """The best detections of an image as arguments of `draw.draw_boxes`."""
        _, category_ids, boxes, scores, rles = (c[:number] for c in self.results[image_id])
        boxes = box_convert(torch.from_numpy(boxes), "xywh", "xyxy")
        labels = [self.dataset.class_map.label_of[i] for i in category_ids.tolist()]
        drawable = {"boxes": boxes, "labels": labels, "scores": scores}
        return drawable | ({"masks": decode(rles)} if self.dataset.masks else {})

    @property
    def detections(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, as evaluated, JSON-serialisable."""
        return _rows(self._found())

    @property
    def segmentations(self) -> list[dict[str, Any]]:
        """As `detections`, masks instead of boxes, whose areas pycocotools would use."""
        return _rows(self._found("segm"), but="bbox")

    @property
    def categories(self) -> dict[int, str]:
        """{category id: name} of the data set, in ascending order."""
        return dict(sorted((c["id"], str(c.get("name", c["id"]))) for c in self.dataset.categories))

    def columns(self, kind: str = "bbox") -> tuple[Columns, Columns]:
        """Ground truth and detections without categories that only the model knows; with the ranks
        of the ids among `results` and `categories`: ids may be negative or too large for hotcoco's
        float64."""
        image_ids, category_ids = (
            np.array(sorted(ids), dtype=np.int64) for ids in (self.results, self.categories)
        )

        def numbered(columns: Columns) -> Columns:
            known = np.isin(columns["category_id"], category_ids)
            columns = {key: column[known] for key, column in columns.items()}
            image = np.searchsorted(image_ids, columns["image_id"])
            category = np.searchsorted(category_ids, columns["category_id"])
            return columns | {"image_id": image, "category_id": category}

        dataset: Any = self.dataset
        truth_of = dataset.mask_truth if kind == "segm" else dataset.ground_truth
        return numbered(truth_of(self.results)), numbered(self._found(kind))

    def summarize(self, kind: str = "bbox") -> list[float]:
        """COCO's 12 metrics of boxes or, for "segm", masks, AP first; -1 if there are no objects,
        e.g. no small ones."""
        evaluation, counts = COCOeval(iouType=kind), (len(self.results), len(self.categories))
        evaluation.eval = self.curves(*counts, *self.columns(kind))
        with redirect_stdout(io.StringIO()) as output:
            evaluation.summarize()
        self._tables[kind], self._precision = output.getvalue(), evaluation.eval["precision"]
        self.figures[kind] = evaluation.stats.tolist()
        return self.figures[kind]

    def table(self) -> str:
        """The 12 lines that COCO's evaluation prints, of boxes, then of masks if evaluated."""
        return "masks\n".join(self._tables.values())

    def per_class(self) -> dict[str, float]:
        """{category name: AP} of the last `summarize`, without categories that have no objects."""
        # (IoUs, recalls, categories), for objects of all sizes and 100 detections per image
        figures = self._precision[:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
        named = zip(self.categories.values(), figures, strict=True)
        return {name: ap for name, ap in named if ap > -1}
