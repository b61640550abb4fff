"""An implementation of others, with the same weights, gives the same boxes and scores.

transformers' DAB-DETR was ported from the authors' code by other people and verified by them on the
released checkpoints.
"""

import re

import pytest
import torch

from models import build_model
from util.config import load_config

transformers = pytest.importorskip("transformers")

# Ours -> theirs, as regular expressions applied in order.
NAMES = [
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^refpoint_embed\.", "model.query_refpoint_embeddings."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model._backbone."),
    (r"^transformer\.", "model."),
    (r"^model\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.self_attn.self_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.cross_attn.cross_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm3", r"\1.mlp.final_layer_norm"),
    (r"(decoder\.layers\.\d+)\.linear1", r"\1.mlp.fc1"),
    (r"(decoder\.layers\.\d+)\.linear2", r"\1.mlp.fc2"),
    (r"(decoder\.layers\.\d+)\.activation", r"\1.mlp.activation_fn"),
    (r"(decoder\.layers\.\d+)\.(self|cross)_attn\.out_proj", r"\1.\2_attn.\2_attn.output_proj"),
    (r"\.sa_q(content|pos)_proj", r".self_attn.self_attn_query_\1_proj"),
    (r"\.sa_k(content|pos)_proj", r".self_attn.self_attn_key_\1_proj"),
    (r"\.sa_v_proj", ".self_attn.self_attn_value_proj"),
    (r"\.ca_qpos_sine_proj", ".cross_attn.cross_attn_query_pos_sine_proj"),
    (r"\.ca_q(content|pos)_proj", r".cross_attn.cross_attn_query_\1_proj"),
    (r"\.ca_k(content|pos)_proj", r".cross_attn.cross_attn_key_\1_proj"),
    (r"\.ca_v_proj", ".cross_attn.cross_attn_value_proj"),
    (r"(encoder\.layers\.\d+)\.norm1", r"\1.self_attn_layer_norm"),
    (r"(encoder\.layers\.\d+)\.norm2", r"\1.final_layer_norm"),
    (r"(encoder\.layers\.\d+)\.linear1", r"\1.fc1"),
    (r"(encoder\.layers\.\d+)\.linear2", r"\1.fc2"),
    (r"(encoder\.layers\.\d+)\.activation\.", r"\1.activation_fn."),
]


def their_state_dict(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, value in ours.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if "self_attn.in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = chunk
        else:
            theirs[name] = value
    return theirs


@pytest.mark.parametrize("num_patterns", [0, 2])
def test_dab_detr_equals_transformers(num_patterns: int):
    torch.manual_seed(0)
    cfg = load_config(
        "configs/dab_detr_r50.py",
        {
            "backbone": "resnet18",
            "hidden_dim": 64,
            "nheads": 4,
            "enc_layers": 2,
            "dec_layers": 3,
            "dim_feedforward": 96,
            "num_queries": 20,
            "num_classes": 7,
            "num_patterns": num_patterns,
        },
    )
    model, _, _ = build_model(cfg)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.ndim == 1 or "bbox_embed" in name:
            tensor.data.add_(0.1 * torch.randn_like(tensor))
    their_config = transformers.DabDetrConfig(
        backbone="resnet18",
        hidden_size=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=20,
        num_labels=7,
        num_patterns=num_patterns,
        dropout=0.0,
        auxiliary_loss=True,
    )
    theirs = transformers.DabDetrForObjectDetection(their_config)
    report = theirs.load_state_dict(their_state_dict(model.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert all("num_batches_tracked" in k for k in report.missing_keys)

    images = [torch.randn(3, 96, 128), torch.randn(3, 128, 96)]
    pixels = torch.zeros(2, 3, 128, 128)
    valid = torch.zeros(2, 128, 128, dtype=torch.long)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        valid[i, : image.shape[1], : image.shape[2]] = 1
    model.eval(), theirs.eval()
    with torch.no_grad():
        mine = model(images)
        other = theirs(pixel_values=pixels, pixel_mask=valid)
    torch.testing.assert_close(mine["pred_logits"], other.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mine["pred_boxes"], other.pred_boxes, atol=2e-5, rtol=1e-4)
    assert mine["pred_boxes"].std() > 0.05, "boxes that are all alike would prove little"
