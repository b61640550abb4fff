"""Detect objects in images, draw them, and write COCO JSON: `python inference.py --help`.

In a notebook, with the functions imported below:

    predictor, image = load_detector("outputs/run/checkpoint.pth"), read_image("street.jpg")
    (result,) = predictor.predict([image])
    draw_boxes(image, **result, names=predictor.class_map.names)
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torchvision.ops import box_convert
from tqdm import trange

from datasets.coco import CocoDetection, build_dataset, read_image
from models.class_map import ClassMap
from models.cli import Parser
from models.errors import UserError
from models.predictor import Predictor, load_detector
from models.registry import MODELS
from util.config import CONFIG_DIR, Config, load_config
from util.distributed import choose_device
from util.download import local_file
from util.logging import setup_logging
from util.visualize import draw_boxes, side_by_side

DESCRIPTION = "Detect objects, draw them and write detections.json. Defaults are in parentheses."
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def find_images(sources: Sequence[str]) -> list[Path]:
    """The given files, and the images in given directories, sorted by name."""
    paths = []
    for source in map(Path, sources):
        files = source.iterdir() if source.is_dir() else ()
        found = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
        if source.is_dir() and not found:
            raise UserError(f"{source}: holds no images with suffixes {', '.join(SUFFIXES)}")
        paths += found or [source]
    return paths


def detect(
    predictor: Predictor, paths: Sequence[Path], dataset: CocoDetection | None, args: Namespace
) -> None:
    """Detect objects; write drawn images, and COCO's instances format with scores as JSON. With a
    data set, `paths` are its first images, drawn next to their ground truth."""
    output_dir, threshold = args.output_dir, args.threshold
    if output_dir.resolve() in {path.parent.resolve() for path in paths}:
        raise UserError(f"output_dir: {output_dir} contains the input images; use another one")
    output_dir.mkdir(parents=True, exist_ok=True)
    ids, names = predictor.class_map.ids, predictor.class_map.names
    title = f"predictions, score ≥ {threshold:g}"
    unique = len({path.stem for path in paths}) == len(paths)
    images, annotations = [], []
    for start in trange(0, len(paths), args.eval_batch_size, desc="detect", disable=None):
        positions = range(len(paths))[start : start + args.eval_batch_size]
        batch = [dataset[i][0] if dataset else read_image(paths[i]) for i in positions]
        results = predictor.predict(batch, threshold)
        for i, image, found in zip(positions, batch, results, strict=True):
            if dataset:
                id_ = int(dataset.image_ids[i])
                columns = {"ground truth": dataset.drawable_truth(id_), title: found}
                picture = side_by_side(image, columns, names)
            else:
                id_, picture = i + 1, draw_boxes(image, **found, names=names)
            name = f"{paths[i].stem}.jpg" if unique else f"{id_}_{paths[i].stem}.jpg"
            picture.save(output_dir / name, quality=92, subsampling=0)
            size = dict(zip(("height", "width"), image.shape[-2:], strict=True))
            images.append({"id": id_, "file_name": str(paths[i]), **size, "picture": name})
            boxes = box_convert(found["boxes"].double(), "xyxy", "xywh").round(decimals=3)
            rows = boxes.tolist(), found["labels"].tolist(), found["scores"].tolist()
            for box, label, score in zip(*rows, strict=True):
                entry = {"id": len(annotations) + 1, "image_id": id_, "category_id": ids[label]}
                extent = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append({**entry, **extent, "score": score})
    categories = [{"id": id_, "name": names[label]} for label, id_ in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (output_dir / "detections.json").write_text(json.dumps(content))
    summary = f"{len(annotations)} detections with score {threshold} or more"
    print(f"{output_dir}: {summary} in {len(images)} images")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user error."""
    setup_logging()
    parser = Parser("inference.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--resume", required=True, metavar="FILE", help="checkpoint, a file or URL")
    add("--images", nargs="+", metavar="PATH", help="images or directories of images")
    add("--coco_path", metavar="DIR", help="data set, to use its val2017 instead of --images")
    add("--num_images", type=int, default=16, metavar="N", help="images of val2017 (16)")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="output directory")
    add("--threshold", type=float, default=0.3, metavar="X", help="minimum score (0.3)")
    add("-c", "--config_file", metavar="FILE", help="config to use, not the checkpoint's")
    text = f"use this model's published config: {', '.join(MODELS)}"
    add("-m", "--modelname", choices=MODELS, metavar="NAME", help=text)
    add("--ema", action="store_true", help="use the averaged weights (EMA)")
    add("--device", default="", help="cpu, cuda, ...; default: a GPU if available")
    batch_size = "--eval_batch_size", "--batch_size"
    add(*batch_size, type=int, default=1, metavar="N", help="images per batch (1)")
    try:
        args = parser.parse_args(argv)
        if bool(args.images) == bool(args.coco_path):
            raise UserError("pass either --images or --coco_path")
        if min(args.num_images, args.eval_batch_size) < 1 or not 0 <= args.threshold <= 1:
            raise UserError("num_images, eval_batch_size: at least 1; threshold: from 0 to 1")
        config = args.config_file
        if args.modelname:
            config = CONFIG_DIR / f"{MODELS[args.modelname].config}.py"
        paths, dataset = find_images(args.images or []), None
        values = vars(load_config(config)) if config else None
        device = choose_device(args.device)
        predictor = load_detector(local_file(args.resume), values, device, args.ema)
        if args.coco_path:
            class_map = predictor.class_map
            if predictor.labels_are_ids:
                class_map = partial(ClassMap.of_released, num_classes=class_map.num_classes)
            dataset = build_dataset(Config(coco_path=args.coco_path), "val", class_map)
            dataset.transforms = lambda image, target: (image, target)  # `predict` preprocesses
            predictor.class_map = dataset.class_map
            count = min(args.num_images, len(dataset))
            paths = [dataset.image_dir / dataset.file_name(i) for i in range(count)]
        detect(predictor, paths, dataset, args)
    except (UserError, OSError) as e:  # an OSError names its file
        print(f"inference.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
