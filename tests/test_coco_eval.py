"""COCO evaluation: metrics computed by hand, and agreement with direct use of pycocotools."""

import contextlib
import io
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco import CocoDetection
from models.class_map import ClassMap
from models.evaluation import CocoEvaluator, curves_by_hotcoco, curves_by_pycocotools

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]  # labels 0 and 1
ONE, ONES = pytest.approx(1), pytest.approx([1] * 5)  # COCOeval adds an epsilon to denominators


@pytest.fixture(params=[curves_by_hotcoco, curves_by_pycocotools])
def make(tmp_path, request):
    """make(annotations, image_ids): an evaluator over images of 200 x 200 pixels."""

    def make(annotations, image_ids=(1,), categories=CATEGORIES, **options):
        images = [{"id": i, "file_name": "1.png", "height": 200, "width": 200} for i in image_ids]
        Image.new("RGB", (200, 200)).save(tmp_path / "1.png")
        data = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "instances.json").write_text(json.dumps(data))
        dataset = CocoDetection(tmp_path, tmp_path / "instances.json", None, **options)
        return CocoEvaluator(dataset, request.param)

    return make


def truth(box, image_id=1, category_id=3, **fields):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), **fields}


def found(*rows):
    """Rows (score, label, x0, y0, x1, y1) as a detector's result."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"scores": rows[:, 0], "labels": rows[:, 1].long(), "boxes": rows[:, 2:]}


def plain_evaluation(data, detections, image_ids=None):
    """Stats of pycocotools, used as documented; the text that it prints; AP by category."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        coco = COCO()
        coco.dataset = json.loads(json.dumps(data))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(detections))), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = "".join(line for line in printed.getvalue().splitlines(True) if "@[" in line)
    figures = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1)).tolist()
    return (
        evaluation.stats.tolist(),
        table,
        dict(zip(evaluation.params.catIds, figures, strict=True)),
    )


def plain_stats(*args):
    return plain_evaluation(*args)[0]


def test_perfect_detections(make):
    evaluator = make([truth((10, 20, 100, 120)), truth((5, 5, 20, 20), 2, 7)], (1, 2))
    evaluator.update({1: found((0.9, 0, 10, 20, 110, 140)), 2: found((0.3, 1, 5, 5, 25, 25))})
    stats = evaluator.summarize()
    assert len(stats) == 12 and stats[:4] + stats[5:6] == ONES
    assert stats[4] == -1  # no medium objects
    assert evaluator.per_class() == pytest.approx({"dog": 1, "cat": 1})


def test_half_of_the_objects(make):
    evaluator = make([truth((0, 0, 50, 50)), truth((100, 100, 50, 50))])
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50))})
    # Precision 1 up to recall 0.5: 51 of the curve's 101 points.
    assert evaluator.summarize()[0] == pytest.approx(51 / 101)


def test_higher_scored_false_positive_halves_the_ap(make):
    evaluator = make([truth((0, 0, 50, 50))])
    evaluator.update({1: found((0.9, 0, 100, 100, 150, 150), (0.8, 0, 0, 0, 50, 50))})
    assert evaluator.summarize()[0] == pytest.approx(0.5)


def test_duplicate_detection_is_a_false_positive(make):
    evaluator = make([truth((0, 0, 50, 50)), truth((100, 100, 50, 50))])
    boxes = ((0, 0, 50, 50), (0, 0, 50, 50), (100, 100, 150, 150))
    evaluator.update({1: found(*((0.9 - i / 10, 0, *box) for i, box in enumerate(boxes)))})
    # Precision 1 up to recall 0.5, then 2 of 3.
    assert evaluator.summarize()[0] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_iou_decides_the_thresholds_a_box_meets(make):
    evaluator = make([truth((0, 0, 100, 100))])
    evaluator.update({1: found((0.9, 0, 0, 0, 62, 100))})  # IoU 0.62: over 0.5, 0.55 and 0.6
    assert evaluator.summarize()[:3] == pytest.approx([0.3, 1, 0])


def test_ap_averages_only_classes_with_objects(make):
    annotations = [truth((0, 0, 50, 50)), truth((100, 100, 50, 50), category_id=7)]
    evaluator = make(annotations)
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50), (0.9, 0, 100, 100, 150, 150))})
    assert evaluator.summarize()[0] == pytest.approx(0.5)
    assert evaluator.per_class() == pytest.approx({"dog": 1, "cat": 0})
    evaluator = make(annotations[:1])
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50), (0.9, 1, 100, 100, 150, 150))})
    assert evaluator.summarize()[0] == ONE and evaluator.per_class() == {"dog": ONE}


def test_boxes_in_a_crowd_are_not_false_positives(make):
    for crowd in (0, 1):
        evaluator = make([truth((0, 0, 50, 50)), truth((100, 0, 100, 200), iscrowd=crowd)])
        rows = [(0.9, 0, 110, y, 130, y + 20) for y in (0, 50, 100)]
        evaluator.update({1: found(*rows, (0.5, 0, 0, 0, 50, 50))})
        ap = evaluator.summarize()[0]
        assert ap == ONE if crowd else ap < 0.2


def random_case(generator, images=12):
    """Annotations and detections, some of which match."""
    annotations, results = [], {}
    for image_id in range(1, images + 1):
        rows = []
        for _ in range(generator.integers(0, 6)):
            box = np.concatenate([generator.uniform(0, 100, 2), generator.uniform(5, 100, 2)])
            category = int(generator.choice([3, 7]))
            annotations.append(
                truth(box.round(2).tolist(), image_id, category)
                | {"id": len(annotations) + 1, "area": float(box[2:].prod() * 0.7)}
                | {"iscrowd": int(generator.random() < 0.15)}
            )
            for _ in range(generator.integers(0, 3)):
                x, y, w, h = box * generator.uniform(0.8, 1.2, 4)
                score = generator.random()
                rows.append((score, int(generator.random() < 0.5), x, y, x + w, y + h))
        results[image_id] = found(*rows)
    return annotations, results


def test_agrees_with_pycocotools(make):
    generator = np.random.default_rng(0)
    for _ in range(4):
        annotations, results = random_case(generator)
        evaluator = make(annotations, range(1, 13))
        evaluator.update(results)
        data = {"images": [{"id": i} for i in range(1, 13)], "annotations": annotations}
        data["categories"] = CATEGORIES
        stats = evaluator.summarize()
        assert stats == plain_stats(data, evaluator.detections) and 0 < stats[0] < 1
        # Rounding is harmless: unrounded float32 values give the same.
        exact = [
            {"image_id": i, "category_id": (3, 7)[label], "score": score}
            | {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i, result in results.items()
            for score, label, (x0, y0, x1, y1) in zip(
                *(result[key].tolist() for key in ("scores", "labels", "boxes")), strict=True
            )
        ]
        assert stats == pytest.approx(plain_stats(data, exact), abs=1e-3)
        assert len(evaluator.detections) == len(exact)


IMAGE_IDS = [0, -3, 9, 4, 2**60 + 1, 2**60 + 2]  # in floats, the last two are one
SPARSE = [{"id": i, "name": f"class {i}"} for i in (1000, 0, -2, 7, 50)]  # without objects: 50


def edge_case(generator):
    """Crowds, equal boxes and scores, missing areas, those on the limits between sizes, empty
    boxes, images without objects or detections, over 100 detections of a class in an image, and
    categories that only the model has (5, 6)."""
    annotations, results = [], {}
    categories = [1000, 0, -2, 7, 5]
    for image_id in IMAGE_IDS:
        objects = generator.integers(0, 8) * (generator.random() < 0.8)
        boxes = generator.integers(0, 60, (objects + 5, 4)).astype(float)
        boxes[:, 2:] = generator.choice([0, 16, 32, 33, 96, 97], (objects + 5, 2))
        boxes[1::3] = boxes[::3][: len(boxes[1::3])]
        kinds = generator.integers(0, 5, objects)
        for box, kind in zip(boxes[:objects].tolist(), kinds, strict=True):
            more = {"iscrowd": int(generator.random() < 0.2)}
            if area := generator.choice([None, 0, 100, 32**2, 96**2, 96**2 + 1]):
                more["area"] = area
            annotations.append(truth(box, image_id, categories[kind], **more))
        count = generator.choice([0, 3, 40, 600])
        chosen = generator.integers(0, len(boxes), count)
        xywh = boxes[chosen] + generator.integers(-2, 3, (count, 4)) * (generator.random() < 0.7)
        xywh[:, 2:] = xywh[:, 2:].clip(0)
        labels = generator.integers(0, 7, count)  # 6: the model knows no category of that label
        labels = np.where(chosen % 2, labels, np.resize([*kinds, 0], len(boxes))[chosen])
        scores = generator.choice([0.1, 0.25, 0.7, generator.random()], count)
        rows = [scores, labels, *xywh[:, :2].T, *(xywh[:, :2] + xywh[:, 2:]).T]
        results[image_id] = found(*np.stack(rows, 1).tolist())
    return annotations, results


def test_agrees_with_pycocotools_in_edge_cases(make, capfd):
    generator, figures = np.random.default_rng(2), set()
    known = dict(enumerate([1000, 0, -2, 7, 5, 50]))
    known = ClassMap(7, known, {label: f"class {id_}" for label, id_ in known.items()})
    for _ in range(30):
        annotations, results = edge_case(generator)
        if not any(len(result["scores"]) for result in results.values()):
            continue  # pycocotools cannot load these
        evaluator = make(annotations, IMAGE_IDS, SPARSE, class_map=known)
        capfd.readouterr()  # warnings about its boxes
        for image_id in generator.permutation(IMAGE_IDS).tolist():
            evaluator.update({image_id: results[image_id]})
        usable = [
            {"id": i, "area": a["bbox"][2] * a["bbox"][3], **a}
            for i, a in enumerate(annotations, start=1)
            if min(a["bbox"][2:]) > 0
        ]
        data = {"images": [{"id": i} for i in IMAGE_IDS], "annotations": usable}
        data["categories"] = SPARSE
        stats, table, by_category = plain_evaluation(data, evaluator.detections)
        assert evaluator.summarize() == stats and evaluator.table() == table
        by_name = {f"class {i}": ap for i, ap in by_category.items() if ap > -1}
        assert list(evaluator.per_class().items()) == list(by_name.items())
        figures.update(stats)
        assert capfd.readouterr() == ("", "")
    assert len(figures) > 100


def test_pycocotools_replaces_a_missing_hotcoco(make, monkeypatch):
    dataset = make([truth((0, 0, 50, 50))]).dataset
    assert CocoEvaluator(dataset).curves is curves_by_hotcoco
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # its import fails
    module = runpy.run_module("models.evaluation")
    evaluator = module["CocoEvaluator"](dataset)
    assert evaluator.curves is module["curves_by_pycocotools"]
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50))})
    assert evaluator.summarize()[0] == ONE


def test_only_updated_images_count_and_results_can_be_merged(make):
    annotations, results = random_case(np.random.default_rng(1))
    data = {"images": [{"id": i} for i in range(1, 13)], "annotations": annotations}
    data["categories"] = CATEGORIES
    halves = [{i: results[i] for i in ids} for ids in (range(1, 8), range(6, 13))]
    first, second = make(annotations, range(1, 13)), make(annotations, range(1, 13))
    first.update(halves[0])
    second.update(halves[1])
    assert first.summarize() == plain_stats(data, first.detections, list(range(1, 8)))
    first.results.update(second.results)  # two images are in both
    whole = make(annotations, range(1, 13))
    whole.update(results)
    assert first.summarize() == whole.summarize()


def test_table_has_the_standard_format_and_is_not_printed(make, capfd):
    evaluator = make([truth((0, 0, 50, 50))])
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50))})
    evaluator.summarize()
    lines = evaluator.table().splitlines()
    assert len(lines) == 12
    assert lines[0] == (
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000"
    )
    assert "Recall" in lines[11] and capfd.readouterr() == ("", "")


def test_no_detections(make):
    evaluator = make([truth((0, 0, 50, 50))], (1, 2))
    evaluator.update({1: found(), 2: found()})
    stats = evaluator.summarize()
    assert stats[0] == stats[1] == stats[4] == stats[8] == 0 and max(stats) == 0
    assert evaluator.detections == [] and evaluator.per_class() == {"dog": 0}


def test_images_without_objects(make):
    evaluator = make([truth((0, 0, 50, 50))], (1, 2))
    evaluator.update({1: found((0.9, 0, 0, 0, 50, 50)), 2: found()})
    assert evaluator.summarize()[0] == ONE
    evaluator.update({2: found((0.95, 0, 0, 0, 50, 50))})  # a false positive there counts
    assert evaluator.summarize()[0] == pytest.approx(0.5)
    evaluator.results = {2: evaluator.results[2]}
    assert evaluator.summarize() == [-1] * 12 and evaluator.per_class() == {}
    evaluator.results.clear()
    assert evaluator.summarize() == [-1] * 12 and evaluator.detections == []


def test_incomplete_and_invalid_annotations(make):
    nan = float("nan")
    annotations = [
        truth((0, 0, 50, 50), id=0),  # COCOeval treats id 0 as "unmatched"
        truth((100, 100, 50, 50), id=0, area=nan),
        truth((0, 100, 40, 40)),
        truth((nan, 0, 50, 50)),
        truth((20, 20, 0, 50), area=0),
    ]
    evaluator = make(annotations)
    boxes = ((0, 0, 50, 50), (100, 100, 150, 150), (0, 100, 40, 140))
    evaluator.update({1: found(*((0.9, 0, *box) for box in boxes))})
    stats = evaluator.summarize()
    assert stats[0] == stats[4] == ONE  # all three are medium
    truths = evaluator.dataset.ground_truth({1})
    assert truths["area"].tolist() == [2500, 2500, 1600]
    assert truths["iscrowd"].tolist() == [0, 0, 0]


def test_nonfinite_detections_are_dropped(make):
    nan = float("nan")
    evaluator = make([truth((0, 0, 50, 50))])
    evaluator.update({1: found((0.9, 0, nan, nan, nan, nan), (nan, 0, 0, 0, 50, 50))})
    assert evaluator.summarize()[0] == 0 and evaluator.detections == []


def test_detections_are_in_coco_results_format(make):
    evaluator = make([truth((0, 0, 50, 50))])
    rows = ((1 / 3, 1, 0.12345, 1, 10.5, 2), (0.5, 0, 1, 2, 3, 5), (0.9, 2, 0, 0, 1, 1))
    evaluator.update({1: {key: value.to("cpu") for key, value in found(*rows).items()}})
    first, second = json.loads(json.dumps(evaluator.detections))  # label 2 has no category
    assert second == {"image_id": 1, "category_id": 3, "bbox": [1, 2, 2, 3], "score": 0.5}
    assert first["category_id"] == 7 and first["bbox"] == [0.123, 1, 10.377, 1]
    assert first["score"] == pytest.approx(1 / 3, abs=1e-7) and len(str(first["score"])) <= 10


def test_half_precision_results(make):
    evaluator = make([truth((0, 0, 50, 50))])
    result = found((0.5, 0, 0, 0, 50, 50))
    result.update({key: result[key].bfloat16() for key in ("scores", "boxes")})
    evaluator.update({1: result})
    assert evaluator.summarize()[0] == ONE
