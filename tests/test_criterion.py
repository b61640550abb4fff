"""Boxes, matching and losses against their written-out definitions."""

import itertools

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert
from torchvision.ops import generalized_box_iou as torchvision_giou

from models.classes import SigmoidClasses
from models.criterion import LossTerm, SetCriterion, loss_weights, standard_terms
from models.dn_components import (
    compute_dn_loss,
    generalized_box_iou,
    inverse_sigmoid,
    prepare_for_dn,
)
from models.matcher import HungarianMatcher
from models.options import LossOptions
from util.matching_log import MatchingLog

L, B, Q, C = 3, 2, 5, 4
MATCHER = HungarianMatcher(2, 5, 2, SigmoidClasses(0.25))
TERMS = standard_terms(LossOptions())


def corners(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def random_boxes(*shape: int) -> torch.Tensor:
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.5 * torch.rand(*shape, 2)], dim=-1)


def make_targets(*counts: int) -> list[dict]:
    return [{"labels": torch.randint(C, (n,)), "boxes": random_boxes(n)} for n in counts]


def make_outputs(logits: torch.Tensor, boxes: torch.Tensor) -> dict:
    layers = [{"pred_logits": x, "pred_boxes": b} for x, b in zip(logits, boxes, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def test_giou_equals_torchvision():
    a, b = (corners(random_boxes(n).double()) for n in (40, 30))
    expected = torchvision_giou(a, b)
    torch.testing.assert_close(generalized_box_iou(a[:, None], b[None]), expected)
    torch.testing.assert_close(generalized_box_iou(a[:30], b), expected.diagonal())


def test_degenerate_boxes_raise_no_error():
    point = torch.zeros(1, 4)
    assert generalized_box_iou(point, point).isfinite().all()
    assert generalized_box_iou(point, torch.full((1, 4), torch.nan)).isnan().all()
    inverted = torch.tensor([[0.6, 0.6, 0.4, 0.4]])
    assert generalized_box_iou(inverted, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).isfinite().all()


def test_inverse_sigmoid():
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    clamped = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(clamped, torch.tensor([-1, -1, 1, 1]) * torch.log(torch.tensor(1e3)))


def pair_cost(logit: torch.Tensor, box: torch.Tensor, label: int, target: torch.Tensor) -> float:
    p = logit[label].double().sigmoid()
    positive = -0.25 * (1 - p) ** 2 * p.log()
    negative = -0.75 * p**2 * (1 - p).log()
    a, b = corners(box[None]), corners(target[None])
    l1 = (box - target).abs().sum()
    return float(2 * (positive - negative) + 5 * l1 - 2 * torchvision_giou(a, b)[0, 0])


def test_matching_has_the_lowest_cost():
    """Against all permutations, for every layer and image."""
    torch.manual_seed(0)
    logits, boxes, targets = torch.randn(L, B, Q, C), random_boxes(L, B, Q), make_targets(3, 2)
    matched = MATCHER(logits, boxes, targets)
    assert matched.shape == (L, 5)
    for layer in range(L):
        start = 0
        for image, target in enumerate(targets):
            n = len(target["labels"])

            def total(queries, layer=layer, image=image, target=target):
                return sum(
                    pair_cost(logits[layer, image, q], boxes[layer, image, q], label, box)
                    for q, label, box in zip(
                        queries, target["labels"], target["boxes"], strict=True
                    )
                )

            best = min(itertools.permutations(range(Q), n), key=total)
            assert matched[layer, start : start + n].tolist() == list(best)
            start += n


def test_more_targets_than_queries():
    matched = MATCHER(torch.randn(1, 1, Q, C), random_boxes(1, 1, Q), make_targets(Q + 3))
    assert (matched == -1).sum() == 3
    assert sorted(matched[matched >= 0].tolist()) == list(range(Q))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_predictions_are_matched_last(bad: float):
    logits, boxes, targets = torch.randn(1, 1, Q, C), random_boxes(1, 1, Q), make_targets(3)
    boxes[0, 0, :2] = bad
    logits[0, 0, 2] = torch.nan
    matched = MATCHER(logits, boxes, targets)
    assert len(set(matched[0].tolist())) == 3
    assert {3, 4} <= set(matched[0].tolist())


def test_losses_equal_their_definitions():
    torch.manual_seed(0)
    logits, boxes, targets = torch.randn(L, B, Q, C), random_boxes(L, B, Q), make_targets(3, 1)
    names = [f"loss_{k}{i}" for k in ("ce", "bbox", "giou") for i in ("", "_0", "_1")]
    criterion = SetCriterion(MATCHER, TERMS, dict.fromkeys(names, 1.0))
    losses = criterion(make_outputs(logits, boxes), targets)
    assert set(losses) == {*names, "class_error", "cardinality_error"}
    matched = MATCHER(logits, boxes, targets)
    for layer in range(L):
        onehot = torch.zeros(B, Q, C)
        bbox = giou = 0.0
        objects = [(i, j) for i, t in enumerate(targets) for j in range(len(t["labels"]))]
        for (i, j), query in zip(objects, matched[layer].tolist(), strict=True):
            onehot[i, query, targets[i]["labels"][j]] = 1
            pair = boxes[layer, i, query], targets[i]["boxes"][j]
            bbox = bbox + (pair[0] - pair[1]).abs().sum()
            giou = giou + 1 - torchvision_giou(*(corners(b[None]) for b in pair))[0, 0]
        p = logits[layer].sigmoid()
        ce = -(0.25 * onehot * (1 - p) ** 2 * p.log()).sum()
        ce -= (0.75 * (1 - onehot) * p**2 * (1 - p).log()).sum()
        suffix = "" if layer == L - 1 else f"_{layer}"
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], ce / 4)
        torch.testing.assert_close(losses[f"loss_bbox{suffix}"], bbox / 4)
        torch.testing.assert_close(losses[f"loss_giou{suffix}"], giou / 4)
    halved = criterion(make_outputs(logits, boxes), targets, num_boxes=8.0)
    torch.testing.assert_close(halved["loss_bbox"] * 2, losses["loss_bbox"])


def test_criterion_and_standalone_denoising_losses_agree():
    """`compute_dn_loss` is for detectors without this criterion."""
    torch.manual_seed(0)
    targets, label_enc = make_targets(3, 1), nn.Embedding(C + 1, 8)
    _, _, _, dn = prepare_for_dn(targets, label_enc, torch.randn(B, Q, 4))
    dn.pred_logits = torch.randn(L, B, dn.num_queries, C)
    dn.pred_boxes = random_boxes(L, B, dn.num_queries)
    outputs = make_outputs(torch.randn(L, B, Q, C), random_boxes(L, B, Q)) | {"dn": dn}
    for share, num_boxes in (("process", None), ("mean", 2.5)):
        losses = SetCriterion(MATCHER, TERMS, {}, share)(outputs, targets, 2.5)
        expected = compute_dn_loss(dn, num_boxes=num_boxes)
        assert len(expected) == 9
        assert all(torch.equal(losses[name], value) for name, value in expected.items())


def test_a_term_applies_to_its_parts_only():
    """A custom term, for the decoder only, that needs another output and the targets."""
    weigh = lambda matching: matching.layers[-1]["pred_masks"] * len(matching.targets[0]["labels"])
    count = lambda matching: weigh(matching) * matching.found.sum(1)
    term = LossTerm("loss_count", "cls_loss_coef", count, parts=("decoder",))
    torch.manual_seed(0)
    logits, boxes, targets = torch.randn(L, B, Q, C), random_boxes(L, B, Q), make_targets(3, 1)
    outputs = make_outputs(logits, boxes)
    outputs |= {"interm_outputs": outputs["aux_outputs"][0], "pred_masks": torch.tensor(0.5)}
    losses = SetCriterion(MATCHER, [*TERMS, term], {})(outputs, targets)
    assert {k for k in losses if "count" in k} == {"loss_count", "loss_count_0", "loss_count_1"}
    assert losses["loss_count"] == 0.5 * 3 and "loss_ce_interm" in losses
    weights = loss_weights(LossOptions(), [term], 2, with_denoising=True, token_suffix="_interm")
    assert weights == {"loss_count": 1.0, "loss_count_0": 1.0}


def test_loss_of_nonfinite_predictions_is_nonfinite():
    """The criterion raises no error: stopping is up to the training loop."""
    logits = nn.Parameter(torch.randn(1, 1, Q, C))
    boxes = torch.full((1, 1, Q, 4), torch.nan)
    criterion = SetCriterion(MATCHER, TERMS, {"loss_bbox": 1.0})
    losses = criterion(make_outputs(logits, boxes), make_targets(2))
    assert losses["loss_bbox"].isnan()
    assert losses["loss_ce"].isfinite()


def test_perfect_predictions_have_no_loss():
    targets = make_targets(2)
    logits = torch.full((1, 1, Q, C), -20.0)
    boxes = random_boxes(1, 1, Q)
    for j in range(2):
        logits[0, 0, j + 1, targets[0]["labels"][j]] = 20.0
        boxes[0, 0, j + 1] = targets[0]["boxes"][j]
    losses = SetCriterion(MATCHER, TERMS, {})(make_outputs(logits, boxes), targets)
    assert all(v < 1e-5 for v in losses.values())


def test_matching_log_counts_changed_queries_and_measures_anchors():
    """Two decoder layers, three queries, by hand; the second image has no objects."""
    box = lambda *centre: [*centre, 0.2, 0.2]
    targets = [
        {"labels": torch.tensor([0, 1]), "boxes": torch.tensor([box(0.2, 0.2), box(0.8, 0.8)])},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    for image_id, target in zip((7, 9), targets, strict=True):
        target["image_id"] = torch.tensor(image_id)
    near = torch.tensor([box(0.2, 0.2), box(0.8, 0.8), box(0.5, 0.5)])
    swapped = near[[1, 0, 2]]
    layers = lambda *boxes: [
        {"pred_logits": torch.zeros(2, 3, 2), "pred_boxes": b.expand(2, -1, -1)} for b in boxes
    ]

    def outputs(first: torch.Tensor, last: torch.Tensor) -> dict:
        early, late = layers(first, last)
        anchors = torch.stack([first + 0.01, first]).unsqueeze(1).expand(-1, 2, -1, -1)
        return {**late, "aux_outputs": [early], "anchors": anchors}

    before = MatchingLog(MATCHER)
    before.update(outputs(near, near), targets)
    assert before.matches[7].tolist() == [[0, 1, -1], [0, 1, -1]]
    assert before.matches[9].tolist() == [[-1, -1, -1], [-1, -1, -1]]
    summary = before.summary()
    assert summary == pytest.approx({"anchor_distance_0": 0.04, "anchor_distance": 0.0}, abs=1e-6)

    after = MatchingLog(MATCHER, before.matches)
    after.update(outputs(near, swapped), targets)
    summary = after.summary()
    assert summary["matching_instability_0"] == 0
    assert summary["matching_instability"] == (2 + 0) / 2  # over two images
    assert summary["anchor_distance"] == pytest.approx(1.2)  # |dx| + |dy| between the two


def test_matching_log_with_more_objects_than_queries():
    outputs = {"pred_logits": torch.zeros(1, 1, 2), "pred_boxes": torch.full((1, 1, 4), 0.5)}
    outputs |= {"aux_outputs": [], "anchors": torch.full((1, 1, 1, 4), 0.5)}
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5]])
    target = {"labels": torch.tensor([0, 1]), "boxes": boxes, "image_id": torch.tensor(1)}
    log = MatchingLog(MATCHER)
    log.update(outputs, [target])
    assert log.matches[1].tolist() == [[1]]
    assert log.summary() == {"anchor_distance": 0.0}
