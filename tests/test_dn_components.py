"""Denoising: attention between groups by its gradients, noise by its distribution."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from models.dn_components import (
    add_box_noise,
    add_label_noise,
    compute_dn_loss,
    dn_post_process,
    group_mask,
    inverse_sigmoid,
    prepare_for_dn,
)
from models.transformer import Decoder
from util.config import load_config

C, D, Q = 6, 32, 7
NO_NOISE = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0}


def make_targets(*counts: int) -> list[dict]:
    return [
        {"labels": torch.randint(C, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in counts
    ]


def test_queries_carry_their_targets():
    """Without noise, a denoising query is its label's embedding with indicator 1, at its box."""
    label_enc = nn.Embedding(C + 1, D - 1)
    targets = make_targets(3, 0, 2)
    anchors = torch.randn(3, Q, 4)
    content, new_anchors, mask, dn = prepare_for_dn(
        targets, label_enc, anchors, num_groups=4, **NO_NOISE
    )
    assert content.shape == (3, 4 * 3 + Q, D)
    assert mask.shape == (4 * 3 + Q, 4 * 3 + Q)
    for group in range(4):
        for image, target in enumerate(targets):
            for i, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                query = content[image, 3 * group + i]
                assert torch.equal(query[:-1], label_enc.weight[label])
                assert query[-1] == 1
                torch.testing.assert_close(
                    new_anchors[image, 3 * group + i].sigmoid(), box, atol=1e-5, rtol=0
                )
            padding = content[image, 3 * group + len(target["labels"]) : 3 * group + 3]
            assert not padding.any()
    assert torch.equal(content[:, 12:, :-1], label_enc.weight[-1].expand(3, Q, -1))
    assert not content[:, 12:, -1].any()
    assert torch.equal(new_anchors[:, 12:], anchors)
    assert dn.num_queries == 12
    assert len(dn.labels) == 4 * 5


def test_gradients_do_not_cross_groups():
    """Through a whole decoder: the matching part depends only on itself, a group on itself and the
    matching part."""
    torch.manual_seed(0)
    groups, size = 3, 2
    cfg = {"hidden_dim": D, "nheads": 4, "dim_feedforward": 64, "dec_layers": 2}
    decoder = Decoder(load_config(overrides=cfg))
    decoder.bbox_embed = nn.Linear(D, 4)
    label_enc = nn.Embedding(C + 1, D - 1)
    content, anchors, blocked, _ = prepare_for_dn(
        make_targets(size), label_enc, torch.randn(1, Q, 4), num_groups=groups
    )
    content = content.detach().requires_grad_()
    memory = torch.randn(1, 9, D)
    no_padding = torch.zeros(1, 9).bool()
    states, *_ = decoder(content, anchors, blocked, memory, memory, no_padding)
    parts = [slice(i * size, (i + 1) * size) for i in range(groups)]
    parts.append(slice(groups * size, None))  # the matching part
    for i, rows in enumerate(parts):
        # One channel, as after a LayerNorm the sum of all is constant for any input.
        (gradient,) = torch.autograd.grad(states[-1][:, rows, 0].sum(), content, retain_graph=True)
        for j, columns in enumerate(parts):
            depends = bool(gradient[:, columns].abs().sum() > 0)
            assert depends == (i == j or j == groups), f"part {i} on part {j}"


def test_label_noise_is_uniform():
    torch.manual_seed(0)
    labels = torch.randint(C, (60_000,))
    noisy = add_label_noise(labels, C, ratio=0.3)
    changed = noisy[noisy != labels]
    # A redrawn label may equal the old one, so (C - 1) / C of the 30% differ.
    assert stats.binomtest(len(changed), len(labels), 0.3 * (C - 1) / C).pvalue > 1e-3
    shift = torch.bincount((noisy - labels)[noisy != labels] % C, minlength=C)[1:]
    assert stats.chisquare(shift.numpy()).pvalue > 1e-3
    assert torch.equal(add_label_noise(labels, C, ratio=0.0), labels)


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_box_noise_is_uniform(scale: float):
    """Centres move by up to scale/2 of the size, sizes change by up to scale, both uniformly."""
    torch.manual_seed(0)
    box = torch.tensor([0.5, 0.45, 0.2, 0.3])
    noisy = add_box_noise(box.expand(20_000, 4), scale)
    reach = scale * torch.tensor([0.1, 0.15, 0.2, 0.3])
    for i in range(4):
        moved = ((noisy[:, i] - box[i]) / reach[i]).numpy()
        assert stats.kstest(moved, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(torch.corrcoef(noisy.T) - torch.eye(4)).max() < 0.03
    outside = add_box_noise(torch.tensor([[0.01, 0.99, 0.5, 0.5]]).expand(1000, 4), scale)
    assert outside.min() == 0
    assert outside.max() == 1


def test_groups_have_independent_noise():
    torch.manual_seed(0)
    _, anchors, _, dn = prepare_for_dn(
        make_targets(4), nn.Embedding(C + 1, D - 1), torch.zeros(1, Q, 4), num_groups=3
    )
    groups = anchors[0, : dn.num_queries].unflatten(0, (3, 4))
    assert not torch.isclose(groups[0], groups[1]).any()


def test_loss_uses_the_known_pairs():
    """Against the written-out definition for one layer, one query at a time."""
    torch.manual_seed(0)
    targets = make_targets(2, 1)
    _, _, _, dn = prepare_for_dn(
        targets, nn.Embedding(C + 1, D - 1), torch.zeros(2, Q, 4), num_groups=2
    )
    logits, boxes = torch.randn(3, 2, 4 + Q, C), torch.rand(3, 2, 4 + Q, 4)
    matching_logits, matching_boxes = dn_post_process(logits, boxes, dn)
    assert torch.equal(matching_logits, logits[:, :, 4:])
    assert torch.equal(matching_boxes, boxes[:, :, 4:])
    losses = compute_dn_loss(dn)
    assert set(losses) == {
        f"loss_{k}_dn{layer}" for k in ("ce", "bbox", "giou") for layer in ("", "_0", "_1")
    }
    ce = l1 = 0.0
    for group in range(2):
        for image, target in enumerate(targets):
            for i, label in enumerate(target["labels"]):
                query = 2 * group + i
                for c in range(C):
                    p = logits[1, image, query, c].sigmoid()
                    right = p if c == label else 1 - p
                    alpha = 0.25 if c == label else 0.75
                    ce += -alpha * (1 - right) ** 2 * right.log()
                l1 += (boxes[1, image, query] - target["boxes"][i]).abs().sum()
    torch.testing.assert_close(losses["loss_ce_dn_1"], ce / 6)
    torch.testing.assert_close(losses["loss_bbox_dn_1"], l1 / 6)


def test_batch_without_objects_trains():
    label_enc = nn.Embedding(C + 1, D - 1)
    anchors = torch.zeros(2, Q, 4, requires_grad=True)
    content, anchors_out, mask, dn = prepare_for_dn(make_targets(0, 0), label_enc, anchors)
    assert mask is None
    head = nn.Linear(D, C)
    logits, boxes = dn_post_process(head(content)[None], anchors_out[None].sigmoid(), dn)
    assert logits.shape == (1, 2, Q, C)
    losses = compute_dn_loss(dn)
    assert all(v == 0 for v in losses.values())
    (sum(losses.values()) + logits.sum() + boxes.sum()).backward()
    assert label_enc.weight.grad is not None
    assert head.weight.grad is not None


def test_inference_adds_no_queries():
    content, anchors, mask, dn = prepare_for_dn(
        None, nn.Embedding(C + 1, D - 1), torch.zeros(2, Q, 4)
    )
    assert content.shape == (2, Q, D)
    assert anchors.shape == (2, Q, 4)
    assert mask is None
    assert dn is None
    assert compute_dn_loss(dn) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype(dtype: torch.dtype):
    label_enc = nn.Embedding(C + 1, D).to(dtype)
    given = torch.randn(2, Q, D, dtype=dtype)
    content, anchors, _, dn = prepare_for_dn(
        make_targets(2, 3), label_enc, torch.zeros(2, Q, 4, dtype=dtype), given
    )
    assert content.dtype == anchors.dtype == dtype
    assert torch.equal(content[:, dn.num_queries :], given)


def test_mask_of_one_group():
    mask = group_mask(1, 2, 3, torch.device("cpu"))
    expected = F.pad(torch.ones(3, 2, dtype=torch.bool), (0, 3, 2, 0))
    assert torch.equal(mask, expected)


def test_boxes_at_the_border_stay_finite():
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.0, 1.0, 1.0, 0.0]])}]
    _, anchors, _, _ = prepare_for_dn(targets, nn.Embedding(C + 1, D), torch.zeros(1, Q, 4))
    assert anchors.isfinite().all()
    assert inverse_sigmoid(torch.tensor([0.0, 1.0])).isfinite().all()


def test_file_works_on_its_own_in_another_project(tmp_path: Path):
    """Copied into its package, with none of our other files to import."""
    package = tmp_path / "theirs"
    package.mkdir()
    shutil.copy("models/dn_components.py", package)
    code = """
import torch
from theirs.dn_components import compute_dn_loss, dn_post_process, prepare_for_cdn, prepare_for_dn
labels = torch.nn.Embedding(4, 7)
targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4)}]
for prepare in (prepare_for_dn, prepare_for_cdn):
    content, anchors = torch.randn(1, 5, 8), torch.zeros(1, 5, 4)
    content, anchors, mask, dn = prepare(targets, labels, anchors, content)
    dn_post_process(content[None, ..., :3], anchors[None].sigmoid(), dn)
    sum(compute_dn_loss(dn).values()).backward()
    print(mask.shape[0] == content.shape[1] == dn.num_queries + 5)
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == ["True", "True"], out.stderr


@pytest.mark.parametrize(("number", "queries"), [(5, 15), (1, 3), (100, 99), (2, 6), (1000, 999)])
def test_group_count_of_100_or_more_counts_queries(number: int, queries: int):
    """Else `-m dino --contrastive FALSE` would make 100 groups of all objects."""
    targets = [{"labels": torch.zeros(3, dtype=torch.int64), "boxes": torch.rand(3, 4)}]
    anchors = torch.zeros(1, Q, 4)
    *_, dn = prepare_for_dn(targets, nn.Embedding(C + 1, D), anchors, num_groups=number)
    assert dn.num_queries == queries
