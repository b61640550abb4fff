"""Pictures in; drawn pictures and COCO JSON out: `python inference.py --help`.

In a notebook, with `read_image` of datasets.coco and `draw_boxes` of util.visualize:

    detector, image = load_detector("outputs/run/checkpoint.pth"), read_image("street.jpg")
    (result,) = detector.detect([image])
    draw_boxes(image, **result, names=detector.class_map.names)
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image
from tqdm import trange

from datasets.coco import ClassMap, CocoDetection, build_dataset, read_image
from datasets.transforms import eval_transforms
from models import build_model
from util.checkpoint import load_weights, num_classes_of, read_checkpoint
from util.config import CONFIG_DIR, MODELS, Config, Parser, load_config
from util.distributed import choose_device
from util.errors import UserError
from util.logging import setup_logging
from util.visualize import draw_boxes, side_by_side

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass
class Detector:
    """A trained model and what it takes to use it; `load_detector` makes one.

    `nameless`: the checkpoint has no class map, so a label is taken for its category id.
    """

    model: nn.Module
    postprocess: nn.Module
    cfg: Config
    class_map: ClassMap
    nameless: bool

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], threshold: float = 0.3) -> list[dict[str, Tensor]]:
        """What is on images, (3, H_i, W_i) uint8 RGB, which go through the model as one batch.

        Returns for each image, on the CPU, "scores" (k,), at least `threshold` and best first,
        "labels" (k,), and "boxes" (k, 4) xyxy in pixels of that image, clipped to it.
        """
        transform = eval_transforms(self.cfg.data_aug_scales, self.cfg.data_aug_max_size)
        device = next(self.model.parameters()).device
        outputs = self.model([transform(tv_tensors.Image(image)).to(device) for image in images])
        sizes = torch.tensor([image.shape[-2:] for image in images])
        results = self.postprocess(outputs, sizes.to(device))
        for i, size in enumerate(sizes.tolist()):
            found = {key: value.cpu() for key, value in results[i].items()}
            found["boxes"] = clip_boxes_to_image(found["boxes"], size)
            known = torch.isin(found["labels"], torch.tensor(list(self.class_map.ids)))
            keep = known & (found["scores"] >= threshold)
            results[i] = {key: value[keep] for key, value in found.items()}
        return results


def load_detector(
    path: str | Path,
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> Detector:
    """A detector from a checkpoint. `ema`: take the averaged weights.

    config: a config file in place of the checkpoint's own config, which released ones lack.
    UserError where the checkpoint cannot be read, or config or weights do not fit.
    """
    checkpoint = read_checkpoint(path)
    if config is None and "config" not in checkpoint:
        raise UserError(f"{path}: holds no config; name the one it was trained with, by -c or -m")
    if ema and not checkpoint.get("ema_model"):
        raise UserError(f"{path}: holds no averaged weights (ema_model); leave out --ema")
    cfg = load_config(config) if config else load_config(overrides=checkpoint["config"])
    nameless = "class_map" not in checkpoint
    if nameless:
        count = num_classes_of(checkpoint) or 1  # without a class head, loading says what is wrong
        class_map = ClassMap.identity([{"id": i} for i in range(count)], count)
    else:
        class_map = ClassMap.from_state_dict(checkpoint["class_map"])
    cfg = replace(cfg, num_classes=class_map.num_classes)
    model, _, postprocess = build_model(cfg)
    load_weights(model, checkpoint["ema_model"] if ema else checkpoint, source=str(path))
    return Detector(model.to(device).eval(), postprocess, cfg, class_map, nameless)


def find_images(sources: Sequence[str]) -> list[Path]:
    """The files that are named, and directories' images in the order of their names."""
    paths = []
    for source in map(Path, sources):
        listed = source.iterdir() if source.is_dir() else ()
        found = sorted(path for path in listed if path.suffix.lower() in SUFFIXES)
        if source.is_dir() and not found:
            raise UserError(f"{source}: holds no images; known are {', '.join(SUFFIXES)}")
        paths += found or [source]
    return paths


def truth_of(dataset: CocoDetection, image_id: int) -> dict:
    """What is annotated on an image, crowds too, as `draw_boxes` takes it."""
    items = dataset.ground_truth({image_id})["annotations"]
    boxes = torch.tensor([a["bbox"] for a in items]).reshape(-1, 4)
    labels = [dataset.class_map.label_of[a["category_id"]] for a in items]
    crowd = [a["iscrowd"] for a in items]
    return {"boxes": box_convert(boxes, "xywh", "xyxy"), "labels": labels, "crowd": crowd}


def run(
    detector: Detector, paths: Sequence[Path], dataset: CocoDetection | None, args: Namespace
) -> None:
    """Detect on images; write each drawn and all of detections.json into `args.output_dir`.

    With a data set, `paths` are its first images, and are drawn beside their ground truth. The JSON
    is in COCO's format with scores: "images", "annotations" and "categories".
    """
    output_dir, threshold = args.output_dir, args.threshold
    if output_dir.resolve() in {path.parent.resolve() for path in paths}:
        raise UserError(f"output_dir: {output_dir} holds the images themselves; name another one")
    output_dir.mkdir(parents=True, exist_ok=True)
    ids, names = detector.class_map.ids, detector.class_map.names
    title = f"predictions, score ≥ {threshold:g}"
    unique = len({path.stem for path in paths}) == len(paths)
    images, annotations = [], []
    for start in trange(0, len(paths), args.eval_batch_size, desc="detect", disable=None):
        positions = range(len(paths))[start : start + args.eval_batch_size]
        batch = [dataset[i][0] if dataset else read_image(paths[i]) for i in positions]
        results = detector.detect(batch, threshold)
        for i, image, found in zip(positions, batch, results, strict=True):
            if dataset:
                id_ = dataset.image_ids[i]
                columns = {"ground truth": truth_of(dataset, id_), title: found}
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
    summary = f"{len(annotations)} detections of score {threshold} or more on {len(images)} images"
    print(f"{output_dir}: {summary}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for a mistake of the user."""
    setup_logging()
    parser = Parser("inference.py", description="Detect objects on images and draw them.")
    add = parser.add_argument
    add("--resume", required=True, metavar="FILE", help="checkpoint of the detector, or its URL")
    add("--images", nargs="+", metavar="PATH", help="images and directories of images")
    add("--coco_path", metavar="DIR", help="in their place: a data set, whose val2017 is used")
    add("--num_images", type=int, default=16, metavar="N", help="how many of val2017 (16)")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="pictures and JSON go here")
    add("--threshold", type=float, default=0.3, metavar="X", help="lowest score to show (0.3)")
    add("-c", "--config_file", metavar="FILE", help="config in place of the checkpoint's own")
    add("-m", "--modelname", choices=MODELS, help="that model's published config instead")
    add("--ema", action="store_true", help="take the averaged weights")
    add("--device", default="", help="cpu, cuda, ...; by default a GPU where there is one")
    add(
        "--eval_batch_size",
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="images at once (1)",
    )
    try:
        args = parser.parse_args(argv)
        if bool(args.images) == bool(args.coco_path):
            raise UserError("give either --images or --coco_path")
        if min(args.num_images, args.eval_batch_size) < 1 or not 0 <= args.threshold <= 1:
            raise UserError(
                "num_images and eval_batch_size are at least 1, threshold is from 0 to 1"
            )
        config = args.config_file
        if args.modelname:
            config = CONFIG_DIR / f"{MODELS[args.modelname]}.py"
        paths, dataset = find_images(args.images or []), None
        detector = load_detector(args.resume, config, choose_device(args.device), args.ema)
        if args.coco_path:
            cfg, class_map = replace(detector.cfg, coco_path=args.coco_path), detector.class_map
            if detector.nameless:
                class_map = partial(ClassMap.of_released, num_classes=class_map.num_classes)
            dataset = build_dataset(cfg, "val", class_map)
            dataset.transforms = lambda image, target: (image, target)  # `detect` has its own
            detector.class_map = dataset.class_map
            paths = [dataset.image_dir / name for name in dataset.file_names[: args.num_images]]
        run(detector, paths, dataset, args)
    except (UserError, OSError) as e:  # an OSError, of reading or writing a file, names the file
        print(f"inference.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
