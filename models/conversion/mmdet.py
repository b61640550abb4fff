"""MMDetection 3: DETR, DAB-DETR, Deformable DETR and DINO, with ResNets and Swin Transformers.

Its files contain their config as Python text, which is parsed and never executed; where it is
missing, the settings are those of its own configs.
"""

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..class_map import ClassMap
from ..errors import UserError
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..weights import num_classes_of, state_dict_of
from .common import (
    FEED_FORWARD,
    STEMS,
    Rules,
    assemble,
    count,
    neck_rules,
    norm_rules,
    options_of,
    pad_labels,
    rename,
)

NAMES: Rules = (
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"backbone.0.body.\1."),
    (r"^backbone\.patch_embed\.projection\.", "backbone.0.patch_embed.proj."),
    (r"^backbone\.(patch_embed|norm\d)\.", r"backbone.0.\1."),
    (r"^backbone\.stages\.", "backbone.0.layers."),
    (r"(blocks\.\d+)\.attn\.w_msa\.", r"\1.attn."),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^(encoder|decoder|patterns|level_embed)\b", r"transformer.\1"),
    (r"\.decoder\.post_norm\.", ".decoder.norm."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^dn_query_generator\.label_embedding\.", "label_enc."),
)
DENSE: Rules = (
    (r"^neck\.convs\.0\.conv\.", "input_proj."),
    (r"^bbox_head\.fc_cls\.", "class_embed."),
)
DETR: Rules = (
    *DENSE,
    (r"^query_embedding\.", "query_embed."),
    (r"^bbox_head\.reg_ffn\.layers\.0\.0\.", "bbox_embed.layers.0."),
    (r"^bbox_head\.reg_ffn\.layers\.1\.", "bbox_embed.layers.1."),
    (r"^bbox_head\.fc_reg\.", "bbox_embed.layers.2."),
    (r"\.cross_attn\.attn\.", ".multihead_attn."),
)
DAB: Rules = (
    *DENSE,
    (r"^query_embedding\.", "refpoint_embed."),
    (r"^bbox_head\.fc_reg\.", "bbox_embed."),
    (r"(decoder.*)\.self_attn\.(?!out_proj)", r"\1.sa_"),
    (r"(decoder.*)\.cross_attn\.(?!out_proj)", r"\1.ca_"),
)
DEFORMABLE: Rules = (
    (r"^query_embedding\.", "query_embed."),
    (r"^(pos_trans|reference_points)_fc\.", r"transformer.\1."),
    (r"^pos_trans_norm\.", "transformer.pos_trans_norm."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    *(
        (rf"^bbox_head\.reg_branches\.(\d+)\.{2 * i}\.", rf"bbox_embed.\1.layers.{i}.")
        for i in range(3)
    ),
)
DINO: Rules = ((r"^query_embedding\.", "transformer.tgt_embed."), *DEFORMABLE)


def read(path: Path, checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """See `conversion.read`."""
    theirs, meta = state_dict_of(checkpoint, "it"), dict_at(checkpoint, "meta")
    settings = model_settings(meta.get("cfg"))
    is_deformable, is_detr = "level_embed" in theirs, "bbox_head.reg_ffn.layers.1.weight" in theirs
    is_dino = "dn_query_generator.label_embedding.weight" in theirs
    kind = (DINO if is_dino else DEFORMABLE) if is_deformable else DETR if is_detr else DAB
    rules = [*NAMES, *FEED_FORWARD, *norm_rules(is_deformable), *kind, *neck_rules(theirs, "gn")]
    if is_dino:
        layers = count(theirs, r"decoder\.layers")
        rules += [(rf"^(class|bbox)_embed\.{layers}\.", r"transformer.enc_out_\1_embed.")]
    state = rename(theirs, rules)
    for name in list(state):
        if ".downsample." in name and name.startswith("backbone.0.layers."):
            state[name] = reorder_merged(state[name])
    num_classes = num_classes_of(state, "softmax" if is_detr else "focal") or 1
    pad_labels(state, num_classes)
    convert_input(state, settings)
    attention = dict_at(settings, "encoder", "layer_cfg", "self_attn_cfg")
    defaults = {"nheads": attention.get("num_heads", 8)} | positions(settings)
    if queries := settings.get("num_queries", settings.get("num_query")):
        defaults["num_queries"] = queries
    data = dict_at(meta, "dataset_meta")
    names: Any = data.get("classes") or data.get("CLASSES") or ()
    is_known = len(names) == num_classes
    class_map = ClassMap.of_names(names) if is_known else ClassMap.of_count(num_classes)
    return assemble(state, options_of(state, defaults, config), class_map)


def dict_at(values: Any, *names: str) -> dict[str, Any]:
    """The dict inside dicts under these names, empty if there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def model_settings(text: Any) -> dict[str, Any]:
    """The dict(...) that a config's text assigns to `model`, without executing it; other calls than
    dict count as dicts of their keywords."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return {keyword.arg: value(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(element) for element in node.elts]
        return ast.literal_eval(node)

    try:
        for node in ast.parse(text).body if isinstance(text, str) else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model":
                return value(node.value)
    except (SyntaxError, ValueError) as e:
        raise UserError(f"its config cannot be read: {e}") from e
    return {}


def positions(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of a `SinePositionalEncoding` with `normalize`, if there is one."""
    encoding = dict_at(settings, "positional_encoding")
    if not encoding:
        return {}
    if not encoding.get("normalize", True) or "scale" in encoding:
        raise UserError("positional_encoding: normalize=False and scale are not supported")
    temperature = encoding.get("temperature", 10000)
    options = {"pe_temperatureH": temperature, "pe_temperatureW": temperature}
    return options | {"pe_offset": encoding.get("offset", 0.0)}


def reorder_merged(tensor: Tensor) -> Tensor:
    """Parameters of Swin's patch merging, (4 * C,) or (out, 4 * C), from the order of `nn.Unfold`,
    in which channels come first and pixels row by row, to that of the authors: pixels first, and
    column by column."""
    pixels = tensor.unflatten(-1, (-1, 2, 2))  # C, row, column
    return pixels.movedim(-3, -1).transpose(-3, -2).flatten(-3)


def convert_input(state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Makes the stem expect images as they are normalised here. UserError where it could not."""
    backbone, images = dict_at(settings, "backbone"), dict_at(settings, "data_preprocessor")
    if backbone.get("style") == "caffe" or any(d != 1 for d in backbone.get("dilations", ())):
        raise UserError("backbone: style='caffe' and dilations are not supported")
    if not images:
        return
    order = [0, 1, 2] if images.get("bgr_to_rgb") else [2, 1, 0]  # files are read as BGR
    mean, std = (torch.tensor(images[key])[order] / 255 for key in ("mean", "std"))
    if not torch.allclose(mean, torch.tensor(IMAGENET_MEAN), atol=0.002):
        raise UserError(f"data_preprocessor: mean {images['mean']} is not ImageNet's")
    scale = torch.tensor(IMAGENET_STD) / std
    scale[(scale - 1).abs() < 1e-4] = 1
    for name in STEMS:
        if name in state:
            state[name] = state[name][:, order] * scale[:, None, None]
