"""Print what a checkpoint contains: its origin, model, size, classes and unusual options. Or draw
where the queries of each decoder layer look on an image, which tokens were selected as queries, and
what denoising makes of the image's objects, as in training.

Examples:
  dn-dino inspect checkpoint.pth
  dn-dino inspect checkpoint.pth --image street.jpg --output street --queries 17 3
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build import config_dir, read_config
from ..class_map import ClassMap
from ..download import local_file
from ..errors import UserError
from ..images import read_image
from ..options import DetectorOptions
from ..predictor import Predictor
from ..registry import MODELS
from ..weights import num_classes_of, read_checkpoint, state_dict_of
from .common import add_detector_arguments, load, read_annotations

# Options that say nothing about a trained detector, or are printed by themselves.
OMITTED = ("modelname", "num_classes", "pretrained_backbone", "backbone_weights", "backbone_dir")


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_arguments(parser, batch_size=None)
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE", help="draw what the detector does on this image")
    add("--output", type=Path, metavar="DIR", help="directory of the pictures")
    text = "numbers of the queries to draw; default: the three with the highest scores"
    add("--queries", type=int, nargs="+", metavar="N", help=text)
    text = "COCO file with the image's objects; default: what the detector finds are its objects"
    add("--annotations", type=Path, metavar="FILE", help=text)
    add("--threshold", type=float, default=0.3, metavar="X", help="minimum score of these (0.3)")
    add("--groups", type=int, default=2, metavar="N", help="denoising groups to draw (2)")


def run(args: Namespace) -> None:
    if bool(args.image) != bool(args.output):
        raise UserError("pass both --image and --output, or neither")
    if args.image:
        return draw(args)
    if not args.checkpoint:
        raise UserError("name a checkpoint, a file or URL")
    checkpoint = read_checkpoint(local_file(args.checkpoint))
    for title, text in describe(checkpoint, args.checkpoint):
        print(f"{title:11}{text}")


def draw(args: Namespace) -> None:
    """Pictures of one image. Noise is the same every time."""
    from ..inspection import look
    from ..inspection_pictures import write_pictures

    predictor = load(args)
    image, objects, origin = find_objects(predictor, args)
    torch.manual_seed(0)
    (view,) = look(predictor, [image], [objects])
    number = len(view.layers[0].scores)
    queries = view.best(3) if args.queries is None else args.queries
    if not all(0 <= query < number for query in queries):
        raise UserError(f"queries: the detector has queries 0 to {number - 1}")
    names = predictor.class_map.names
    written = write_pictures(view, args.output, queries, names, args.groups)
    print(f"{args.output}: {', '.join(written)}")
    if view.denoising is not None:
        print(f"denoising of {len(view.denoising.labels)} {origin}")


def find_objects(predictor: Predictor, args: Namespace) -> tuple[Tensor, dict[str, Tensor], str]:
    """The image, its objects for denoising, and what these are."""
    if args.annotations is None:
        (found,) = predictor.predict(read_image(args.image), args.threshold)
        return found.image, dict(found), f"detections with score {args.threshold:g} or more"
    if predictor.model.prepare_denoising is None:
        raise UserError("annotations: this detector has no denoising, which they are for")
    dataset = read_annotations(predictor, args.image.parent, args.annotations)
    names = [dataset.file_name(i) for i in range(len(dataset))]
    if args.image.name not in names:
        raise UserError(f"{args.annotations}: has no image {args.image.name}")
    index = names.index(args.image.name)
    truth = dataset.drawable_truth(dataset.image_ids[index])
    keep = ~torch.tensor(truth["crowd"], dtype=torch.bool)
    labels = torch.tensor(truth["labels"], dtype=torch.int64)
    objects = {"labels": labels[keep], "boxes": truth["boxes"][keep]}
    return dataset.image(index), objects, "annotated objects"


def describe(checkpoint: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """Titles and texts about the checkpoint that was read from `source`."""
    state, config = state_dict_of(checkpoint, source), checkpoint.get("config")
    origin = "main.py" if config else "the authors' code" if "args" in checkpoint else "unknown"
    epoch = f", after epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
    extras = {"ema_model": "averaged weights (EMA)", "optimizer": "the optimiser's state"}
    held = [text for key, text in extras.items() if checkpoint.get(key)]
    yield "origin", f"{origin}{epoch}; with {' and '.join(held) or 'weights only'}"

    values = config or vars(checkpoint.get("args", Namespace()))
    model, backbone = (values.get(key, "unknown") for key in ("modelname", "backbone"))
    is_learned = lambda name: not name.endswith(("running_mean", "running_var", "_tracked"))
    learned = (tensor for name, tensor in state.items() if is_learned(name))
    distinct = {(tensor.data_ptr(), tensor.numel()) for tensor in learned}  # some are shared
    size = sum(count for _, count in distinct) / 1e6
    yield "model", f"{model}, backbone {backbone}, {size:.2f} M parameters"

    if scales := values.get("data_aug_scales"):
        longer = values["data_aug_max_size"]
        yield "input", f"shorter side {max(scales)} pixels, longer side at most {longer}"
    if "class_map" in checkpoint:
        class_map = ClassMap.from_state_dict(checkpoint["class_map"])
        classes = ", ".join(f"{id_} {class_map.names[i]}" for i, id_ in class_map.ids.items())
        yield "classes", f"{len(class_map.ids)}: {classes}"
    else:
        yield "classes", f"{num_classes_of(checkpoint)} labels without names, used as category ids"
    if config:
        published, differing = closest_config(config)
        yield "config", f"differs from {published} in {len(differing)} options"
        for name, (value, usual) in differing.items():
            yield "", f"{name} = {value!r}, not {usual!r}"


def closest_config(config: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Of the published configs of this model the most similar one, and {option: (value, its value)}
    where they differ: the detector's options, and the others that it sets."""
    found, usual = [], MODELS[config["modelname"]].config  # of equally similar ones
    for path in sorted(config_dir().glob("*.py")):
        values = read_config(path.stem)
        if values["modelname"] == config["modelname"]:
            values = asdict(DetectorOptions.of(values)) | values
            pairs = {k: (config[k], v) for k, v in values.items() if k in config.keys() - OMITTED}
            found.append((path.stem, {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}))
    return min(found, key=lambda item: (len(item[1]), item[0] != usual))
