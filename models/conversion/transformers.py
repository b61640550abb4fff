"""transformers 5: `DetrForObjectDetection`, `DabDetrForObjectDetection` and
`DeformableDetrForObjectDetection` to this project's and back, as directories that `save_pretrained`
writes and models load.

DN-DETR goes there as a DAB-DETR, with its label embedding as a pattern; Deformable DETR with
denoising as one without. Outputs are equal; with a backbone timm/NAME, which pads images here,
where sides are multiples of 32.
"""

import dataclasses
import json
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..backbones.timm_model import PREFIX
from ..build import build_model, load_options, read_config
from ..class_map import ClassMap
from ..dn_components import with_indicator
from ..errors import UserError
from ..options import DetectorOptions
from ..predictor import Predictor
from ..weights import STEP_COUNTER, load_weights, not_saved, read_checkpoint
from .common import RESNETS, Rules, assemble, new_name

BODY = "model.backbone.conv_encoder.model."
# From this project's names to those in files, from which the modules of transformers may differ.
NAMES: Rules = (
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.decoder\.norm\.", ".decoder.layernorm."),
)
DENSE: Rules = (
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^input_proj\.", "model.input_projection."),
)
DAB: Rules = (
    *DENSE,
    (r"^refpoint_embed\.", "model.query_refpoint_embeddings."),
    (r"(decoder\.layers\.\d+)\.(norm3|linear|activation)", r"\1.mlp.\2"),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.cross_attn.cross_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.(self|cross)_attn\.out_proj\.", r"\1.\2_attn.\2_attn.output_proj."),
    (r"(decoder\.layers\.\d+)\.sa_", r"\1.self_attn.self_attn_"),
    (r"(decoder\.layers\.\d+)\.ca_", r"\1.cross_attn.cross_attn_"),
    (r"_attn_q(content|pos)", r"_attn_query_\1"),
    (r"_attn_k(content|pos)", r"_attn_key_\1"),
    (r"_attn_v_proj", "_attn_value_proj"),
    (r"\.norm3\.", ".final_layer_norm."),
    (r"\.activation\.", ".activation_fn."),
)
QUERIES: Rules = (
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"\.(multihead|cross)_attn\.", ".encoder_attn."),
    (r"\.norm3\.", ".final_layer_norm."),
    (r"\.activation\.", ".mlp.activation_fn."),
)
DETR: Rules = (
    *DENSE,
    *QUERIES,
    (r"^class_embed\.", "class_labels_classifier."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
)
DEFORMABLE: Rules = (
    *QUERIES,
    (r"^input_proj\.", "model.input_proj."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
)
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
# Option here, name in transformers' configs.
OPTIONS = {
    "nheads": "encoder_attention_heads",
    "dim_feedforward": "encoder_ffn_dim",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dropout": "dropout",
    "transformer_activation": "activation_function",
    "num_queries": "num_queries",
    "dilation": "dilation",
}
DAB_OPTIONS = {
    "hidden_dim": "hidden_size",
    "num_patterns": "num_patterns",
    "random_refpoints_xy": "random_refpoints_xy",
    "pe_temperatureH": "temperature_height",
    "pe_temperatureW": "temperature_width",
}
DEFORMABLE_OPTIONS = {
    "hidden_dim": "d_model",
    "num_feature_levels": "num_feature_levels",
    "enc_n_points": "encoder_n_points",
    "dec_n_points": "decoder_n_points",
    "with_box_refine": "with_box_refine",
}


class Kind(NamedTuple):
    """A detector of transformers: its class, without "ForObjectDetection", and its processor's,
    without "ImageProcessor"; its published config here; the names of its parameters, and the prefix
    of those of timm's backbones; its options beside `OPTIONS`."""

    name: str
    processor: str
    config: str
    names: Rules
    body: str
    options: dict[str, str]


KINDS = {  # by `model_type`
    "dab-detr": Kind(
        "DabDetr", "ConditionalDetr", "dab_detr_r50", DAB, f"{BODY}_backbone.", DAB_OPTIONS
    ),
    "detr": Kind("Detr", "Detr", "detr_r50", DETR, BODY, {"hidden_dim": "d_model"}),
    "deformable_detr": Kind(
        "DeformableDetr",
        "DeformableDetr",
        "deformable_detr_r50",
        DEFORMABLE,
        BODY,
        DEFORMABLE_OPTIONS,
    ),
}
TYPES = {  # `model_type` of the models here
    "dab_detr": "dab-detr",
    "dn_dab_detr": "dab-detr",
    "detr": "detr",
    "deformable_detr": "deformable_detr",
    "dn_deformable_detr": "deformable_detr",
}
TEMPERATURES = ("temperature_height", "temperature_width")
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
SIZES_OF_BOTH = ("attention_heads", "ffn_dim")  # of encoder and decoder, equal here
# Settings with one value here.
FIXED = {
    "normalize_before": False,
    "keep_query_pos": False,
    "sine_position_embedding_scale": None,
    "position_embedding_type": "sine",
}


def read(path: Path, checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """See `conversion.read`; a directory, or the model.safetensors in it."""
    directory = path if path.is_dir() else path.parent
    theirs = read_json(directory / CONFIG)
    model_type = theirs.get("model_type")
    if model_type not in KINDS:
        raise UserError(
            f"no detector here corresponds to {model_type!r}, only to {', '.join(KINDS)}"
        )
    kind = KINDS[model_type]
    for name in SIZES_OF_BOTH:
        if theirs.get(f"encoder_{name}") != theirs.get(f"decoder_{name}"):
            raise UserError(f"{name} of encoder and decoder differ, which they cannot here")
    for name, only in FIXED.items():
        if theirs.get(name, only) != only:
            raise UserError(f"{name}: {theirs[name]!r} is not supported, only {only!r}")
    backbone = theirs.get("backbone_config") or {"backbone": theirs.get("backbone")}
    values = read_config(kind.config) | {"backbone": backbone_of(backbone)}
    names = OPTIONS | kind.options
    values |= {o: theirs[name] for o, name in names.items() if theirs.get(name) is not None}
    if backbone.get("output_stride") == 16:
        values["dilation"] = True
    if theirs.get("two_stage"):
        values["query_selection"] = "pure"
        values["num_queries"] = theirs.get("two_stage_num_proposals", 300)
    if (directory / PROCESSOR).exists():
        size = read_json(directory / PROCESSOR).get("size", {})
        values["data_aug_scales"] = [size.get("shortest_edge", Predictor.size)]
        values["data_aug_max_size"] = size.get("longest_edge", Predictor.max_size)

    state = dict(read_checkpoint(directory / WEIGHTS)["model"])
    join_projections(state)
    for name in [name for name in state if name.startswith("class_embed.0.")]:
        for i in range(1, values["dec_layers"]):  # without two stages one head, stored once
            state.setdefault(name.replace(".0.", f".{i}."), state[name])
    convs = [x for n, x in state.items() if re.fullmatch(r"model\.input_proj\.\d+\.0\.weight", n)]
    if convs:
        number = sum(conv.shape[-1] == 1 for conv in convs)
        values["return_interm_indices"] = list(range(4 - number, 4))
    values |= config
    labels = theirs.get("id2label", {})
    label_names = [labels[label] for label in sorted(labels, key=int)]
    class_map = ClassMap.of_names(label_names or ["LABEL_0", "LABEL_1"])  # its default
    options = DetectorOptions.of(values, num_classes=class_map.num_classes)
    check_counterpart(options)
    model, *_ = build_model(options)
    is_resnet = any(name.startswith(f"{BODY}embedder.") for name in state)
    ours = {their: name for name, their in names_of(model.state_dict(), kind, is_resnet).items()}
    state = {ours.get(name, name): tensor for name, tensor in state.items()}
    return assemble(state, values, class_map)


def names_of(names: Iterable[str], kind: Kind, is_resnet: bool = False) -> dict[str, str]:
    """{name here: name there}; `is_resnet`: the backbone is not timm's but transformers' own."""
    body = RESNET if is_resnet else [(r"^backbone\.0\.body\.", kind.body)]
    rules = [*kind.names, *NAMES]
    return {n: new_name(n, body if n.startswith("backbone.") else rules) for n in names}


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
    """The projections of queries, keys and values as one, like nn.MultiheadAttention."""
    for name in [name for name in state if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if state.keys() >= set(parts):
            joined = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".q_proj.", ".in_proj_")] = joined


def write(directory: Path, checkpoint: dict[str, Any]) -> None:
    """The directory of a detector of transformers that computes the same. UserError if it exists
    already, and for models without counterpart."""
    if directory.exists():
        raise UserError(f"{directory}: exists; name a new directory")
    class_map = ClassMap.from_state_dict(checkpoint["class_map"])
    options = DetectorOptions.of(checkpoint["config"], num_classes=class_map.num_classes)
    check_counterpart(options)
    model_type = TYPES[options.modelname]
    kind = KINDS[model_type]
    model, *_ = build_model(options)
    load_weights(model, checkpoint, source="the checkpoint")
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(STEP_COUNTER)}
    # Of the box heads' two names one is enough.
    state = {n: t for n, t in state.items() if f"transformer.decoder.{n}" not in state}
    if options.modelname == "dn_dab_detr":  # the content of matching queries, as a pattern
        content = with_indicator(state.pop("label_enc.weight")[-1:], options.hidden_dim, 0.0)
        patterns = state.get("transformer.patterns.weight", torch.zeros_like(content))
        state["transformer.patterns.weight"] = patterns + content
        options = dataclasses.replace(options, num_patterns=len(patterns))
    elif options.modelname == "dn_deformable_detr":
        state = {n: t for n, t in state.items() if not n.startswith(("label_enc.", "box_pos."))}
    names = names_of(state, kind)
    state = {names[name]: tensor.clone() for name, tensor in state.items()}
    for name in [name for name in state if ".in_proj_" in name]:
        for part, tensor in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".in_proj_", f".{part}_proj.")] = tensor.clone()
    config: dict[str, Any] = {n: getattr(options, o) for o, n in (OPTIONS | kind.options).items()}
    config |= {f"decoder_{name}": config[f"encoder_{name}"] for name in SIZES_OF_BOTH}
    config |= {name: int(config[name]) for name in TEMPERATURES if name in config}
    if model_type == "deformable_detr":
        config["two_stage"] = options.query_selection == "pure"
        config["two_stage_num_proposals"] = options.num_queries
    labels = {label: class_map.names.get(label, "N/A") for label in range(class_map.num_classes)}
    stages = [stage + 1 for stage in options.return_interm_indices]
    if options.backbone.startswith(PREFIX):
        stages = list(model.backbone[0].body.feature_info.out_indices)
    config |= {
        "model_type": model_type,
        "architectures": [f"{kind.name}ForObjectDetection"],
        "id2label": labels,
        "label2id": {name: label for label, name in labels.items()},
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": options.backbone.removeprefix(PREFIX),
            "out_indices": stages,
            "output_stride": 16 if options.dilation else None,
        },
    }
    size = max(checkpoint["config"].get("data_aug_scales", [Predictor.size]))
    max_size = checkpoint["config"].get("data_aug_max_size", Predictor.max_size)
    processor = {
        "image_processor_type": f"{kind.processor}ImageProcessor",
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
    """UserError unless a detector of transformers can be this one."""
    name, backbone = options.modelname, options.backbone
    if name not in TYPES:
        raise UserError(f"modelname: transformers has no {name}, only {', '.join(TYPES)}")
    if not backbone.startswith(PREFIX) and backbone not in RESNETS.values():
        raise UserError(f"backbone: transformers has no {backbone}, only ResNets and timm's")
    kind = KINDS[TYPES[name]]
    published = load_options(kind.config)
    fixed = {"class_loss", "pe_offset", "pe_temperatureH", "pe_temperatureW"} - kind.options.keys()
    for option in sorted(fixed):
        if getattr(options, option) != (only := getattr(published, option)):
            raise UserError(f"{option}: in transformers it is always {only}")
    if options.pe_temperatureH % 1 or options.pe_temperatureW % 1:
        raise UserError("pe_temperature: in transformers it is a whole number")
    if TYPES[name] == "deformable_detr" and (options.hidden_dim % 32 or options.hidden_dim == 32):
        raise UserError("hidden_dim: in transformers it is 64 or another multiple of 32")
