"""An entry point of torch.hub for each published config:

torch.hub.load("path/to/the/clone", "dino_4scale_r50", source="local", checkpoint="x.pth")
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import Predictor, build_model, load_detector, load_options
from models.build import config_dir, read_config
from models.class_map import ClassMap
from models.download import local_file
from models.errors import UserError
from models.weights import read_checkpoint

dependencies = ["numpy", "PIL", "scipy", "timm", "torch", "torchvision", "tqdm"]


def _entry_point(config: Path) -> Callable[..., Predictor]:
    def entry(checkpoint: str | None = None, **options: Any) -> Predictor:
        name = config.stem
        if checkpoint is None:
            model, _, postprocess = build_model(name, pretrained_backbone=False, **options)
            count = load_options(name, **options).num_labels
            class_map = ClassMap.identity([{"id": i} for i in range(count)], count)
            return Predictor(model.eval(), postprocess, class_map, labels_are_ids=True)
        path, expected = local_file(checkpoint), read_config(name)["modelname"]
        own = read_checkpoint(path, verify=False).get("config")
        if own and own["modelname"] != expected:
            raise UserError(f"{checkpoint}: holds a {own['modelname']}, not a {expected}")
        return load_detector(path, None if own else name, **options)

    entry.__name__ = config.stem
    entry.__doc__ = f"""{ast.get_docstring(ast.parse(config.read_text()))}

    Returns a `Predictor`: `predict(source)` detects objects, `model` is the module.

    checkpoint: a file or URL of this project or of the authors; the config in it, if there is one,
    takes precedence over the published one. options: those of `load_detector`: device, ema, half,
    compile. Without a checkpoint the weights are random, and options are those of `build_model`,
    such as num_classes.
    """
    return entry


globals().update({path.stem: _entry_point(path) for path in sorted(config_dir().glob("*.py"))})
