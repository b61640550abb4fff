"""The mapping between the labels of a model and the categories of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError

COCO_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_NAMES = (  # noqa: SIM905  in the order of their ids
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
COCO = dict(zip(sorted(COCO_IDS), COCO_NAMES, strict=True))  # {category id: name}
COCO_NUM_CLASSES = 91  # published models use category ids as labels; some stay unused


@dataclass(frozen=True)
class ClassMap:
    """Maps a model's labels 0 .. num_classes - 1 to the categories of a data set.

    ids: {label: category id}; names: {label: category name}. Labels without a category are absent.
    """

    num_classes: int
    ids: dict[int, int]
    names: dict[int, str]

    @property
    def label_of(self) -> dict[int, int]:
        """{category id: label}."""
        return {category_id: label for label, category_id in self.ids.items()}

    def labels_in(self, other: ClassMap) -> dict[int, int]:
        """{label: `other`'s label of the same name, whatever its case}, where there is one."""
        label_of = {name.casefold(): label for label, name in other.names.items()}
        named = ((label, name.casefold()) for label, name in self.names.items())
        return {label: label_of[name] for label, name in named if name in label_of}

    @classmethod
    def from_categories(cls, categories: list[dict], num_classes: int | None = None) -> ClassMap:
        """Use COCO's 80 ids, and any ids below 91 if `num_classes` is 91, as labels, to match
        released checkpoints; number other ids in ascending order. UserError if `num_classes` is
        less than the number of categories.
        """
        ids = {c["id"] for c in categories}
        count = num_classes or (COCO_NUM_CLASSES if ids == COCO_IDS else len(ids))
        unchanged = cls.identity(categories, count)
        is_coco = ids == COCO_IDS and count >= COCO_NUM_CLASSES
        if is_coco or (count == COCO_NUM_CLASSES and ids <= set(range(count))):
            return unchanged
        if count < len(ids):
            problem = f"num_classes is {count}, but there are {len(ids)} categories"
            raise UserError(f"{problem}: set num_classes to {len(ids)} or more, or omit it")
        names = unchanged.names.values()
        return cls(count, dict(enumerate(unchanged.ids)), dict(enumerate(names)))

    @classmethod
    def identity(cls, categories: list[dict], num_classes: int, first: int = 0) -> ClassMap:
        """Label = category id, or that less `first`."""
        names = {c["id"] - first: str(c.get("name", c["id"])) for c in categories}
        names = dict(sorted(names.items()))
        return cls(num_classes, {i: i + first for i in names}, names)

    @classmethod
    def of_released(cls, categories: list[dict], num_classes: int, first: int = 0) -> ClassMap:
        """For a checkpoint without a class map: use ids as labels, like the released code, or
        number them in ascending order if one is not a label of the model."""
        if all(0 <= c["id"] - first < num_classes for c in categories):
            return cls.identity(categories, num_classes, first)
        return cls.from_categories(categories, num_classes)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> ClassMap:
        """Labels with these names, "N/A" for an unused one. COCO's 80 names stand for its ids,
        whether alone or at the places of the ids among 91; other labels serve as ids."""
        ids = {label: label for label, name in enumerate(names) if name != "N/A"}
        if list(names) == COCO_NAMES:
            ids = dict(enumerate(COCO))
        elif len(names) == COCO_NUM_CLASSES and all(names[id_] == n for id_, n in COCO.items()):
            ids = {id_: id_ for id_ in COCO}
        return cls(len(names), ids, {label: str(names[label]) for label in ids})

    @classmethod
    def of_count(cls, num_classes: int) -> ClassMap:
        """The labels of a model about which only their number is known: 80 and 91 are COCO's."""
        names = [COCO.get(label, "N/A") for label in range(COCO_NUM_CLASSES)]
        known = {len(COCO): COCO_NAMES, COCO_NUM_CLASSES: names}
        return cls.of_names(known.get(num_classes, [f"class {i}" for i in range(num_classes)]))

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists only, for checkpoints and JSON."""
        rows = [[label, id_, self.names[label]] for label, id_ in self.ids.items()]
        return {"num_classes": self.num_classes, "categories": rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ClassMap:
        rows = state["categories"]
        ids, names = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
        return cls(state["num_classes"], ids, names)
