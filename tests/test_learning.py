"""From random weights, detectors overfit eight images."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from datasets.coco import build_dataset, collate
from datasets.toy import make_toy_coco
from engine import evaluate, train_steps
from models import build_model
from models.evaluation import CocoEvaluator
from tests.conftest import full
from train_state import TrainState
from util.config import load_config

ROUNDS, STEPS = 8, 100
REST = [
    *("detr", "dn_detr", "dn_dab_detr", "anchor_detr", "dn_anchor_detr", "deformable_detr"),
    *("faster_rcnn", "dn_faster_rcnn", "dab_detr --masks"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dn_deformable_detr", *full(*REST)])
def test_overfits_eight_images(name: str, tmp_path: Path):
    # The validation split, as its images are not augmented.
    root = make_toy_coco(tmp_path, num_train=0, num_val=8, size=96)
    name, _, masks = name.partition(" ")
    smaller = {"masks": True, "dec_layers": 2, "num_queries": 20} if masks else {}
    cfg = load_config(
        f"configs/toy/{name}.py",
        {"coco_path": str(root), "num_classes": 6, "batch_size": 8, "epochs": ROUNDS}
        | {"data_aug_scales": [192 if "rcnn" in name else 96], "onecyclelr": True}
        | smaller,
    )
    torch.manual_seed(0)
    dataset = build_dataset(cfg, "val")
    samples = [dataset[i] for i in range(len(dataset))]  # decoded once
    sampler = RandomSampler(samples, replacement=True, num_samples=STEPS * cfg.batch_size)
    train_loader = DataLoader(samples, cfg.batch_size, sampler=sampler, collate_fn=collate)
    test_loader = DataLoader(samples, cfg.batch_size, collate_fn=collate)
    model, criterion, postprocess = build_model(cfg)
    state = TrainState(cfg, model, dataset.class_map, STEPS)
    for epoch in range(ROUNDS):
        *_, last = train_steps(state, model, criterion, train_loader)
        evaluator = CocoEvaluator(dataset)
        metrics = evaluate(model, criterion, postprocess, test_loader, evaluator, cfg)
        ap50, loss = metrics["coco_eval_bbox"][1], last.stats["loss"]
        print(f"after {STEPS * (epoch + 1)} steps: loss {loss:.2f}, AP50 {ap50:.3f}")
        of_masks = metrics.get("coco_eval_masks", [1.0, 1.0])[1]
        if ap50 >= 0.9 and of_masks >= 0.5:
            return
    pytest.fail(f"AP50 {ap50:.3f}, of masks {of_masks:.3f}, after {ROUNDS * STEPS} steps")
