"""Deformable DETR: equality with transformers' port, denoising, the released options and states."""

import dataclasses

import pytest
import torch
from torch import nn

from models import build_model
from models.dn_components import inverse_sigmoid
from models.errors import UserError
from tests.test_deformable import initial_weights, is_xavier
from tests.test_deformable import make_batch as make_small_batch
from tests.test_oracle import (
    DEFORMABLE_NAMES,
    close,
    load_all,
    padded_images,
    randomise,
    their_sizes,
    their_state_dict,
    transformers,
)
from util.config import load_config, parse_command_line
from util.optim import build_optimizer, load_released_state, parameter_groups

VARIANTS = {
    "deformable_detr_r50": {},
    "deformable_detr_r50_refine": {"with_box_refine": True},
    "deformable_detr_r50_two_stage": {"with_box_refine": True, "two_stage": True},
}
DENOISING = {
    "plain": {"with_box_refine": False},
    "refine": {},
    "two stages": {"query_selection": "pure"},
    "contrastive": {"contrastive": True},
}
SMALL = {
    "backbone": "resnet18",
    "pretrained_backbone": False,
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 2,
    "dec_layers": 3,
    "enc_n_points": 3,
    "dec_n_points": 2,
    "dim_feedforward": 96,
    "num_queries": 20,
    "num_classes": 7,
    "dropout": 0.0,
}


def build(config: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model, _, _ = build_model(load_config(f"configs/{config}.py", SMALL | options))
    randomise(model)
    return model


@pytest.mark.parametrize("config", VARIANTS)
def test_equals_transformers(config: str):
    """All layers, for images with padding; in two stages also the tokens' predictions. And the
    gradients inside the model. (Without two stages theirs share a class head.)"""
    model = build(config)
    their_config = transformers.DeformableDetrConfig(
        **their_sizes(SMALL),
        encoder_n_points=3,
        decoder_n_points=2,
        num_queries=20,
        two_stage_num_proposals=20,
        **VARIANTS[config],
    )
    theirs = transformers.DeformableDetrForObjectDetection(their_config)
    names = [(r"^query_embed\.", "model.query_position_embeddings."), *DEFORMABLE_NAMES]
    load_all(theirs, their_state_dict(model.state_dict(), names))
    images = padded_images((70, 420), (120, 260))
    model.eval(), theirs.eval()
    ours = model(images)
    other = theirs(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
    close(ours["states"], other.intermediate_hidden_states.transpose(0, 1))
    close(ours["pred_logits"], other.logits)
    close(ours["pred_boxes"], other.pred_boxes)
    start = other.init_reference_points
    close(ours["anchors"][0, ..., : start.shape[-1]], start)
    if config != "deformable_detr_r50":
        close(ours["anchors"][1:], other.intermediate_reference_points.transpose(0, 1)[:-1])
    if "enc_outputs" in ours:
        close(ours["enc_outputs"]["pred_logits"], other.enc_outputs_class)
        close(ours["enc_outputs"]["pred_boxes"], other.enc_outputs_coord_logits.sigmoid())
    assert ours["pred_boxes"].std() > 0.05, "the comparison is vacuous"

    (ours["pred_logits"].square().sum() + ours["pred_boxes"].square().sum()).backward()
    (other.logits.square().sum() + other.pred_boxes.square().sum()).backward()
    own = model.named_parameters(remove_duplicate=False)
    gradients = their_state_dict({n: p.grad for n, p in own if p.grad is not None}, names)
    for name, parameter in theirs.model.named_parameters(prefix="model"):
        if parameter.grad is not None:
            error = (gradients[name] - parameter.grad).norm()
            assert error <= 1e-4 * parameter.grad.norm() + 1e-5, name


@pytest.mark.parametrize("config", VARIANTS)
def test_initial_weights(config: str):
    weights = initial_weights(config)
    small = [0, 0, 0, 0] if config.endswith("two_stage") else [0, 0, -2, -2]
    later = small if config == "deformable_detr_r50" else [0, 0, 0, 0]
    assert weights["bbox_embed.0.layers.2.bias"].tolist() == small
    assert weights["bbox_embed.1.layers.2.bias"].tolist() == later
    assert weights["bbox_embed.1.layers.2.weight"].eq(0).all()
    if config.endswith("two_stage"):
        assert is_xavier(weights["transformer.pos_trans.weight"])
        assert weights["transformer.pos_trans.bias"].any()  # PyTorch's default
    else:
        assert weights["query_embed.weight"].std() == pytest.approx(1, rel=0.05)
        points = weights["transformer.reference_points.weight"]
        assert points.abs().max() <= (6 / (64 + 2)) ** 0.5 and points.std() > 0.15
        assert weights["transformer.reference_points.bias"].eq(0).all()


# -- denoising


@pytest.mark.parametrize("options", DENOISING.values(), ids=DENOISING)
def test_matching_queries_do_not_see_denoising_ones(options: dict):
    """In training, outputs are those of inference and of the model without denoising, and have no
    gradient with respect to what only denoising queries are made of."""
    model = build("dn_deformable_detr_r50", **options).train()
    images, targets = make_small_batch()
    trained = model(images, targets)
    plain = build("deformable_detr_r50_refine", **options | {"contrastive": False})
    shared = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in shared})
    for other in (model.eval()(images), plain(images)):
        assert "dn" not in other
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(trained[key], other[key], atol=1e-5, rtol=1e-4)
    only_denoising = [p for n, p in model.named_parameters() if n not in shared]
    assert {n.split(".")[0] for n, _ in model.named_parameters() if n not in shared} == (
        {"label_enc"} if "query_selection" in options else {"label_enc", "box_pos"}
    )
    for outputs, is_denoising in ((trained, False), (vars(trained["dn"]), True)):
        # Squares, as after a LayerNorm a plain sum may be constant.
        total = sum(outputs[key].square().sum() for key in ("pred_logits", "pred_boxes"))
        gradients = torch.autograd.grad(total, only_denoising, retain_graph=True)
        assert all(bool(g.any()) == is_denoising for g in gradients)


@pytest.mark.parametrize("refines", [False, True])
def test_points_and_boxes_go_through_one_decoder(refines: bool):
    """Denoising queries start from their boxes, matching ones from points, whose size counts as
    half the image where it is refined; only refinement changes either."""
    noise = {"dn_label_noise_ratio": 0.0, "dn_box_noise_scale": 0.0, "with_box_refine": refines}
    model = build("dn_deformable_detr_r50", **noise).train()
    images, targets = make_small_batch()
    seen, decode = [], model.decode
    model.decode = lambda *args: seen.append(decode(*args)) or seen[0]
    dn = model(images, targets)["dn"]
    anchors = seen[0].anchors
    torch.testing.assert_close(anchors[0][dn.to_box], dn.boxes)
    assert (anchors[0][:, dn.num_queries :, 2:] == 0.5).all()
    points = model.transformer.reference_points(model.query_embed.weight[:, :64]).sigmoid()
    torch.testing.assert_close(anchors[0][0, dn.num_queries :, :2], points)
    expected = seen[0].boxes[:-1] if refines else anchors[:1].expand(2, -1, -1, -1)
    assert torch.equal(anchors[1:], expected)


def test_noised_boxes_become_references():
    for options in ({}, {"query_selection": "pure"}):
        model = build("dn_deformable_detr_r50", **options)
        boxes = torch.rand(6, 4)
        position, references = model.embed_boxes(boxes).split([64, 4], dim=-1)
        torch.testing.assert_close(references, inverse_sigmoid(boxes, eps=1e-5))
        assert not torch.isclose(position[0], position[1]).all()


# -- options and files of the released code


@pytest.mark.parametrize(
    ("line", "config", "changes"),
    [
        ("", "deformable_detr_r50", {}),
        ("--with_box_refine", "deformable_detr_r50_refine", {}),
        ("--with_box_refine --two_stage", "deformable_detr_r50_two_stage", {}),
        (
            "--num_feature_levels 1",
            "deformable_detr_r50",
            {"num_feature_levels": 1, "return_interm_indices": [3]},
        ),
        (
            "--num_feature_levels 1 --dilation",
            "deformable_detr_r50",
            {"num_feature_levels": 1, "return_interm_indices": [3], "dilation": True},
        ),
        ("--no_aux_loss", "deformable_detr_r50", {"aux_loss": False}),
        ("--position_embedding_scale 6.283185307179586", "deformable_detr_r50", {}),
    ],
)
def test_released_command_lines(line: str, config: str, changes: dict):
    command = ["-m", "deformable_detr", "--output_dir", "exps/r50", "--eval", "--resume", "FILE"]
    found = dataclasses.asdict(parse_command_line([*command, *line.split()]))
    expected = dataclasses.asdict(load_config(f"configs/{config}.py"))
    expected |= {"output_dir": "exps/r50", "eval": True, "resume": "FILE"}
    assert found == expected | changes


@pytest.mark.parametrize(
    ("line", "model"),
    [
        ("-m dn_deformable_detr --use_dn", "dn_deformable_detr"),
        ("-m dn_deformable_detr --use_dn --transformer_activation gelu", "dn_deformable_detr"),
        ("-m dn_deformable_detr --transformer_activation relu", "dn_dab_deformable_detr"),
    ],
)
def test_published_command_of_dn_detr_means_its_own_model(line: str, model: str):
    assert parse_command_line(line.split()).modelname == model


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--two_stage", "deformable_detr in two stages needs with_box_refine"),
        ("--with_box_refine --two_stage --use_mqs", "query_selection mixed.* has neither"),
        ("--use_lft", "look_forward_twice: deformable_detr has neither"),
        ("--random_refpoints_xy", "random_refpoints_xy: deformable_detr predicts"),
        ("--num_patterns 3", "num_patterns: deformable_detr has none"),
        ("--use_dn", "use -m dn_deformable_detr"),
    ],
)
def test_unsupported_options_are_rejected(line: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        parse_command_line(["-m", "deformable_detr", *line.split()])
    assert "\n" not in str(error.value)


def test_optimizer_state_of_a_released_checkpoint():
    """Three groups: the third, of the lower rate, has reference points and sampling offsets."""
    model, cfg = build("deformable_detr_r50_refine"), load_config("configs/deformable_detr_r50.py")
    cfg.lr_backbone = 1e-5  # unlike that of the lower rate
    low = "reference_points", "sampling_offsets"
    kinds: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        is_low = any(part in name for part in low)
        kinds["backbone.0" in name or 2 * is_low].append(parameter)
        parameter.grad = torch.randn_like(parameter)
    rates = {group["lr"]: len(group["params"]) for group in parameter_groups(model, cfg)}
    assert rates == {lr: len(k) for lr, k in zip((2e-4, 1e-5, 2e-5), kinds, strict=True)}
    released = torch.optim.AdamW([{"params": kind} for kind in kinds])
    released.step()
    checkpoint = {"model": model.state_dict(), "optimizer": released.state_dict()}
    optimizer = build_optimizer(model, cfg)
    assert load_released_state(optimizer, model, checkpoint)
    for parameter in model.parameters():
        ours, theirs = (o.state[parameter]["exp_avg"] for o in (optimizer, released))
        assert torch.equal(ours, theirs)
