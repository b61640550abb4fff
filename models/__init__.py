"""DAB-DETR, DN-DETR and DINO: detectors and losses, tensors in, tensors out.

`build_model` makes a detector, its losses and its post-processing; `load_detector` makes one from a
checkpoint, ready for images; `prepare_for_dn` and its companions add denoising to another detector.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_model, load_options
    from .dn_components import compute_dn_loss, dn_post_process, prepare_for_cdn, prepare_for_dn
    from .predictor import Predictor, load_detector

__all__ = [
    "Predictor",
    "build_model",
    "compute_dn_loss",
    "dn_post_process",
    "load_detector",
    "load_options",
    "prepare_for_cdn",
    "prepare_for_dn",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `models.errors`, for example, does not import all the rest."""
    if name in __all__:
        for module in ("dn_components", "build", "predictor"):
            if hasattr(part := import_module(f".{module}", __package__), name):
                return getattr(part, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
