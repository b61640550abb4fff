"""Time of COCO's evaluation with each library: `python benchmarks/bench_coco_eval.py`."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets.coco import CocoDetection
from models.evaluation import CocoEvaluator, curves_by_hotcoco, curves_by_pycocotools

CLASSES, OBJECTS = 80, 7  # of COCO: its classes, and about as many objects in an image


def random_case(images: int, detections: int) -> tuple[CocoDetection, dict]:
    """A data set of images with OBJECTS boxes; detections that are moved copies of these, half
    of them of the same class."""
    generator = np.random.default_rng(0)
    boxes = generator.uniform(8, 240, (images, OBJECTS, 4)).round(2)
    classes = generator.integers(0, CLASSES, (images, OBJECTS))
    ids = np.repeat(np.arange(images), OBJECTS).tolist()
    rows = zip(ids, classes.flatten().tolist(), boxes.reshape(-1, 4).tolist(), strict=True)
    keys = "image_id", "category_id", "bbox"
    data = {
        "images": [{"id": i, "file_name": "image"} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in range(CLASSES)],
        "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "image").touch()
        path = Path(directory, "instances.json")
        path.write_text(json.dumps(data))
        dataset = CocoDetection(directory, path, None)
    results = {}
    for image in range(images):
        copied = generator.integers(0, OBJECTS, detections)
        found = boxes[image, copied] * generator.uniform(0.85, 1.15, (detections, 4))
        found[:, 2:] += found[:, :2]
        labels = generator.integers(0, CLASSES, detections)
        labels[::2] = classes[image, copied[::2]]
        results[image] = {
            "scores": torch.from_numpy(generator.beta(0.5, 4, detections)).float(),
            "labels": torch.from_numpy(labels),
            "boxes": torch.from_numpy(found).float(),
        }
    return dataset, results


def main() -> None:
    parser = argparse.ArgumentParser("bench_coco_eval.py", description="Time an evaluation.")
    parser.add_argument("--images", type=int, default=1000, metavar="N")
    parser.add_argument("--detections", type=int, default=300, metavar="N", help="in an image")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    args = parser.parse_args()
    dataset, results = random_case(args.images, args.detections)
    sides = {"pycocotools": curves_by_pycocotools, "hotcoco": curves_by_hotcoco}
    seconds, figures = {name: [] for name in sides}, []
    for _ in range(args.repetitions):
        for name, curves in sides.items():
            evaluator, start = CocoEvaluator(dataset, curves), time.perf_counter()
            for image_id, result in results.items():
                evaluator.update({image_id: result})
            updated = time.perf_counter()
            figures.append(evaluator.summarize())
            end = time.perf_counter()
            seconds[name].append((end - start, updated - start, end - updated))
    assert figures.count(figures[0]) == len(figures), "the libraries disagree"
    for name, times in seconds.items():
        whole, update, summarize = map(statistics.median, zip(*times, strict=True))
        print(f"{name}: {whole:.2f} s (update {update:.2f}, summarize {summarize:.2f})")
    print(f"medians of {args.repetitions}, same figures: AP {figures[0][0]!r}")


if __name__ == "__main__":
    main()
