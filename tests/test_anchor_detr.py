"""Anchor DETR: its attention, initial weights and names, as released, and its denoising."""

import re

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.anchor_detr import Pixels, RowColumnAttention
from models.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from models.options import ModelOptions
from tests.test_models import SMALL, make_targets
from util.config import load_config, parse_command_line
from util.matching_log import MatchingLog
from util.optim import parameter_groups

TINY = {"backbone": "timm/test_resnet", "batch_norm_type": "BatchNorm2d"}
TINY |= {"pretrained_backbone": False}


def small_model(config: str = "dn_anchor_detr_r50_dc5", **overrides):
    torch.manual_seed(0)
    return build_model(load_config(f"configs/{config}.py", SMALL | {"dilation": False} | overrides))


def batch_of_two() -> NestedTensor:
    return nested_tensor_from_tensor_list([torch.randn(3, 96, 64), torch.randn(3, 64, 128)])


@pytest.mark.parametrize(("height", "width"), [(3, 5), (6, 4)])
def test_row_column_attention_is_attention_with_a_product_of_weights(height: int, width: int):
    """Against the definition: softmax over the columns times softmax over the rows."""
    torch.manual_seed(0)
    dim, heads, padded = 16, 4, torch.zeros(2, height, width, dtype=torch.bool)
    padded[1, -1], padded[1, :, -2:] = True, True
    attention = RowColumnAttention(ModelOptions(hidden_dim=dim, nheads=heads))
    nn.init.normal_(attention.in_proj_bias)
    content, x, y = torch.randn(3, 2, 7, dim)
    memory = torch.randn(2, height, width, dim)
    of_x, of_y = torch.randn(2, 1, width, dim), torch.randn(2, height, 1, dim)
    of_axes = padded[:, 0], padded[:, :, 0]
    masks = [torch.zeros(m.shape).masked_fill(m, -torch.inf)[:, None, None] for m in of_axes]
    actual = attention(content, (x, y), memory, Pixels((of_x, of_y), tuple(masks)))

    weight, bias = attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5)
    projected = [
        (inputs @ w.T + b).unflatten(-1, (heads, -1))
        for inputs, w, b in zip(
            (content + x, content + y, memory + of_x, memory + of_y, memory),
            weight,
            bias,
            strict=True,
        )
    ]
    q_x, q_y, k_x, k_y, value = projected
    scale = (dim // heads) ** -0.5
    across = torch.einsum("bnhd,bwhd->bhnw", q_x, k_x.mean(1)) * scale + masks[0]
    down = torch.einsum("bnhd,byhd->bhny", q_y, k_y.mean(2)) * scale + masks[1]
    weights = down.softmax(-1)[..., :, None] * across.softmax(-1)[..., None, :]
    expected = torch.einsum("bhnyw,bywhd->bnhd", weights, value).flatten(2)
    torch.testing.assert_close(actual, attention.out_proj(expected))


def test_names_are_the_released_ones():
    """Shared heads are listed for every layer; numbers of layers are left out here."""
    state = small_model("anchor_detr_r50")[0].state_dict()
    names = {re.sub(r"(_layers|_embed)\.\d\.", r"\1.", name) for name in state}
    both = lambda *prefixes: {f"{p}.{kind}" for p in prefixes for kind in ("weight", "bias")}
    attention = lambda name: both(f"{name}.out_proj") | {f"{name}.in_proj_{k}" for k in KINDS}
    block = both("norm1", "ffn.linear1", "ffn.linear2", "ffn.norm2") | attention("self_attn")
    transformer = {f"encoder_layers.{name}" for name in block}
    transformer |= {
        f"decoder_layers.{name}" for name in block | both("norm2") | attention("cross_attn")
    }
    transformer |= both(*(f"adapt_pos{n}d.{i}" for n in (1, 2) for i in (0, 2)), "class_embed")
    transformer |= both(*(f"bbox_embed.layers.{i}" for i in range(3)))
    transformer |= {"pattern.weight", "position.weight"}
    expected = {f"transformer.{name}" for name in transformer}
    expected |= both("input_proj.0.0", "input_proj.0.1")
    assert {name for name in names if not name.startswith("backbone.body.")} == expected
    assert "backbone.body.layer4.1.conv2.weight" in names
    in_proj = "transformer.decoder_layers.1.{}_attn.in_proj_weight"
    assert state[in_proj.format("cross")].shape == (5 * 64, 64)
    assert state[in_proj.format("self")].shape == (3 * 64, 64)


KINDS = ("weight", "bias")


def test_initial_weights():
    transformer = small_model("anchor_detr_r50", hidden_dim=128, num_queries=300)[0].transformer
    first, second = transformer.decoder_layers
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    in_proj = first.cross_attn.in_proj_weight
    limit = (6 / (6 * 128)) ** 0.5  # Xavier's, of the whole matrix
    assert 0.99 * limit < in_proj.abs().max() <= limit
    assert first.cross_attn.in_proj_bias.eq(0).all() and first.self_attn.out_proj.bias.eq(0).all()
    limit = 128**-0.5  # PyTorch's
    for layer in (first.ffn.linear1, first.cross_attn.out_proj, transformer.adapt_pos2d[0]):
        assert 0.99 * limit < layer.weight.abs().max() <= limit
    points, patterns = transformer.position.weight, transformer.pattern.weight
    assert 0 <= points.min() < 0.02 and 0.98 < points.max() <= 1
    assert patterns.shape == (3, 128) and abs(patterns.std() - 1) < 0.1
    assert transformer.class_embed[0] is transformer.class_embed[1]
    torch.testing.assert_close(transformer.class_embed[0].bias.sigmoid(), torch.full((5,), 0.01))
    assert transformer.bbox_embed[0].layers[-1].weight.eq(0).all()
    assert transformer.bbox_embed[0].layers[-1].bias.tolist() == [0, 0, -2, -2]


def test_boxes_start_at_the_points():
    model, _, _ = small_model("anchor_detr_r50")
    out = model.eval()([torch.randn(3, 64, 96)])
    centres = out["pred_boxes"][0, :, :2].unflatten(0, (3, 12))  # of each pattern
    torch.testing.assert_close(centres, model.transformer.position.weight.expand(3, -1, -1))
    assert torch.equal(out["anchors"][0, 0, :12], model.transformer.position.weight)


def test_grid_of_points():
    model, _, _ = small_model("anchor_detr_r50", num_queries=17, spatial_prior="grid")
    assert "transformer.position.weight" not in model.state_dict()
    out = model.train()(batch_of_two())
    points = out["anchors"][0, 0].unflatten(0, (3, 4, 4))
    centres = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(points[1, ..., 0], centres[:, None].expand(4, 4))
    assert torch.equal(points[2, ..., 1], centres.expand(4, 4))


def test_position_is_relative_to_the_image_without_padding():
    model, _, _ = small_model("anchor_detr_r50")
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0], mask[1, :2, :2] = False, False
    _, pixels = model.transformer.encode(torch.randn(2, 3, 4, 64), mask)
    across, down = model.transformer.embed_axes(*torch.tensor([[0.25, 0.75]] * 2))
    torch.testing.assert_close(pixels.positions[0][1, 0, :2], across)
    torch.testing.assert_close(pixels.positions[1][1, :2, 0], down)
    assert pixels.masks[0][1, 0, 0].tolist() == [0, 0, -torch.inf, -torch.inf]
    assert pixels.masks[1][1, 0, 0].tolist() == [0, 0, -torch.inf]


@pytest.mark.parametrize("options", [{}, {"contrastive": True}])
def test_matching_queries_do_not_see_denoising_queries(options: dict):
    """Same predictions as in inference, and no gradient of theirs reaches the label embedding."""
    model, _, _ = small_model(dropout=0.0, **options)
    nn.init.normal_(model.transformer.bbox_embed[0].layers[-1].weight)
    images, targets = batch_of_two(), make_targets(3, 1)
    trained = model.train()(images, targets)
    with torch.no_grad():
        inferred = model.eval()(images)
    dn, matching = trained["dn"], [trained, *trained["aux_outputs"]]
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(trained[key], inferred[key], atol=1e-5, rtol=1e-4)

    def gradient(total: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(total, model.label_enc.weight, retain_graph=True)
        return found

    both = lambda logits, boxes: logits.square().sum() + boxes.square().sum()
    total = sum(both(out["pred_logits"], out["pred_boxes"]) for out in matching)
    assert gradient(total).eq(0).all()
    assert gradient(both(dn.pred_logits, dn.pred_boxes)).ne(0).any()


def test_denoising_queries_are_centres_with_all_patterns():
    noiseless = {"dn_label_noise_ratio": 0.0, "dn_box_noise_scale": 0.0, "dn_number": 3}
    model, _, _ = small_model(**noiseless)
    targets = make_targets(4, 2)
    queries = model.queries(model.encode(batch_of_two()))
    known = targets, model.label_enc, queries.anchors, queries.content
    content, points, blocked, dn = model.prepare_denoising(*known)
    assert torch.equal(content[:, 12:], queries.content) and blocked.shape == (48, 48)
    patterns = model.transformer.pattern.weight
    for image, target in enumerate(targets):
        for group in range(3):
            for i, label in enumerate(target["labels"]):
                query = 4 * group + i
                assert torch.equal(points[image, query], target["boxes"][i, :2])
                rest = content[image, query] - patterns[(group + i) % 3]
                torch.testing.assert_close(rest[:-1], model.label_enc(label))
                torch.testing.assert_close(rest[-1], torch.tensor(1.0))
    boxes = torch.stack([target["boxes"][0] for target in targets])
    torch.testing.assert_close(dn.boxes[[0, 4]], boxes)


def test_every_parameter_gets_a_gradient():
    """As DDP requires, also without objects."""
    for options in ({}, {"spatial_prior": "grid"}, {"use_dn": False}):
        for counts in ((2, 3), (0, 0)):
            model, criterion, _ = small_model(**TINY, **options)
            targets = make_targets(*counts)
            losses = criterion(model.train()(batch_of_two(), targets), targets)
            sum(losses[k] * w for k, w in criterion.weight_dict.items()).backward()
            trained = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
            assert [k for k, grad in trained.items() if grad is None] == []


def test_compiled_parts():
    model, _, _ = small_model("anchor_detr_r50")
    compiled: list[nn.Module] = []
    for part in model.modules():
        part.compile = lambda part=part, **options: compiled.append(part)
    model.compile_parts()
    assert compiled == [model.backbone, *model.transformer.encoder_layers]


def test_matching_log_measures_the_distance_to_centres():
    model, criterion, _ = small_model()
    (target,) = make_targets(1)
    outputs = model.eval()([torch.randn(3, 64, 96)])
    log = MatchingLog(criterion.matcher)
    log.update(outputs, [target | {"image_id": torch.tensor(7)}])
    query = int((log.matches[7][0] == 0).nonzero())
    distance = (outputs["anchors"][0, 0, query] - target["boxes"][0, :2]).abs().sum()
    assert log.summary()["anchor_distance_0"] == pytest.approx(float(distance.detach()))


def test_muon_is_not_for_points_and_patterns():
    model, _, _ = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, load_config(overrides={"optimizer": "muon"}))
    hidden = {names[id(p)] for group in groups if group["hidden"] for p in group["params"]}
    assert "transformer.decoder_layers.0.cross_attn.in_proj_weight" in hidden
    assert not any("position" in name or "pattern" in name for name in hidden)
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["backbone.body.layer4.0.conv1.weight"] == 1e-5
    assert rates["transformer.adapt_pos1d.0.weight"] == 1e-4


# The options of the README, and the defaults of its main.py.
RELEASED = "--dim_feedforward 1024 --num_query_position 300 --num_query_pattern 3 --cls_loss_coef 2"
RELEASED += " --spatial_prior learned --attention_type RCDA --epochs 50 --lr_drop 40 --lr 1e-4"
RELEASED += " --lr_backbone 1e-5 --weight_decay 1e-4 --clip_max_norm 0.1 --batch_size 1 --dropout 0"
RELEASED += " --dilation True --set_cost_class 2 --eval_set val --cache_mode --auto_resume"


@pytest.mark.parametrize("options", ["", RELEASED], ids=["readme", "defaults"])
def test_released_command_lines(options: str):
    line = f"-m anchor_detr --coco_path COCO {options}"
    cfg = parse_command_line(line.split())
    expected = {"coco_path": "COCO"}
    assert cfg == load_config("configs/anchor_detr_r50_dc5.py", expected)
    cfg = parse_command_line([*line.split(), "--eval", "--resume", "checkpoint.pth"])
    expected |= {"eval": True, "resume": "checkpoint.pth"}
    assert cfg == load_config("configs/anchor_detr_r50_dc5.py", expected)
    assert (cfg.num_queries, cfg.num_patterns, cfg.num_select) == (300, 3, 100)
