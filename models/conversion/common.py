"""What the conversions share: renaming, and options from shapes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import swin
from ..build import build_model, read_config
from ..class_map import ClassMap
from ..errors import UserError
from ..options import DetectorOptions
from ..registry import find_model
from ..weights import load_weights

NAMES_SHOWN = 3
RESNETS: dict[tuple[str, tuple[int, ...]], str] = {  # kind and number of the blocks in each stage
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}
STEMS = "backbone.0.body.conv1.weight", "backbone.0.patch_embed.proj.weight"
LAST_LAYER = r"bbox_embed\.\d+\.layers\.2\.weight"  # of the box heads
Rules = Sequence[tuple[str, str]]  # regular expressions and replacements, applied in turn
FEED_FORWARD: Rules = (  # detrex and MMDetection both follow MMCV
    (r"\.ffn(s\.0)?\.layers\.0\.0\.", ".linear1."),
    (r"\.ffn(s\.0)?\.(layers\.0\.1|activat\w+)\.", ".activation."),
    (r"\.ffn(s\.0)?\.layers\.1\.", ".linear2."),
)


def norm_rules(is_deformable: bool) -> Rules:
    """MMCV numbers norms in the order of computation, the deformable decoder here does not."""
    numbers = {"encoder": (1, 2), "decoder": (2, 1, 3) if is_deformable else (1, 2, 3)}
    return [
        (rf"({part}\.layers\.\d+)\.norms\.{i}\.", rf"\1.norm{number}.")
        for part, order in numbers.items()
        for i, number in enumerate(order)
    ]


def new_name(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def neck_rules(names: Mapping[str, Any], norm: str) -> Rules:
    """The input projections of a `ChannelMapper`: of feature maps, then of additional levels."""
    convs, more = count(names, r"neck\.convs"), count(names, r"neck\.extra_convs")
    places = [*(rf"convs\.{i}" for i in range(convs)), *(rf"extra_convs\.{i}" for i in range(more))]
    return [
        (rf"^neck\.{place}\.{part}\.", f"input_proj.{level}.{index}.")
        for level, place in enumerate(places)
        for index, part in enumerate(("conv", norm))
    ]


def rename(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The tensors under new names. UserError if two that are one here differ."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = new_name(name, rules)
        if not torch.equal(renamed.setdefault(new, tensor), tensor):
            raise UserError(f"{name} differs from another tensor that is {new} here as well")
    return renamed


def count(names: Mapping[str, Any], prefix: str) -> int:
    """The length of a module list: the different numbers after `prefix`, a regular expression."""
    return len({found[1] for name in names if (found := re.match(rf"{prefix}\.(\d+)\.", name))})


def options_of(
    state: Mapping[str, Tensor], defaults: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """The config of tensors under this project's names. In ascending order of precedence: the
    published one of their model, `defaults`, `config`, and what their shapes tell. UserError if
    they are none of the detectors here."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    is_deformable, has_labels = "transformer.level_embed" in shapes, "label_enc.weight" in shapes
    selects = "transformer.pos_trans.weight" in shapes  # its queries, among the tokens
    queries = "query_embed.weight" if "query_embed.weight" in shapes else "refpoint_embed.weight"
    name = "deformable_detr" if is_deformable else "detr"
    name = name if selects or queries == "query_embed.weight" else f"dab_{name}"
    name = f"dn_{name}" if has_labels else name
    name = "dino" if "transformer.enc_out_class_embed.weight" in shapes else name
    values = read_config(find_model(name).config) | defaults | config
    layer, num_heads = "transformer.decoder.layers.0", values.get("nheads", 8)
    queries = "transformer.tgt_embed.weight" if name == "dino" else queries
    try:
        backbone, channels = backbone_of(shapes)
        width, hidden = shapes[f"{layer}.linear2.weight"]
        values |= {
            "modelname": name,
            "backbone": backbone,
            "hidden_dim": width,
            "dim_feedforward": hidden,
            "enc_layers": count(shapes, r"transformer\.encoder\.layers"),
            "dec_layers": count(shapes, r"transformer\.decoder\.layers"),
            "num_patterns": shapes.get("transformer.patterns.weight", [0])[0],
            # Other projects have a head for each layer.
            "dec_pred_class_embed_share": False,
            "dec_pred_bbox_embed_share": False,
        }
        if not selects:
            values["num_queries"] = shapes[queries][0]
        if f"{layer}.activation.weight" in shapes:
            values["transformer_activation"] = "prelu"
        if name == "deformable_detr":  # without refinement the box heads are one
            last = [t for n, t in state.items() if re.fullmatch(LAST_LAYER, n)]
            values["with_box_refine"] = any(not torch.equal(t, last[0]) for t in last)
            values["query_selection"] = "pure" if selects else "static"
        if is_deformable:
            levels = shapes["transformer.level_embed"][0]
            convs = [shapes[f"input_proj.{i}.0.weight"] for i in range(levels)]
            stages = [int(math.log2(c[1] / channels)) for c in convs if c[2] == 1]
            values |= {"num_feature_levels": levels, "return_interm_indices": stages}
            for key, part in (("enc", "encoder.layers.0.self"), ("dec", "decoder.layers.0.cross")):
                weights = shapes[f"transformer.{part}_attn.attention_weights.weight"]
                values[f"{key}_n_points"] = weights[0] // (levels * num_heads)
    except KeyError as e:
        raise UserError(f"no detector of this project: it has no {e.args[0]}") from e
    return values


def backbone_of(shapes: Mapping[str, torch.Size]) -> tuple[str, int]:
    """A backbone's name and the channels of its first stage."""
    body = "backbone.0.body.layer"
    if shapes.get(f"{body}1.0.conv1.weight"):
        kind = "bottleneck" if f"{body}1.0.conv3.weight" in shapes else "basic"
        blocks = tuple(count(shapes, f"{re.escape(body)}{stage}") for stage in (1, 2, 3, 4))
        if (kind, blocks) in RESNETS:
            return RESNETS[kind, blocks], 64 if kind == "basic" else 256
    elif stem := shapes.get("backbone.0.patch_embed.proj.weight"):
        rows = shapes["backbone.0.layers.0.blocks.0.attn.relative_position_bias_table"][0]
        depth = count(shapes, r"backbone\.0\.layers\.2\.blocks")
        size = stem[0], depth, (math.isqrt(rows) + 1) // 2
        for name, variant in swin.VARIANTS.items():
            if (variant.dim, variant.depth, variant.window) == size:
                return name, variant.dim
    raise KeyError("ResNet 18, 34, 50 or 101 or Swin-T, B or L")


def assemble(
    state: Mapping[str, Tensor], config: dict[str, Any], class_map: ClassMap
) -> dict[str, Any]:
    """A checkpoint of tensors under this project's names, those of shared heads under one or more.
    UserError, with the first few names, if they are not those of the config's model."""
    options = DetectorOptions.of(config, num_classes=class_map.num_classes)
    model, *_ = build_model(options)
    report = load_weights(model, state, strict=False)
    problems = []
    for kind in ("unexpected", "missing", "mismatched"):
        if names := getattr(report, kind):
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            problems.append(f"{kind} {', '.join(names[:NAMES_SHOWN])}{more}")
    if problems:
        raise UserError(f"it does not fit {options.modelname}: {'; '.join(problems)}")
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = config | vars(options)
    return {"model": weights, "config": config, "class_map": class_map.state_dict()}


def pad_labels(state: dict[str, Tensor], num_classes: int) -> None:
    """DINO's label embedding has one row more here than in other projects; it is never used."""
    name = "label_enc.weight"
    if "transformer.enc_output.weight" in state and len(state.get(name, ())) == num_classes:
        state[name] = torch.cat([state[name], torch.zeros_like(state[name][:1])])
