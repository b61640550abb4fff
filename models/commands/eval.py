"""Evaluate a checkpoint on a data set in COCO's format: COCO's 12 figures, as `main.py --eval`.

Example:
  dn-dino eval checkpoint.pth --coco_path COCO
  dn-dino eval checkpoint.pth --images photos --annotations photos/instances.json
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError, import_extra
from .common import add_detector_arguments, load, read_annotations


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_arguments(parser)
    add = parser.add_argument
    add("--coco_path", type=Path, metavar="DIR", help="data set in COCO 2017's layout")
    add("--split", default="val2017", metavar="NAME", help="its images and annotations (val2017)")
    add("--images", type=Path, metavar="DIR", help="directory of images, for another layout")
    add("--annotations", type=Path, metavar="FILE", help="its instances file")


def run(args: Namespace) -> None:
    if bool(args.coco_path) == bool(args.images and args.annotations):
        raise UserError("pass either --coco_path, or --images and --annotations")
    import_extra("pycocotools", "eval")
    from ..evaluation import CocoEvaluator

    folder, annotations = args.images, args.annotations
    if args.coco_path:
        folder = args.coco_path / args.split
        annotations = args.coco_path / "annotations" / f"instances_{args.split}.json"
    predictor = load(args)
    dataset = read_annotations(predictor, folder, annotations)
    evaluator, ids = CocoEvaluator(dataset), dataset.image_ids.tolist()
    images = ((id_, dataset.image(i)) for i, id_ in enumerate(ids))
    results = predictor.batched(images, args.batch_size)
    for id_, _, result in tqdm(results, "evaluate", len(dataset), disable=None):
        evaluator.update({id_: result})
    evaluator.summarize()
    print(evaluator.table(), end="")
