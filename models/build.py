"""From options to a detector, its losses and its post-processing."""

from pathlib import Path
from typing import Any

from .backbones import build_backbone
from .classes import classes_of
from .criterion import MASK_TERMS, SetCriterion, loss_weights, standard_terms
from .detector import Detector
from .errors import UserError, nearest
from .faster_rcnn import RegionLosses, RegionPostProcess
from .masks import MaskDetector
from .matcher import HungarianMatcher
from .options import DetectorOptions, read_assignments
from .postprocess import PostProcess
from .registry import check_options, find_model

CONFIG_DIRS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]


def load_options(config: str | Path, **overrides: Any) -> DetectorOptions:
    """The detector's options of a config, found as in `read_config`, changed by `overrides`.

    UserError for a config that does not exist, an unknown option and a value outside its limits.
    """
    return DetectorOptions.of(read_config(config), **overrides)


def read_config(config: str | Path) -> dict[str, Any]:
    """All options that a config sets. It is a file, or published: `dino_4scale_r50`."""
    path = Path(config)
    if not path.suffix:
        directory = config_dir()
        path = directory / f"{config}.py"
        if not path.exists():
            known = [str(p.relative_to(directory).with_suffix("")) for p in directory.rglob("*.py")]
            raise UserError(f"config: there is no {config}{nearest(str(config), known)}")
    values = read_assignments(path)
    return find_model(values.get("modelname", DetectorOptions.modelname)).detector.implied | values


def config_dir() -> Path:
    """The directory of the published configs, inside the package or beside it."""
    return next(directory for directory in CONFIG_DIRS if directory.exists())


def build_model(
    options: DetectorOptions | str | Path, **overrides: Any
) -> tuple[Detector, SetCriterion | RegionLosses, PostProcess]:
    """Build a detector with random weights, its losses and its post-processing.

    Args:
        options: a `DetectorOptions`, such as a run's config, or a config as in `load_options`.
        overrides: options that replace those.
    """
    if isinstance(options, str | Path):
        options = load_options(options)
    options = DetectorOptions.of(vars(options), **overrides)
    check_options(options)
    model = find_model(options.modelname).detector(options, build_backbone(options))
    classes, terms = classes_of(options), standard_terms(options)
    selection = options.num_select, options.nms_iou_threshold, classes
    if not model.has_queries:
        return model, RegionLosses(options), RegionPostProcess(*selection)
    terms += MASK_TERMS if options.masks else []
    costs = options.set_cost_class, options.set_cost_bbox, options.set_cost_giou
    matcher = HungarianMatcher(*costs, classes)
    token_suffix = "" if options.query_selection == "static" else model.token_losses
    weights = loss_weights(options, terms, options.dec_layers, options.use_dn, token_suffix)
    if options.masks:
        model = MaskDetector(options, model)
    criterion = SetCriterion(matcher, terms, weights, options.dn_num_boxes, classes)
    return model, criterion, PostProcess(*selection)
