"""COCO's box evaluation, by pycocotools."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from datasets.coco import CocoDetection


class CocoEvaluator:
    """Collects detections and evaluates them, for the images in `results` only."""

    def __init__(self, dataset: CocoDetection):
        self.dataset = dataset
        # {image id: (k scores, k category ids, k boxes [x, y, width, height])}
        self.results: dict[int, tuple[list[float], list[int], list[list[float]]]] = {}

    def update(self, results: dict[int, dict[str, Tensor]]) -> None:
        """results: {image id: {"scores" (k,), "labels" (k,), "boxes" (k, 4) xyxy in pixels}}.
        Labels without a category are ignored, and so are scores and boxes that are not finite:
        COCOeval would count a NaN overlap as a match."""
        ids = self.dataset.class_map.ids
        for image_id, result in results.items():
            labels, scores = result["labels"].cpu().numpy(), result["scores"].double().cpu().numpy()
            boxes = box_convert(result["boxes"].double(), "xyxy", "xywh").cpu().numpy()
            keep = np.isin(labels, list(ids)) & np.isfinite(scores) & np.isfinite(boxes).all(1)
            # Keeps all digits that float32 scores have, and more than boxes need.
            scores, boxes = scores[keep].round(8).tolist(), boxes[keep].round(3).tolist()
            self.results[image_id] = scores, [ids[i] for i in labels[keep].tolist()], boxes

    def join(self, parts: Sequence[dict[int, tuple]]) -> None:
        """Combine the `results` of several processes, in the data set's order, which determines the
        figures if scores are equal."""
        results = {id_: result for part in parts for id_, result in part.items()}
        self.results = {
            id_: results[id_] for id_ in self.dataset.image_ids.tolist() if id_ in results
        }

    @property
    def detections(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, as evaluated, JSON-serialisable."""
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, (scores, category_ids, boxes) in self.results.items()
            for score, category_id, box in zip(scores, category_ids, boxes, strict=True)
        ]

    def summarize(self) -> list[float]:
        """COCO's 12 metrics, AP first; -1 if there are no objects, e.g. no small ones."""
        truth, found = COCO(), COCO()
        truth.dataset = self.dataset.ground_truth(set(self.results))
        found.dataset = {**truth.dataset, "annotations": self.detections}
        for i, detection in enumerate(found.dataset["annotations"], start=1):
            detection.update(id=i, area=detection["bbox"][2] * detection["bbox"][3])
        with redirect_stdout(io.StringIO()):
            truth.createIndex()
            found.createIndex()
            self._evaluation = COCOeval(truth, found, "bbox")
            self._evaluation.evaluate()
            self._evaluation.accumulate()
        with redirect_stdout(io.StringIO()) as output:
            self._evaluation.summarize()
        self._table = output.getvalue()
        return self._evaluation.stats.tolist()

    def table(self) -> str:
        """The 12 lines that COCO's evaluation prints for the last `summarize`."""
        return self._table

    def per_class(self) -> dict[str, float]:
        """{category name: AP} of the last `summarize`, without categories that have no objects."""
        names = {c["id"]: str(c.get("name", c["id"])) for c in self.dataset.categories}
        # (IoUs, recalls, categories), for objects of all sizes and 100 detections per image
        precision = self._evaluation.eval["precision"][:, :, :, 0, -1]
        ids, figures = self._evaluation.params.catIds, precision.mean(axis=(0, 1)).tolist()
        return {names[i]: ap for i, ap in zip(ids, figures, strict=True) if ap > -1}
