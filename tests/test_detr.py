"""DETR, with and without denoising, and classification by a softmax."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from main import main
from models import load_detector
from models.classes import SoftmaxClasses
from models.criterion import SetCriterion, standard_terms
from models.dn_components import Assignment, prepare_for_cdn, prepare_for_dn
from models.errors import UserError
from models.options import LossOptions
from models.postprocess import PostProcess
from tests.test_criterion import make_outputs, random_boxes
from tests.test_models import make_targets, small_model
from util.config import load_config, parse_command_line

L, B, Q, C = 3, 2, 5, 4
EOS = 0.1
CLASSES = SoftmaxClasses(EOS)
WEIGHT = torch.tensor([1.0] * C + [EOS])


@pytest.mark.parametrize("found", [[1, 1, 1], [1, 0, 1], [0, 0, 0]])
def test_loss_is_the_weighted_cross_entropy(found: list[int]):
    """Of three objects, two in the first image; one that has no query leaves the first alone."""
    image, query, labels = torch.tensor([0, 0, 1]), torch.tensor([3, 0, 0]), torch.tensor([2, 0, 2])
    where = image, query.expand(L, -1)
    is_found = torch.tensor(found).float().expand(L, -1)
    assignment = Assignment(where, labels, where, torch.rand(3, 4), None, is_found)
    assignment.pred_logits = torch.randn(L, B, Q, C + 1)
    kept, target = is_found[0].bool(), torch.full((B, Q), C)
    target[image[kept], query[kept]] = labels[kept]
    expected = [
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), WEIGHT)
        for logits in assignment.pred_logits
    ]
    torch.testing.assert_close(CLASSES.loss(assignment), torch.stack(expected))


@pytest.mark.parametrize("prepare", [prepare_for_dn, prepare_for_cdn])
def test_denoising_loss_is_the_mean_over_supervised_queries(prepare):
    """Contrastive denoising's negatives count as no object."""
    targets, label_enc = make_targets(3, 1), torch.nn.Embedding(6, 8)
    *_, dn = prepare(targets, label_enc, torch.randn(B, Q, 4), torch.randn(B, Q, 8))
    dn.pred_logits = torch.randn(L, B, dn.num_queries, 6)
    target = torch.full((B, dn.num_queries), 5)
    target[dn.to_label] = dn.labels
    weight = torch.tensor([1.0] * 5 + [EOS])
    pairs = [(logits[dn.supervised], target[dn.supervised]) for logits in dn.pred_logits]
    expected = torch.stack([F.cross_entropy(*pair, weight) for pair in pairs])
    torch.testing.assert_close(CLASSES.loss(dn), expected)


def test_criterion_does_not_divide_a_mean():
    torch.manual_seed(0)
    options = LossOptions(class_loss="softmax", eos_coef=EOS)
    _, base, _ = small_model("detr_r50")
    criterion = SetCriterion(base.matcher, standard_terms(options), {}, classes=CLASSES)
    outputs = make_outputs(torch.randn(L, B, Q, C + 1), random_boxes(L, B, Q))
    targets = [{"labels": torch.tensor([1, 2]), "boxes": random_boxes(2)}] * B
    losses, halved = (criterion(outputs, targets, n) for n in (4.0, 8.0))
    assert halved["loss_ce"] == losses["loss_ce"]
    assert halved["loss_bbox"] == losses["loss_bbox"] / 2
    counted = (outputs["pred_logits"].argmax(-1) != C).sum(1)
    assert losses["cardinality_error"] == (counted - 2).abs().float().mean()


def test_matching_cost_is_the_negated_probability():
    logits = torch.randn(L, B, Q, C + 1)
    image, labels = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 3])
    cost = CLASSES.cost(logits, image, labels)
    assert cost.shape == (L, 3, Q)
    for n in range(3):
        expected = -logits.softmax(-1)[:, image[n], :, labels[n]]
        torch.testing.assert_close(cost[:, n], expected)


def test_postprocess_takes_the_best_class_of_each_query():
    """Not "no object", however likely; a sigmoid would give the first query twice."""
    logits = torch.tensor([[[5.0, 4.0, 0.0], [0.0, 1.0, 9.0], [0.0, 2.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]])
    outputs, sizes = {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]])
    (result,) = PostProcess(100, -1, CLASSES)(outputs, sizes)
    assert result["labels"].tolist() == [1, 0, 1]
    best = logits.softmax(-1)[0, [2, 0, 1], [1, 0, 1]]
    torch.testing.assert_close(result["scores"], best)
    assert result["boxes"].tolist() == [[0, 0, 100, 50], [0, 0, 200, 100], [50, 25, 150, 75]]
    (result,) = PostProcess(2, -1, CLASSES)(outputs, sizes)
    assert len(result["scores"]) == 2


@pytest.mark.parametrize("contrastive", [False, True])
def test_matching_queries_see_no_denoising_queries(contrastive: bool):
    """No gradient leads from their predictions to what only denoising queries are made from."""
    model, _, _ = small_model("dn_detr_r50", pretrained_backbone=False, contrastive=contrastive)
    out = model.train()([torch.randn(3, 64, 96)] * 2, make_targets(3, 1))
    parts = [model.label_enc.weight, *model.ref_point_head.parameters()]

    def gradients(*predictions: torch.Tensor) -> list[torch.Tensor]:
        total = sum(x.square().sum() for x in predictions)
        return torch.autograd.grad(total, parts, retain_graph=True, allow_unused=True)

    label, *embedding = gradients(out["pred_logits"], out["pred_boxes"])
    assert label[-1].any() and not label[:-1].any()
    assert not any(x.any() for x in embedding if x is not None)
    label, *embedding = gradients(out["dn"].pred_logits, out["dn"].pred_boxes)
    assert label[:-1].any() and all(x.any() for x in embedding)


def test_position_of_a_denoising_query_is_that_of_its_box():
    model, _, _ = small_model("dn_detr_r50", dn_box_noise_scale=0.0, dn_label_noise_ratio=0.0)
    positions = model.query_embed.weight.expand(2, -1, -1)
    content = model.initial_content().expand_as(positions)
    targets = make_targets(2, 1)
    content, positions, _, dn = model.prepare_denoising(
        targets, model.label_enc, positions, content
    )
    embedded = model.embed_boxes(torch.cat([t["boxes"] for t in targets]))
    group = torch.cat([positions[0, :2], positions[1, :1]])
    torch.testing.assert_close(group, embedded)
    assert not torch.isclose(embedded[0], embedded[1]).any()
    assert torch.equal(positions[1, dn.num_queries :], model.query_embed.weight)
    assert content[0, 0, -1] == 1 and content[0, -1, -1] == 0


def test_initial_weights():
    """As released: PyTorch's own for heads, embeddings and the input projection; Xavier's for the
    matrices of the transformer."""
    model, _, _ = small_model("detr_r50", num_queries=100)
    weights = model.state_dict()
    assert weights["query_embed.weight"].std() == pytest.approx(1, rel=0.05)
    for head in ("class_embed", "bbox_embed.layers.2"):
        for kind in ("weight", "bias"):
            bound = weights[f"{head}.{kind}"].abs().max()
            assert 0 < bound <= 1 / 8 and (kind == "bias" or bound > 0.1)  # 1 / sqrt(64)
    for name, value in weights.items():
        if name.startswith("transformer") and value.ndim == 2:
            bound = (6 / sum(value.shape)) ** 0.5
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.05), name
        if "in_proj_bias" in name or "out_proj.bias" in name:
            assert not value.any(), name


COMMANDS = {  # DETR's README and the defaults of its main.py, without paths
    "": {},
    "--batch_size 2 --no_aux_loss --eval": {"aux_loss": False, "eval": True},
    "--backbone resnet101 --dilation": {"backbone": "resnet101", "dilation": True},
    "--epochs 150 --lr_drop 100": {"epochs": 150, "lr_drop": 100},
    "--eos_coef 0.2 --num_queries 50": {"eos_coef": 0.2, "num_queries": 50},
    "--masks --epochs 25 --lr_drop 15 --frozen_weights box_model/checkpoint.pth": {
        "masks": True,
        "frozen_weights": "box_model/checkpoint.pth",
        "epochs": 25,
        "lr_drop": 15,
    },
    "--batch_size 1 --no_aux_loss --eval --masks --coco_panoptic_path panoptic": {
        "batch_size": 1,
        "aux_loss": False,
        "eval": True,
        "masks": True,
    },
    "--lr 1e-4 --lr_backbone 1e-5 --weight_decay 1e-4 --clip_max_norm 0.1 --epochs 300 "
    "--lr_drop 200 --position_embedding sine --enc_layers 6 --dec_layers 6 --dim_feedforward 2048 "
    "--hidden_dim 256 --dropout 0.1 --nheads 8 --num_queries 100 --set_cost_class 1 "
    "--set_cost_bbox 5 --set_cost_giou 2 --mask_loss_coef 1 --dice_loss_coef 1 --bbox_loss_coef 5 "
    "--giou_loss_coef 2 --eos_coef 0.1 --dataset_file coco --seed 42 --num_workers 2 "
    "--remove_difficult --dist_url env://": {},
}


@pytest.mark.parametrize("line", COMMANDS)
def test_released_command_lines(line: str):
    cfg = parse_command_line(["-m", "detr", *line.split()])
    published = load_config("configs/detr_r50.py")
    assert cfg == dataclasses.replace(published, **COMMANDS[line])
    assert load_config("configs/dn_detr_r50.py") == parse_command_line(["-m", "dn_detr"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-m detr --use_dn", "use -m dn_detr"),
        ("-m detr --num_patterns 3", "num_patterns: detr has no anchors"),
        ("-m dino --class_loss softmax", "class_loss: with softmax"),
        ("-m detr --class_loss sigmoid", "class_loss: 'sigmoid' is not one of focal, softmax"),
        ("-m deformable_detr --masks", "masks: deformable_detr has no mask head; use detr"),
        ("-m detr --frozen_weights x.pth", "frozen_weights: without a mask head nothing"),
        ("-m detr --masks --dataset_file coco_panoptic", "'coco_panoptic' is not supported, only"),
        ("-m detr --eos_coef -1", "eos_coef: -1.0 is less than 0"),
    ],
)
def test_unsuitable_options_are_rejected(line: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_command_line(line.split())


def test_released_file_has_one_label_less_than_outputs(toy: Path, tmp_path: Path, small: list[str]):
    """DETR's files hold weights for 92 outputs, of which 91 are labels, and no class map."""
    model, _, _ = small_model("detr_r50", num_classes=91)
    path = tmp_path / "detr.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(num_queries=12)}, path)
    options = {"modelname": "detr", "backbone": "resnet18", "hidden_dim": 64, "nheads": 4}
    options |= {"enc_layers": 1, "dec_layers": 2, "dim_feedforward": 96, "num_queries": 12}
    options |= {"class_loss": "softmax", "transformer_activation": "relu"}
    detector = load_detector(path, options)
    assert detector.class_map.num_classes == 91
    flags = [word for k, v in options.items() for word in (f"--{k}", str(v))]
    argv = ["--coco_path", str(toy), "--resume", str(path), "--eval", "--device", "cpu", *flags]
    assert main([*argv, "--num_workers", "0", "--data_aug_scales", "64"]) == 0
