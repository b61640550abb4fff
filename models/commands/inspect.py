"""Print what a checkpoint contains: its origin, model, size, classes and unusual options.

Example:
  dn-dino inspect checkpoint.pth
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..build import config_dir, read_config
from ..class_map import ClassMap
from ..download import local_file
from ..options import DetectorOptions
from ..registry import MODELS
from ..weights import num_classes_of, read_checkpoint, state_dict_of

# Options that say nothing about a trained detector, or are printed by themselves.
OMITTED = ("modelname", "num_classes", "pretrained_backbone", "backbone_weights", "backbone_dir")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, a file or URL")


def run(args: Namespace) -> None:
    checkpoint = read_checkpoint(local_file(args.checkpoint))
    for title, text in describe(checkpoint, args.checkpoint):
        print(f"{title:11}{text}")


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
