"""detrex 0.3 (IDEA-Research): DAB-DETR, DN-DETR, DAB- and DN-Deformable-DETR, DINO, with the
ResNets and Swin Transformers of detectron2.

In its published configs images are RGB and normalised as here, and labels are COCO's 80.
"""

import logging
from pathlib import Path
from typing import Any

from ..class_map import ClassMap
from ..weights import num_classes_of, state_dict_of
from .common import (
    FEED_FORWARD,
    Rules,
    assemble,
    count,
    neck_rules,
    norm_rules,
    options_of,
    pad_labels,
    rename,
)

logger = logging.getLogger(__name__)

# The position encoding of its deformable models, except of DINO after 24 epochs or more.
POSITIONS = {"pe_temperatureH": 10000, "pe_temperatureW": 10000, "pe_offset": -0.5}
NOTE = (
    "%s: position encoding as in detrex's configs of 12 epochs; those of 24 and more have the "
    "published one: for these add -m dino"
)

NAMES: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.0.body.bn1."),
    (r"^backbone\.stem\.", "backbone.0.body."),
    *((rf"^backbone\.res{i + 1}\.", f"backbone.0.body.layer{i}.") for i in range(1, 5)),
    (r"(body\.layer.*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"(body\.layer.*)\.shortcut\.", r"\1.downsample.0."),
    (r"(body\.layer.*)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^backbone\.(patch_embed|layers|norm\d)", r"backbone.0.\1"),
    (r"^(anchor_box|refpoint)_embed\.", "refpoint_embed."),
    (r"^(denoising_generator\.)?label_encoder\.", "label_enc."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"^(transformer\.decoder)\.post_norm_layer\.", r"\1.norm."),
)
DENSE: Rules = (
    (r"(decoder.*)\.attentions\.0\.out_proj\.", r"\1.self_attn.out_proj."),
    (r"(decoder.*)\.attentions\.1\.out_proj\.", r"\1.cross_attn.out_proj."),
    (r"(decoder.*)\.attentions\.0\.", r"\1.sa_"),
    (r"(decoder.*)\.attentions\.1\.", r"\1.ca_"),
    (r"\.([sc]a)_query_", r".\1_q"),
    (r"\.([sc]a)_key_", r".\1_k"),
    (r"\.([sc]a)_value_", r".\1_v_"),
)
ATTENTION: Rules = (
    (r"\.attentions\.0\.(attn\.)?", ".self_attn."),
    (r"\.attentions\.1\.", ".cross_attn."),
)


def read(path: Path, checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """See `conversion.read`."""
    theirs = state_dict_of(checkpoint, "it")
    is_deformable = "transformer.level_embeds" in theirs
    rules = [*NAMES, *neck_rules(theirs, "norm"), *FEED_FORWARD, *norm_rules(is_deformable)]
    rules += [*(() if is_deformable else DENSE), *ATTENTION]
    rules += [(r"^transformer\.decoder\.((class|bbox)_embed\.)", r"\1")]
    layers = count(theirs, r"transformer\.decoder\.layers")
    rules += [(rf"^(class|bbox)_embed\.{layers}\.", r"transformer.enc_out_\1_embed.")]
    state = rename(theirs, rules)
    num_classes = num_classes_of(state) or 1
    pad_labels(state, num_classes)
    values = options_of(state, POSITIONS if is_deformable and not config else {}, config)
    if values["modelname"] == "dino" and not config:
        logger.info(NOTE, path)
    return assemble(state, values, ClassMap.of_count(num_classes))
