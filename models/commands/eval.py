"""Evaluate a checkpoint on a data set in COCO's format: COCO's 12 figures of boxes. `main.py
--eval` prints the same, and with `--masks` those of masks.

Example:
  dn-dino eval checkpoint.pth --coco_path COCO
  dn-dino eval checkpoint.pth --images photos --annotations photos/instances.json
  dn-dino eval checkpoint.pth --coco_path COCO --eval_report report
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .. import report
from ..coco import CocoAnnotations
from ..errors import UserError, import_extra
from ..predictor import Predictor
from .common import add_detector_arguments, load, read_annotations, read_split

if TYPE_CHECKING:
    from ..evaluation import CocoEvaluator


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_arguments(parser)
    add = parser.add_argument
    add("--coco_path", type=Path, metavar="DIR", help="data set in COCO 2017's layout")
    add("--split", default="val2017", metavar="NAME", help="its images and annotations (val2017)")
    add("--images", type=Path, metavar="DIR", help="directory of images, for another layout")
    add("--annotations", type=Path, metavar="FILE", help="its instances file")
    text = "write a page about errors there: curves, confusions, calibration, the worst images"
    add("--eval_report", type=Path, metavar="DIR", help=text)


def evaluate(
    predictor: Predictor, dataset: CocoAnnotations, batch_size: int = 1
) -> "CocoEvaluator":
    """All detections on a data set, after `summarize`. Batches have images of equal size."""
    import_extra("pycocotools", "eval")
    from ..evaluation import CocoEvaluator

    evaluator = CocoEvaluator(dataset)
    images = ((id_, dataset.image(i)) for i, id_ in enumerate(dataset.image_ids.tolist()))
    results = predictor.batched(images, batch_size)
    for id_, _, result in tqdm(results, "evaluate", len(dataset), unit="image", disable=None):
        evaluator.update({id_: result})
    evaluator.summarize()
    return evaluator


def run(args: Namespace) -> None:
    if bool(args.coco_path) == bool(args.images and args.annotations):
        raise UserError("pass either --coco_path, or --images and --annotations")
    if args.eval_report:
        report.prepare(args.eval_report)
    predictor = load(args)
    if args.coco_path:
        dataset = read_split(predictor, args.coco_path, args.split)
    else:
        dataset = read_annotations(predictor, args.images, args.annotations)
    evaluator = evaluate(predictor, dataset, args.batch_size)
    print(evaluator.table(), end="")
    if args.eval_report:
        name = args.checkpoint + " (EMA)" * args.ema
        print(report.write_report(evaluator, args.eval_report, name))
