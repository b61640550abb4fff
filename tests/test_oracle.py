"""Independent implementations with the same weights give the same boxes and scores.

transformers' DAB-DETR and Deformable DETR were ported from the authors' code by others, who
verified them on the released checkpoints. Tolerances cover float32 summation order.
"""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from models import build_model
from models.detector import Encoded, Queries
from models.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
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
DETR_NAMES = [
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^transformer\.", "model."),
    (r"^model\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"(coder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"\.(self|encoder)_attn\.out_proj\.", r".\1_attn.o_proj."),
]
MASK_NAMES = [
    (r"\.([qk])_linear\.", r".\1_proj."),
    (r"\.lay([12])\.", r".conv\1.conv."),
    (r"\.gn([12])\.", r".conv\1.norm."),
    (r"\.out_lay\.", ".output_conv."),
    *((rf"\.lay{i + 3}\.", f".fpn_stages.{i}.refine.conv.") for i in range(3)),
    *((rf"\.gn{i + 3}\.", f".fpn_stages.{i}.refine.norm.") for i in range(3)),
    *((rf"\.adapter{i + 1}\.", f".fpn_stages.{i}.fpn_adapter.") for i in range(3)),
]
DEFORMABLE_NAMES = [
    (r"^input_proj\.", "model.input_proj."),
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1", r"\1.self_attn_layer_norm"),
    (r"(encoder\.layers\.\d+)\.norm2", r"\1.final_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.self_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm3", r"\1.final_layer_norm"),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
]


def their_state_dict(
    ours: dict[str, torch.Tensor], names: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, value in ours.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if "_attn.in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = chunk
        else:
            theirs[name] = value
    return theirs


def randomise(model: nn.Module) -> None:
    """Perturbs initial values that would hide a difference, above all zeros."""
    zeros = ("bbox_embed", "sampling_offsets", "attention_weights")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.ndim == 1 or any(part in name for part in zeros):
            tensor.data.add_(0.1 * torch.randn_like(tensor))


def padded_images(*sizes: tuple[int, int]) -> NestedTensor:
    return nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes])


def close(ours: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(ours, other, atol=2e-5, rtol=1e-5)


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
    randomise(model)
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
    report = theirs.load_state_dict(their_state_dict(model.state_dict(), NAMES), strict=False)
    assert not report.unexpected_keys
    assert all("num_batches_tracked" in k for k in report.missing_keys)

    images = padded_images((96, 128), (128, 96))
    model.eval(), theirs.eval()
    with torch.no_grad():
        ours = model(images)
        other = theirs(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
    close(ours["pred_logits"], other.logits)
    close(ours["pred_boxes"], other.pred_boxes)
    assert ours["pred_boxes"].std() > 0.05, "the comparison would be vacuous"


def their_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model here as those of transformers' configs."""
    found = {"d_model": options["hidden_dim"], "backbone": options["backbone"], "dropout": 0.0}
    found["num_labels"] = options["num_classes"]
    for part, layers in (("encoder", "enc_layers"), ("decoder", "dec_layers")):
        found |= {f"{part}_attention_heads": options["nheads"], f"{part}_layers": options[layers]}
        found |= {f"{part}_ffn_dim": options["dim_feedforward"]}
    return found


def load_all(theirs: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """All of their weights, and no others."""
    report = theirs.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert all("num_batches_tracked" in k for k in report.missing_keys)


def test_detr_equals_transformers():
    """Outputs, losses and scores. Without auxiliary losses, with which theirs, unlike the released
    code, feeds each layer the normalised output of the one before."""
    torch.manual_seed(0)
    sizes = {"dim_feedforward": 96, "enc_layers": 2, "dec_layers": 3, "hidden_dim": 64, "nheads": 4}
    sizes |= {"backbone": "resnet18", "num_queries": 20, "num_classes": 7, "dropout": 0.0}
    model, criterion, postprocess = build_model("detr_r50", **sizes)
    randomise(model)
    their_config = transformers.DetrConfig(**their_sizes(sizes), num_queries=20)
    theirs = transformers.DetrForObjectDetection(their_config)
    load_all(theirs, their_state_dict(model.state_dict(), DETR_NAMES))

    images = padded_images((96, 128), (128, 96))
    boxes = 0.2 + 0.3 * torch.rand(5, 4)
    targets = [
        {"labels": torch.tensor([1, 6, 0]), "boxes": boxes[:3]},
        {"labels": torch.tensor([2, 2]), "boxes": boxes[3:]},
    ]
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    model.eval(), theirs.eval()
    with torch.no_grad():
        ours = model(images)
        losses = criterion(ours, targets)
        their_inputs = {"pixel_values": images.tensors, "pixel_mask": (~images.mask).long()}
        other = theirs(**their_inputs, labels=labels)
    close(ours["pred_logits"], other.logits)
    close(ours["pred_boxes"], other.pred_boxes)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        close(losses[name], other.loss_dict[name])
    assert ours["pred_boxes"].std() > 0.05, "the comparison would be vacuous"
    processor = transformers.DetrImageProcessor()
    sizes = torch.tensor([[96, 128], [128, 96]])
    found = processor.post_process_object_detection(other, threshold=0, target_sizes=sizes)
    for mine, result in zip(postprocess(ours, sizes), found, strict=True):
        close(mine["scores"], result["scores"].sort(descending=True).values)


def test_mask_head_equals_transformers():
    """Logits, losses and masks, with padding in the batch."""
    torch.manual_seed(0)
    sizes = {"dim_feedforward": 96, "enc_layers": 1, "dec_layers": 1, "hidden_dim": 64, "nheads": 8}
    sizes |= {"backbone": "resnet18", "num_queries": 9, "num_classes": 7, "dropout": 0.0}
    model, criterion, postprocess = build_model("detr_r50", masks=True, **sizes)
    randomise(model)
    their_config = transformers.DetrConfig(**their_sizes(sizes), num_queries=9)
    theirs = transformers.DetrForSegmentation(their_config)
    detector = their_state_dict(model.detr.state_dict(), DETR_NAMES)
    weights = {f"detr.{name}": value for name, value in detector.items()}
    head = {k: v for k, v in model.state_dict().items() if not k.startswith("detr.")}
    weights |= their_state_dict(head, MASK_NAMES)
    load_all(theirs, weights)

    images = padded_images((96, 128), (120, 90))
    targets = [{"labels": torch.arange(n), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in (3, 2)]
    targets[0]["masks"] = torch.rand(3, 96, 128) > 0.3
    targets[1]["masks"] = torch.rand(2, 120, 90) > 0.6
    labels = [{"class_labels": t["labels"], **t} for t in targets]
    model.eval(), theirs.eval()
    with torch.no_grad():
        ours = model(images)
        losses = criterion(ours, targets)
        their_inputs = {"pixel_values": images.tensors, "pixel_mask": (~images.mask).long()}
        other = theirs(**their_inputs, labels=labels)
    close(ours["pred_masks"], other.pred_masks)
    assert ours["pred_masks"].std() > 0.05, "the comparison would be vacuous"
    for name in ("loss_mask", "loss_dice"):
        close(losses[name], other.loss_dict[name])
        assert criterion.weight_dict[name] == 1
    found = postprocess(ours, torch.tensor([[96, 128], [60, 45]]))
    for i, (height, width) in enumerate([(96, 128), (120, 90)]):
        query = ours["pred_logits"][i].softmax(-1)[:, :-1].amax(1).argsort(descending=True)
        logits = nn.functional.interpolate(other.pred_masks, images.mask.shape[1:], mode="bilinear")
        expected = logits[i, query, :height, :width] > 0
        expected = expected if i == 0 else expected[:, ::2, ::2]  # nearest, at half the size
        assert torch.equal(found[i]["masks"], expected) and expected.any() and not expected.all()


def test_deformable_encoder_selection_and_decoder_equal_transformers():
    """Two-stage Deformable DETR with box refinement and four levels, one beyond the backbone's.

    The two differ only in the queries: theirs derive the content and a positional query shared by
    all layers from the selected anchors through `pos_trans`. Our decoder uses theirs here.
    `deformable_detr`, which has the same queries, is in test_original_deformable_detr.py.
    """
    torch.manual_seed(0)
    options = {"dim_feedforward": 96, "enc_layers": 2, "dec_layers": 3, "hidden_dim": 64}
    options |= {"nheads": 4, "enc_n_points": 3, "dec_n_points": 2, "query_selection": "pure"}
    options |= {"backbone": "resnet18", "num_queries": 20, "num_classes": 7}
    model, _, _ = build_model(load_config("configs/dab_deformable_detr_r50.py", options))
    randomise(model)
    transformer, decoder = model.transformer, model.transformer.decoder
    decoder.query_scale = None  # as with `scales_queries=False`
    del decoder.ref_point_head
    # Tokens without a proposal, which have equal features, must score lowest: the two models would
    # clamp a selected infinite anchor differently, see below.
    featureless = transformer.enc_output_norm(transformer.enc_output.bias)
    model.class_embed[-1].weight.data[0] = -0.1 * featureless
    their_config = transformers.DeformableDetrConfig(
        **their_sizes(options),
        encoder_n_points=3,
        decoder_n_points=2,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=20,
    )
    theirs = transformers.DeformableDetrForObjectDetection(their_config)
    weights = their_state_dict(model.state_dict(), DEFORMABLE_NAMES)
    report = theirs.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert all("pos_trans" in key for key in report.missing_keys)
    base = theirs.model
    randomise(base.pos_trans_norm)

    def their_queries(encoded: Encoded) -> Queries:
        selected = model.select(encoded.memory, encoded.tokens)
        embedded = base.get_proposal_pos_embed(selected.anchors)
        query_pos, content = base.pos_trans_norm(base.pos_trans(embedded)).chunk(2, dim=-1)
        decoder.ref_point_head = lambda _: query_pos
        return Queries(content, selected.anchors, {})

    model.queries = their_queries
    # Not multiples of the strides, so that levels differ in padding. Wide enough for proposals
    # within 0.01 of the edge, which are discarded.
    images = padded_images((70, 420), (120, 260))
    model.eval(), theirs.eval()
    with torch.no_grad():
        encoded = model.encode(images)
        memory, tokens = encoded.memory, encoded.tokens
        selected, queries = model.select(memory, tokens), model.queries(encoded)
        states, boxes, _ = decoder(queries.content, queries.anchors, None, memory, tokens)
        ours = model(images)
        other = theirs(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
    close(memory, other.encoder_last_hidden_state)  # including padding tokens
    close(selected.logits, other.enc_outputs_class)
    close(selected.boxes, other.enc_outputs_coord_logits)  # infinite at the same tokens
    index = other.enc_outputs_class[..., 0].topk(20, dim=1).indices
    torch.testing.assert_close(selected.index, index)
    anchors = selected.anchors.sigmoid()
    close(anchors, other.init_reference_points)
    # Our inverse sigmoid clamps at 1e-3, theirs at 1e-5: the box heads are small enough that no
    # box gets there.
    refined = torch.cat([anchors[None], boxes[:-1]])
    assert refined.min() > 1e-3 and refined.max() < 1 - 1e-3
    close(states, other.intermediate_hidden_states.transpose(0, 1))
    close(boxes, other.intermediate_reference_points.transpose(0, 1))
    close(ours["pred_logits"], other.logits)
    close(ours["pred_boxes"], other.pred_boxes)
    assert anchors.std() > 0.05 and (boxes - anchors).std() > 0.01, "the comparison is vacuous"
