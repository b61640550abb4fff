"""COCO's box evaluation, by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.coco import CocoDetection


class CocoEvaluator:
    """Collects detections and evaluates them against the data set's own annotations.

    Only the images in `results` are evaluated, so a part of the data set may be.
    """

    def __init__(self, dataset: CocoDetection):
        self.dataset = dataset
        # {image id: (k scores, k category ids, k boxes [x, y, width, height])}
        self.results: dict[int, tuple[list[float], list[int], list[list[float]]]] = {}

    def update(self, results: dict[int, dict[str, Tensor]]) -> None:
        """results: {image id: {"scores" (k,), "labels" (k,), "boxes" (k, 4) xyxy in pixels}}.

        Left out are labels without a category, and scores or boxes that are not finite: COCOeval
        would take an overlap of NaN for a match.
        """
        ids = self.dataset.class_map.ids
        for image_id, result in results.items():
            labels = result["labels"].cpu().numpy()
            scores, boxes = (result[key].double().cpu().numpy() for key in ("scores", "boxes"))
            keep = np.isin(labels, list(ids)) & np.isfinite(scores) & np.isfinite(boxes).all(1)
            scores, labels, boxes = scores[keep], labels[keep], boxes[keep]
            boxes[:, 2:] -= boxes[:, :2]
            category_ids = [ids[label] for label in labels.tolist()]
            # As many digits as float32 scores have, and more than boxes do.
            rounded = scores.round(8).tolist(), category_ids, boxes.round(3).tolist()
            self.results[int(image_id)] = rounded

    def join(self, parts: Sequence[dict[int, tuple]]) -> None:
        """Take over the `results` of several processes, in the data set's order, on which the
        figures depend where scores are equal."""
        together = {id_: result for part in parts for id_, result in part.items()}
        self.results = {id_: together[id_] for id_ in self.dataset.image_ids if id_ in together}

    @property
    def detections(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, as they are evaluated, and ready for JSON."""
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, (scores, category_ids, boxes) in self.results.items()
            for score, category_id, box in zip(scores, category_ids, boxes, strict=True)
        ]

    def summarize(self) -> list[float]:
        """Evaluates; COCO's 12 figures, AP first, -1 for what has no object (say, no small one)."""
        images = self.dataset.ground_truth(set(self.results))
        boxes = [
            {**detection, "id": i, "area": detection["bbox"][2] * detection["bbox"][3]}
            for i, detection in enumerate(self.detections, start=1)
        ]
        truth, found = COCO(), COCO()
        with redirect_stdout(io.StringIO()):
            for coco, annotations in ((truth, images["annotations"]), (found, boxes)):
                coco.dataset = {**images, "annotations": annotations}
                coco.createIndex()
            self._evaluation = COCOeval(truth, found, "bbox")
            self._evaluation.evaluate()
            self._evaluation.accumulate()
        with redirect_stdout(io.StringIO()) as printed:
            self._evaluation.summarize()
        self._table = printed.getvalue()
        return self._evaluation.stats.tolist()

    def table(self) -> str:
        """What COCO's evaluation prints of the last `summarize`: 12 lines."""
        return self._table

    def per_class(self) -> dict[str, float]:
        """{category name: AP} of the last `summarize`; categories without an object are absent."""
        names = {c["id"]: str(c.get("name", c["id"])) for c in self.dataset.categories}
        # (IoUs, recalls, categories), for objects of any size and 100 detections an image
        precision = self._evaluation.eval["precision"][:, :, :, 0, -1]
        return {
            names[category_id]: float(precision[:, :, k].mean())
            for k, category_id in enumerate(self._evaluation.params.catIds)
            if precision[0, 0, k] > -1
        }
