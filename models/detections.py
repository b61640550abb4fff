"""The objects that a detector found on an image."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from .class_map import ClassMap
from .draw import draw_boxes
from .errors import import_extra
from .masks import encode


@dataclass(eq=False, repr=False)
class Detections:
    """k objects on an image, the best first.

    boxes (k, 4) xyxy in pixels of the image, scores (k,) and labels (k,), on the CPU; `image` is
    (3, H, W) uint8 RGB, and `source` its name. `found["boxes"]` and `**found` work as well.
    masks (k, H, W), bool, are those of a detector with a mask head.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_map: ClassMap
    image: Tensor
    source: str
    masks: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.class_map.names[label] for label in self.labels.tolist()]

    def draw(self) -> Image.Image:
        """The image with boxes, masks and captions; images below 640 pixels are enlarged."""
        return draw_boxes(self.image, **self, names=self.class_map.names)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """The objects in COCO's results format, with the data set's category ids. Areas are those
        of the masks, if there are any."""
        boxes = box_convert(self.boxes.double(), "xyxy", "xywh").round(decimals=3).tolist()
        rows = zip(boxes, self.labels.tolist(), self.scores.tolist(), strict=True)
        found = [
            {
                "image_id": image_id,
                "category_id": self.class_map.ids[label],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
            for box, label, score in rows
        ]
        if self.masks is not None:
            areas = self.masks.sum((1, 2)).tolist()
            for row, rle, area in zip(found, encode(self.masks), areas, strict=True):
                row.update(segmentation=rle, area=area)
        return found

    def to_supervision(self) -> Any:
        """As `supervision.Detections`: `class_id` is the label, `data["class_name"]` its name."""
        supervision = import_extra("supervision", "supervision")
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            mask=None if self.masks is None else self.masks.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    __iter__ = None  # neither over keys nor over objects

    def keys(self) -> tuple[str, ...]:
        return ("boxes", "labels", "scores", "masks")[: 3 + (self.masks is not None)]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        found = ", ".join(f"{count} {name}" for name, count in counts) or "nothing"
        height, width = self.image.shape[-2:]
        return f"Detections({self.source}, {width} x {height}: {found})"

    def __str__(self) -> str:
        rows = zip(self.names, self.scores.tolist(), self.boxes.round().int().tolist(), strict=True)
        lines = [f"  {score:.2f}  {name}  {tuple(box)}" for name, score, box in rows]
        return "\n".join([repr(self), *lines])
