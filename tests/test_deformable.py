"""The deformable models and DINO: gradients, query selection, contrastive denoising, backbones."""

import math
import re

import pytest
import timm
import torch
from torchvision.ops import box_convert

from models import build_model
from models.backbones import convnext
from models.backbones.swin import Block, Swin
from models.deformable_transformer import LevelTokens
from models.dn_components import prepare_for_cdn, prepare_for_cdn_of_dn_detr
from models.errors import UserError
from models.nested_tensor import nested_tensor_from_tensor_list
from models.options import ModelOptions
from models.query_selection import proposals, select_queries, take
from models.weights import load_backbone
from util.config import load_config

CONFIGS = [
    "dab_deformable_detr_r50",
    "dn_dab_deformable_detr_r50",
    "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat",
    "dn_dab_dino_deformable_detr_r50",
    "dino_4scale_r50",
    "deformable_detr_r50",
    "deformable_detr_r50_two_stage",
    "dn_deformable_detr_r50",
]
SMALL = {
    "backbone": "timm/resnet10t",
    "pretrained_backbone": False,
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 32,
    "enc_layers": 1,
    "dec_layers": 3,
    "num_queries": 12,
    "num_classes": 5,
    "device": "cpu",
}


def build(config: str, **options):
    torch.manual_seed(0)
    return build_model(load_config(f"configs/{config}.py", overrides=SMALL | options))


def make_batch(counts=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in ((96, 128), (112, 80))]
    targets = []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator) * 0.4 + 0.3
        size = torch.rand(count, 2, generator=generator) * 0.3 + 0.1
        labels = torch.randint(5, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([centre, size], 1)})
    return images, targets


def total_loss(criterion, outputs, targets):
    losses = criterion(outputs, targets)
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items())


@pytest.mark.parametrize("counts", [(2, 3), (0, 0)], ids=["objects", "no objects"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_gets_a_gradient(config, counts):
    model, criterion, _ = build(config)
    images, targets = make_batch(counts)
    losses = criterion(model(images, targets), targets)
    assert set(criterion.weight_dict) <= set(losses)
    total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
    assert total.isfinite()
    total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_gives_boxes_for_every_image(config):
    model, _, postprocess = build(config)
    images, _ = make_batch()
    with torch.no_grad():
        outputs = model.eval()(images)
    queries = 36 if "3pat" in config else 12
    assert outputs["pred_logits"].shape == (2, queries, 5)
    assert outputs["pred_boxes"].shape == (2, queries, 4)
    assert len(outputs["aux_outputs"]) == 2 and "dn" not in outputs
    results = postprocess(outputs, torch.tensor([[96, 128], [112, 80]]))
    assert [len(r["scores"]) for r in results] == [5 * queries] * 2  # fewer than num_select


@pytest.mark.parametrize("forward_twice", [True, False])
def test_look_forward_twice_trains_the_previous_layer(forward_twice):
    model, _, _ = build(
        "dino_4scale_r50", look_forward_twice=forward_twice, dec_pred_bbox_embed_share=False
    )
    for head in model.bbox_embed:  # a zero-initialised head passes no gradient on
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    images, _ = make_batch()
    outputs = model(images)
    boxes = [*(layer["pred_boxes"] for layer in outputs["aux_outputs"]), outputs["pred_boxes"]]
    for i in (1, 2):
        model.zero_grad()
        boxes[i].sum().backward(retain_graph=True)
        reached = [
            head.layers[-1].bias.grad is not None and bool(head.layers[-1].bias.grad.any())
            for head in model.bbox_embed
        ]
        expected = [j == i or (forward_twice and j == i - 1) for j in range(3)]
        assert reached == expected, f"boxes of layer {i}"


@pytest.mark.parametrize("selection", ["mixed", "pure"])
def test_selected_queries_pass_no_gradient_to_the_encoder_heads(selection):
    model, _, _ = build("dino_4scale_r50", query_selection=selection)
    images, _ = make_batch()
    outputs = model(images)
    (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
    heads = (
        model.transformer.enc_output,
        model.transformer.enc_out_bbox_embed,
        model.transformer.enc_out_class_embed,
    )
    assert all(p.grad is None for head in heads for p in head.parameters())
    learned = getattr(model.transformer, "tgt_embed", None)
    assert (learned is not None) == (selection == "mixed")
    if learned is not None:
        assert learned.weight.grad.any()


def test_ablations_are_one_option_each():
    images, targets = make_batch()
    for options in (
        {"use_dn": False},
        {"contrastive": False, "dn_number": 2},
        {"query_selection": "static"},
        {"query_selection": "pure"},
        {"look_forward_twice": False},
        {"two_stage_class_embed_share": True, "two_stage_bbox_embed_share": True},
        {"num_feature_levels": 5, "return_interm_indices": [0, 1, 2, 3]},
        {"dn_label_noise_ratio": 0.0},
        {"dn_box_noise_scale": 0.0},
    ):
        model, criterion, _ = build("dino_4scale_r50", **options)
        assert total_loss(criterion, model(images, targets), targets).isfinite(), options


# Query selection


def make_tokens() -> LevelTokens:
    masks = [torch.zeros(2, 6, 8, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)]
    masks[0][1, :, 4:] = True
    masks[1][1, :, 2:] = True
    features = [torch.randn(2, 16, *mask.shape[1:]) for mask in masks]
    positions = [torch.zeros(2, *mask.shape[1:], 16) for mask in masks]
    return LevelTokens.of_levels(features, masks, positions, torch.zeros(2, 16))


def test_proposals_are_centred_on_their_tokens():
    tokens = make_tokens()
    anchors, usable = proposals(tokens)
    boxes = anchors.sigmoid()
    token = 0
    for level, (height, width) in enumerate(tokens.sizes):
        for row in range(height):
            for column in range(width):
                for image, real_width in ((0, width), (1, width // 2)):
                    expected = torch.tensor([(column + 0.5) / real_width, (row + 0.5) / height])
                    if column >= real_width:
                        assert anchors[image, token].isinf().all() and not usable[image, token]
                    else:
                        torch.testing.assert_close(boxes[image, token, :2], expected)
                        side = torch.full((2,), 0.05 * 2**level)
                        torch.testing.assert_close(boxes[image, token, 2:], side)
                token += 1
    assert token == boxes.shape[1]


def test_best_tokens_are_selected():
    tokens = make_tokens()
    memory = torch.randn(2, 60, 16, requires_grad=True)
    class_head, box_head = torch.nn.Linear(16, 3), torch.nn.Linear(16, 4)
    best = lambda logits: logits.amax(-1)
    select = lambda number, train_all: select_queries(
        memory, tokens, torch.nn.Identity(), class_head, box_head, number, best, train_all
    )
    selection = select(5, train_all=True)
    scores = best(selection.logits)
    for image in range(2):
        expected = scores[image].sort(descending=True).indices[:5]
        assert selection.index[image].tolist() == expected.tolist()
    close = torch.testing.assert_close
    close(selection.anchors, take(selection.boxes, selection.index))
    # If only they are trained, their predictions and gradients are the same.
    alone = select(5, train_all=False)
    assert alone.index.equal(selection.index)
    close(alone.features, selection.features)
    close(alone.anchors, selection.anchors)
    close(alone.boxes, selection.anchors)
    close(alone.logits, take(selection.logits, selection.index))
    losses = [s.sigmoid().sum() for s in (alone.boxes, selection.anchors)]
    close(*(torch.autograd.grad(loss, [memory, *box_head.parameters()]) for loss in losses))
    with pytest.raises(UserError, match="num_queries: 61"):
        select(61, train_all=False)


# Contrastive denoising


def prepare(function, counts=(2, 3), **noise):
    _, targets = make_batch(counts)
    label_enc = torch.nn.Embedding(6, 8)
    anchors, content = torch.zeros(len(counts), 4, 4), torch.zeros(len(counts), 4, 8)
    return targets, function(targets, label_enc, anchors, content, **noise)


@pytest.mark.parametrize(("number", "groups"), [(200, 33), (100, 16), (99, 99), (7, 7), (0, 1)])
def test_number_of_contrastive_groups(number, groups):
    _, (content, _, mask, dn) = prepare(prepare_for_cdn, num_denoising=number)
    assert dn.num_groups == groups
    assert dn.num_queries == groups * 2 * 3 == content.shape[1] - 4
    assert mask.shape == (dn.num_queries + 4,) * 2


def test_positives_are_nearer_than_negatives():
    targets, (_, anchors, _, dn) = prepare(prepare_for_cdn, num_denoising=600, box_noise_scale=0.4)
    noisy = box_convert(anchors.sigmoid()[:, : dn.num_queries], "cxcywh", "xyxy")
    true, size = box_convert(dn.boxes, "cxcywh", "xyxy"), dn.boxes[:, 2:].repeat(1, 2) / 2 * 0.4
    image, query = dn.to_box
    near = (noisy[image, query] - true).abs() / size
    far = (noisy[image, query + 3] - true).abs() / size
    assert near.max() <= 1.01 and near.max() > 0.9
    assert far.max() <= 2.01 and far.min() >= 0.99
    assert dn.supervised.all()
    assert dn.labels.tolist() == [label for t in targets for label in t["labels"].tolist()] * 100


def test_dn_detr_variant_agrees_for_one_image():
    noise = {"num_denoising": 100, "label_noise_ratio": 0.0, "box_noise_scale": 0.0}
    torch.manual_seed(0)
    _, (content, anchors, mask, dn) = prepare(prepare_for_cdn, (3,), **noise)
    torch.manual_seed(0)
    _, (other_content, other_anchors, other_mask, other) = prepare(
        prepare_for_cdn_of_dn_detr, (3,), **noise
    )
    assert torch.equal(anchors, other_anchors) and torch.equal(mask, other_mask)
    assert torch.equal(other.labels, dn.labels) and torch.equal(other.boxes, dn.boxes)
    for ours, theirs in ((dn.to_label, other.to_label), (dn.to_box, other.to_box)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(content[dn.to_label], other_content[other.to_label])


# Backbones


def make_swin(use_checkpoint: bool = False) -> Swin:
    options = ModelOptions(backbone="swin_T_224_1k", use_checkpoint=use_checkpoint)
    return Swin(options, [2, 3, 4])


def test_swin_accepts_any_size_and_recomputation_agrees():
    images = nested_tensor_from_tensor_list([torch.randn(3, 61, 83), torch.randn(3, 50, 90)])
    torch.manual_seed(0)
    swin = make_swin(use_checkpoint=True).train()
    for module in swin.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    features = swin(images)
    assert [tuple(f.tensors.shape) for f in features] == [
        (2, 192, 8, 12),
        (2, 384, 4, 6),
        (2, 768, 2, 3),
    ]
    sum(f.tensors.square().mean() for f in features).backward()
    grads = [p.grad.clone() for p in swin.parameters()]
    swin.zero_grad()
    swin.recompute = False
    again = swin(images)
    sum(f.tensors.square().mean() for f in again).backward()
    for a, b in zip(features, again, strict=True):
        torch.testing.assert_close(a.tensors, b.tensors)
    for grad, p in zip(grads, swin.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("size", [(14, 21), (7, 17), (5, 3), (12, 7)])
@pytest.mark.parametrize("shift", [0, 3])
def test_swin_attends_in_released_windows(size, shift):
    """Against masked attention among all pixels: padded, then shifted even if there is only one
    window, and split where opposite edges of the shifted map meet."""
    torch.manual_seed(0)
    dim, heads, window = 8, 2, 7
    block = Block(dim, heads, window, shift, drop_path=0.0).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, *size, dim)

    padded = [math.ceil(n / window) * window for n in size]
    content = torch.zeros(2, *padded, dim)
    content[:, : size[0], : size[1]] = block.norm1(x)
    shifted = [(torch.arange(n) - shift) % n for n in padded]
    ends = zip(shifted, padded, strict=True)
    region = [(m >= n - window).int() + (m >= n - shift) for m, n in ends]
    grid = lambda axes: torch.cartesian_prod(*axes)  # (y, x) of every pixel
    same_window = (grid(shifted)[:, None] // window == grid(shifted) // window).all(-1)
    same_region = (grid(region)[:, None] == grid(region)).all(-1)
    y, x_ = (grid(shifted)[:, None] % window - grid(shifted) % window + window - 1).unbind(-1)
    bias = block.attn.relative_position_bias_table[y * (2 * window - 1) + x_].permute(2, 0, 1)
    qkv = block.attn.qkv(content.flatten(1, 2)).unflatten(-1, (3, heads, -1))
    query, key, value = qkv.unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (dim // heads) ** -0.5 + bias
    weights = logits.masked_fill(~(same_window & same_region), -torch.inf).softmax(-1)
    attended = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2).unflatten(1, padded)
    expected = x + block.attn.proj(attended)[:, : size[0], : size[1]]
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)


def test_swin_loads_the_authors_file(tmp_path):
    torch.manual_seed(0)
    swin, other = (make_swin() for _ in range(2))
    with pytest.raises(UserError, match=r"swin_tiny_patch4_window7_224.pth is not there.*backbone"):
        load_backbone(swin, "swin_T_224_1k", directory=str(tmp_path))
    state = {k: v for k, v in other.state_dict().items() if not k.startswith("norm")}
    state |= {"norm.weight": torch.ones(768), "head.weight": torch.ones(1000, 768)}
    torch.save({"model": state}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    load_backbone(swin, "swin_T_224_1k", directory=str(tmp_path))
    for name, tensor in swin.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    del state["layers.2.downsample.norm.weight"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"layers.2.downsample.norm.weight"):
        load_backbone(swin, "swin_T_224_1k", str(tmp_path / "short.pth"))


def test_convnext_agrees_with_timm_and_fully_trains(monkeypatch):
    monkeypatch.setitem(convnext.VARIANTS, "small", convnext.Variant(8, (1, 2, 1, 1), ""))
    torch.manual_seed(0)
    options = ModelOptions(backbone="small", use_checkpoint=True)
    ours = convnext.ConvNeXt(options, [2, 3, 4]).train()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("dwconv", "conv_dw").replace("pwconv", "mlp.fc")
        name = re.sub(r"stages\.(\d)\.", r"stages.\1.blocks.", name)
        name = name.replace("downsample_layers.0", "stem")
        name = re.sub(r"downsample_layers\.(\d)", r"stages.\1.downsample", name)
        state |= {} if re.match(r"norm\d", name) else {name: tensor}
    theirs = timm.models.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 32, 64), num_classes=0)
    theirs.head = torch.nn.Identity()
    theirs.load_state_dict(state)
    image = torch.randn(3, 70, 101)
    features = ours(nested_tensor_from_tensor_list([image]))
    expected = theirs.forward_intermediates(image[None], indices=[1, 2, 3], intermediates_only=True)
    for stage, (feature, x) in enumerate(zip(features, expected, strict=True), 1):
        torch.testing.assert_close(feature.tensors, ours.get_submodule(f"norm{stage}")(x))
    sum(f.tensors.square().mean() for f in features).backward()
    assert all(p.requires_grad and p.grad is not None for p in ours.parameters())
    assert ours.norm0.weight.grad.count_nonzero() == 0


def test_parts_of_a_backbone_can_be_frozen():
    options = {"backbone": "swin_T_224_1k", "backbone_freeze_keywords": ["patch_embed", "layers.0"]}
    model, _, _ = build("dino_4scale_r50", **options)
    frozen = [n for n, p in model.backbone[0].named_parameters() if not p.requires_grad]
    assert frozen and all("patch_embed" in name or "layers.0" in name for name in frozen)
    assert {name.split(".")[0] for name in frozen} == {"patch_embed", "layers"}


def test_dilated_swin_is_rejected():
    with pytest.raises(UserError, match="swin_T_224_1k has no dilated last stage"):
        build("dino_4scale_r50", backbone="swin_T_224_1k", dilation=True)


def test_unsupported_options_are_rejected():
    with pytest.raises(UserError, match=r"query_selection.*dn_dab_detr has neither"):
        build("dn_dab_detr_r50", query_selection="mixed")
    with pytest.raises(UserError, match="num_feature_levels: 2 is less than the 3 levels"):
        build("dino_4scale_r50", num_feature_levels=2)


# -- initial weights, as released; the models are the published ones, scaled down


def initial_weights(name: str, **overrides) -> dict[str, torch.Tensor]:
    small = {"backbone": "resnet18", "enc_layers": 1, "dec_layers": 2, "hidden_dim": 64}
    torch.manual_seed(0)
    cfg = load_config(f"configs/{name}.py", small | {"pretrained_backbone": False} | overrides)
    model, _, _ = build_model(cfg)
    return {k: p.detach() for k, p in model.named_parameters(remove_duplicate=False)}


def is_xavier(weight: torch.Tensor) -> bool:
    """Uniform up to sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / sum(weight.flatten(1).shape))
    spread = weight.std() / (bound / math.sqrt(3))
    return bool(weight.abs().max() <= bound) and abs(spread - 1) < 0.1


@pytest.mark.parametrize("name", ["dino_4scale_r50", "dn_dab_dino_deformable_detr_r50"])
def test_learned_content_of_selected_anchors_starts_xavier(name: str):
    weights = initial_weights(name)
    assert is_xavier(weights["transformer.tgt_embed.weight"])
    assert weights["label_enc.weight"].std() == pytest.approx(1, rel=0.1)
    assert all(w.eq(0).all() for k, w in weights.items() if re.search(r"bbox.*layers\.2\.", k))


def test_static_queries_start_normal_except_in_dino():
    for name, is_dino in (("dino_4scale_r50", True), ("dab_deformable_detr_r50", False)):
        weights = initial_weights(name, query_selection="static")
        for query in ("tgt_embed.weight", "refpoint_embed.weight"):
            assert is_xavier(weights[query]) == is_dino
            assert is_dino or weights[query].std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", ["dab_deformable_detr_r50", "dn_dab_deformable_detr_r50"])
def test_first_box_head_starts_with_small_boxes(name: str):
    """For learned queries only: selected anchors already have a size."""
    bias = "bbox_embed.{}.layers.2.bias"
    weights = initial_weights(name)
    assert weights[bias.format(0)].tolist() == [0, 0, -2, -2]
    assert weights[bias.format(1)].tolist() == [0, 0, 0, 0]
    weights = initial_weights(name, query_selection="pure")
    assert weights[bias.format(0)].tolist() == [0, 0, 0, 0]


def test_deformable_encoder_only_initialisation():
    weights = initial_weights("dn_dab_deformable_detr_deformable_encoder_only_r50_3pat")
    attention = "transformer.encoder.layers.0.self_attn"
    for name in ("sampling_offsets", "attention_weights", "value_proj"):
        assert is_xavier(weights[f"{attention}.{name}.weight"])
    assert weights[f"{attention}.sampling_offsets.bias"].abs().max() == 4  # n_points, as elsewhere
    assert is_xavier(weights["transformer.patterns.weight"])
    assert weights["transformer.decoder.layers.0.ca_out_v_proj.bias"].eq(0).all()
    for name in ("bbox_embed.layers.2", "input_proj.0.0"):  # PyTorch's default
        fan_in = weights[f"{name}.weight"][0].numel()
        for part in ("weight", "bias"):
            assert 0.3 < weights[f"{name}.{part}"].abs().max() * math.sqrt(fan_in) <= 1
    other = initial_weights("dn_dab_deformable_detr_r50")
    assert other[f"{attention}.sampling_offsets.weight"].eq(0).all()
    assert is_xavier(other["input_proj.0.0.weight"]) and other["input_proj.0.0.bias"].eq(0).all()


def test_anchors_spread_over_the_image():
    for name in ("dab_detr_r50", "dn_dab_deformable_detr_r50"):
        weights = initial_weights(name, random_refpoints_xy=True)
        centres = weights["refpoint_embed.weight"][:, :2].sigmoid()
        # Sigmoids of normal samples span only about 0.05 to 0.95.
        assert centres.min() < 0.02 and centres.max() > 0.98
        assert centres.std() == pytest.approx(1 / math.sqrt(12), rel=0.1)


# -- options of the released config files


def test_interm_loss_weights():
    weights = lambda **options: (
        build_model(load_config("configs/dino_4scale_r50.py", options))[1].weight_dict
    )
    default = weights()
    assert (default["loss_ce_interm"], default["loss_bbox_interm"]) == (1, 5)
    halved = weights(interm_loss_coef=0.5)
    changed = {k: v for k, v in halved.items() if default[k] != v}
    assert changed == {
        f"loss_{k}_interm": v for k, v in {"ce": 0.5, "bbox": 2.5, "giou": 1}.items()
    }
    classes = weights(no_interm_box_loss=True)
    changed = {k: v for k, v in classes.items() if default[k] != v}
    assert changed == {"loss_bbox_interm": 0, "loss_giou_interm": 0}


def test_non_contrastive_dino_has_similarly_many_queries():
    """Not 100 groups of all an image's objects."""
    small = {"backbone": "resnet18", "pretrained_backbone": False, "hidden_dim": 32, "nheads": 4}
    small |= {"num_queries": 10, "enc_layers": 1, "dec_layers": 1}
    targets = [{"labels": torch.zeros(40, dtype=torch.int64), "boxes": torch.rand(40, 4)}]
    for contrastive, groups in ((True, 2), (False, 5)):
        cfg = load_config("configs/dino_4scale_r50.py", small | {"contrastive": contrastive})
        model, _, _ = build_model(cfg)
        dn = model.train()([torch.randn(3, 128, 128)], targets)["dn"]
        assert (dn.num_groups, dn.num_queries) == (groups, {True: 160, False: 200}[contrastive])
