"""Between the labels of a model and the categories of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UserError

COCO_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_NUM_CLASSES = 91  # in the published models a label is the category id; unused ids stay empty


@dataclass(frozen=True)
class ClassMap:
    """Between a model's labels 0 .. num_classes - 1 and the categories of a data set.

    ids: {label: category id}; names: {label: category name}. Labels without category are absent.
    """

    num_classes: int
    ids: dict[int, int]
    names: dict[int, str]

    @property
    def label_of(self) -> dict[int, int]:
        """{category id: label}."""
        return {category_id: label for label, category_id in self.ids.items()}

    @classmethod
    def from_categories(cls, categories: list[dict], num_classes: int | None = None) -> ClassMap:
        """COCO's 80 ids, and any below 91 if 91 classes are asked for, are used as labels, so that
        released checkpoints fit; other ids are numbered in ascending order. `num_classes` may
        exceed the number of categories; if it is smaller: UserError.
        """
        ids = {c["id"] for c in categories}
        count = num_classes or (COCO_NUM_CLASSES if ids == COCO_IDS else len(ids))
        unchanged = cls.identity(categories, count)
        is_coco = ids == COCO_IDS and count >= COCO_NUM_CLASSES
        if is_coco or (count == COCO_NUM_CLASSES and ids <= set(range(count))):
            return unchanged
        if count < len(ids):
            problem = f"num_classes is {count}, but there are {len(ids)} categories"
            raise UserError(f"{problem}: set num_classes to {len(ids)} or more, or leave it out")
        names = unchanged.names.values()
        return cls(count, dict(enumerate(unchanged.ids)), dict(enumerate(names)))

    @classmethod
    def identity(cls, categories: list[dict], num_classes: int) -> ClassMap:
        """Label = category id."""
        names = {c["id"]: str(c.get("name", c["id"])) for c in categories}
        names = dict(sorted(names.items()))
        return cls(num_classes, {i: i for i in names}, names)

    @classmethod
    def of_released(cls, categories: list[dict], num_classes: int) -> ClassMap:
        """For a model whose checkpoint carries no map: ids are labels, as in the released code, or
        numbered in ascending order where one of them is no label of the model."""
        if all(0 <= c["id"] < num_classes for c in categories):
            return cls.identity(categories, num_classes)
        return cls.from_categories(categories, num_classes)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for checkpoints and JSON."""
        rows = [[label, id_, self.names[label]] for label, id_ in self.ids.items()]
        return {"num_classes": self.num_classes, "categories": rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ClassMap:
        rows = state["categories"]
        ids, names = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
        return cls(state["num_classes"], ids, names)
