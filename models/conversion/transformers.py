"""transformers 5: `DabDetrForObjectDetection` to DAB-DETR and back, as directories that
`save_pretrained` writes. DN-DETR can go there, where its label embedding is a pattern.

Outputs are equal; with a backbone timm/NAME, which pads images here, where sides are multiples of
32. Its `DeformableDetr` has queries that are no anchors, which no detector here has.
"""

import dataclasses
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..backbones.timm_model import PREFIX
from ..build import build_model, read_config
from ..class_map import ClassMap
from ..dn_components import with_indicator
from ..errors import UserError
from ..options import DetectorOptions
from ..predictor import Predictor
from ..weights import STEP_COUNTER, load_weights, not_saved, read_checkpoint
from .common import RESNETS, Rules, assemble, new_name, rename

BODY = "model.backbone.conv_encoder.model."
# From this project's names.
NAMES: Rules = (
    (r"^(transformer\.decoder\.)?bbox_embed\.", "bbox_predictor."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^refpoint_embed\.", "model.query_refpoint_embeddings."),
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.(norm2|linear|activation)", r"\1.mlp.\2"),
    (r"(decoder\.layers\.\d+)\.(norm3|linear|activation)", r"\1.mlp.\2"),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.cross_attn.cross_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.(self|cross)_attn\.out_proj\.", r"\1.\2_attn.\2_attn.output_proj."),
    (r"(decoder\.layers\.\d+)\.sa_", r"\1.self_attn.self_attn_"),
    (r"(decoder\.layers\.\d+)\.ca_", r"\1.cross_attn.cross_attn_"),
    (r"_attn_q(content|pos)", r"_attn_query_\1"),
    (r"_attn_k(content|pos)", r"_attn_key_\1"),
    (r"_attn_v_proj", "_attn_value_proj"),
    (r"\.mlp\.norm\d\.", ".mlp.final_layer_norm."),
    (r"\.mlp\.linear", ".mlp.fc"),
    (r"\.mlp\.activation\.", ".mlp.activation_fn."),
    (r"(encoder\.layers\.\d+)\.mlp\.", r"\1."),
    (r"\.decoder\.norm\.", ".decoder.layernorm."),
)
TIMM: Rules = ((r"^backbone\.0\.body\.", f"{BODY}_backbone."),)
RESNET: Rules = (  # transformers' own
    (r"^backbone\.0\.body\.conv1\.", f"{BODY}embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", f"{BODY}embedder.embedder.normalization."),
    *(
        (rf"^backbone\.0\.body\.layer{i + 1}\.(\d+)\.", rf"{BODY}encoder.stages.{i}.layers.\1.")
        for i in range(4)
    ),
    (r"(encoder\.stages.*)\.downsample\.0\.", r"\1.shortcut.convolution."),
    (r"(encoder\.stages.*)\.downsample\.1\.", r"\1.shortcut.normalization."),
    *((rf"(encoder\.stages.*)\.conv{i + 1}\.", rf"\1.layer.{i}.convolution.") for i in range(3)),
    *((rf"(encoder\.stages.*)\.bn{i + 1}\.", rf"\1.layer.{i}.normalization.") for i in range(3)),
)
# Option here, name and default in transformers' configs.
OPTIONS: dict[str, tuple[str, Any]] = {
    "hidden_dim": ("hidden_size", 256),
    "nheads": ("encoder_attention_heads", 8),
    "dim_feedforward": ("encoder_ffn_dim", 2048),
    "enc_layers": ("encoder_layers", 6),
    "dec_layers": ("decoder_layers", 6),
    "dropout": ("dropout", 0.1),
    "transformer_activation": ("activation_function", "prelu"),
    "num_queries": ("num_queries", 300),
    "num_patterns": ("num_patterns", 0),
    "random_refpoints_xy": ("random_refpoints_xy", False),
    "pe_temperatureH": ("temperature_height", 20),
    "pe_temperatureW": ("temperature_width", 20),
    "dilation": ("dilation", False),
}
TEMPERATURES = ("temperature_height", "temperature_width")
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
SIZES_OF_BOTH = ("attention_heads", "ffn_dim")  # of encoder and decoder, equal here
# Settings with one value here.
FIXED = {"normalize_before": False, "keep_query_pos": False, "sine_position_embedding_scale": None}


def read(path: Path, checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """See `conversion.read`; a directory, or the model.safetensors in it."""
    directory = path if path.is_dir() else path.parent
    theirs = read_json(directory / CONFIG)
    if (kind := theirs.get("model_type")) != "dab-detr":
        raise UserError(f"no detector here corresponds to {kind!r}, only to 'dab-detr'")
    for name in SIZES_OF_BOTH:
        if theirs.get(f"encoder_{name}") != theirs.get(f"decoder_{name}"):
            raise UserError(f"{name} of encoder and decoder differ, which they cannot here")
    for name, only in FIXED.items():
        if theirs.get(name, only) != only:
            raise UserError(f"{name}: {theirs[name]!r} is not supported, only {only!r}")
    backbone = theirs.get("backbone_config") or {"backbone": theirs.get("backbone")}
    values = read_config("dab_detr_r50") | {"backbone": backbone_of(backbone)}
    values |= {option: theirs.get(name, default) for option, (name, default) in OPTIONS.items()}
    values["dilation"] |= backbone.get("output_stride") == 16
    if (directory / PROCESSOR).exists():
        size = read_json(directory / PROCESSOR).get("size", {})
        values["data_aug_scales"] = [size.get("shortest_edge", Predictor.size)]
        values["data_aug_max_size"] = size.get("longest_edge", Predictor.max_size)
    values |= config

    state = read_checkpoint(directory / WEIGHTS)["model"]
    state = rename(state, [(r"^model\.decoder\.bbox_embed\.", "bbox_predictor.")])
    join_projections(state)
    labels = theirs.get("id2label", {})
    names = [labels[label] for label in sorted(labels, key=int)]
    class_map = ClassMap.of_names(names or ["LABEL_0", "LABEL_1"])  # its default
    model, *_ = build_model(DetectorOptions.of(values, num_classes=class_map.num_classes))
    is_timm = any(name.startswith(f"{BODY}_backbone.") for name in state)
    rules = [*NAMES, *(TIMM if is_timm else RESNET)]
    ours = {new_name(name, rules): name for name in model.state_dict()}
    state = {ours.get(name, name): tensor for name, tensor in state.items()}
    return assemble(state, values, class_map)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file.name}: no JSON: {e}") from e


def backbone_of(config: dict[str, Any]) -> str:
    """The name here of the backbone of a `backbone_config`."""
    kind = config.get("model_type", "timm_backbone")
    if kind == "timm_backbone":
        name = config.get("backbone") or "resnet50"
        return name if name in RESNETS.values() else f"{PREFIX}{name}"
    key = config.get("layer_type", "bottleneck"), tuple(config.get("depths", (3, 4, 6, 3)))
    if kind != "resnet" or key not in RESNETS or config.get("downsample_in_bottleneck"):
        known = ", ".join(RESNETS.values())
        raise UserError(f"backbone_config: only timm's models and, of 'resnet', {known} are known")
    return RESNETS[key]


def join_projections(state: dict[str, Tensor]) -> None:
    """The encoder's projections of queries, keys and values as one, like nn.MultiheadAttention."""
    for name in [name for name in state if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if state.keys() >= set(parts):
            joined = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".q_proj.", ".in_proj_")] = joined


def write(directory: Path, checkpoint: dict[str, Any]) -> None:
    """The directory of a `DabDetrForObjectDetection` that computes the same. UserError if it exists
    already, and for models without counterpart."""
    if directory.exists():
        raise UserError(f"{directory}: exists; name a new directory")
    class_map = ClassMap.from_state_dict(checkpoint["class_map"])
    options = DetectorOptions.of(checkpoint["config"], num_classes=class_map.num_classes)
    check_counterpart(options)
    model, *_ = build_model(options)
    load_weights(model, checkpoint, source="the checkpoint")
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(STEP_COUNTER)}
    if options.modelname == "dn_dab_detr":  # the content of matching queries, as a pattern
        content = with_indicator(state.pop("label_enc.weight")[-1:], options.hidden_dim, 0.0)
        patterns = state.get("transformer.patterns.weight", torch.zeros_like(content))
        state["transformer.patterns.weight"] = patterns + content
        options = dataclasses.replace(options, num_patterns=len(patterns))
    state = rename(state, [*NAMES, *TIMM])
    for name in [name for name in state if ".in_proj_" in name]:
        for part, tensor in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".in_proj_", f".{part}_proj.")] = tensor.clone()
    config: dict[str, Any] = {name: getattr(options, key) for key, (name, _) in OPTIONS.items()}
    config |= {f"decoder_{name}": config[f"encoder_{name}"] for name in SIZES_OF_BOTH}
    config |= {name: int(config[name]) for name in TEMPERATURES}
    labels = {label: class_map.names.get(label, "N/A") for label in range(class_map.num_classes)}
    is_timm = options.backbone.startswith(PREFIX)
    stages = model.backbone[0].body.feature_info.out_indices if is_timm else [1, 2, 3, 4]
    config |= {
        "model_type": "dab-detr",
        "architectures": ["DabDetrForObjectDetection"],
        "id2label": labels,
        "label2id": {name: label for label, name in labels.items()},
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": options.backbone.removeprefix(PREFIX),
            "out_indices": list(stages),
            "output_stride": 16 if options.dilation else None,
        },
    }
    size = max(checkpoint["config"].get("data_aug_scales", [Predictor.size]))
    max_size = checkpoint["config"].get("data_aug_max_size", Predictor.max_size)
    processor = {
        "image_processor_type": "ConditionalDetrImageProcessor",
        "size": {"shortest_edge": size, "longest_edge": max_size},
    }
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        for name, settings in {CONFIG: config, PROCESSOR: processor}.items():
            (temporary / name).write_text(json.dumps(settings, indent=2) + "\n")
        (temporary / WEIGHTS).write_bytes(safetensors.torch.save(state, {"format": "pt"}))
        temporary.rename(directory)
    except OSError as error:
        raise not_saved(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_counterpart(options: DetectorOptions) -> None:
    """UserError unless `DabDetrForObjectDetection` can be this detector."""
    name, backbone = options.modelname, options.backbone
    if name not in ("dab_detr", "dn_dab_detr"):
        raise UserError(f"modelname: transformers has no {name}, only dab_detr and dn_dab_detr")
    if not backbone.startswith(PREFIX) and backbone not in RESNETS.values():
        raise UserError(f"backbone: transformers has no {backbone}, only ResNets and timm's")
    if options.pe_offset or options.pe_temperatureH % 1 or options.pe_temperatureW % 1:
        raise UserError("pe_offset, pe_temperature: in transformers they are 0 and whole numbers")
