"""Evaluation and training steps of a config as main.py takes them, with random weights and data."""

from collections.abc import Callable
from itertools import repeat

import torch

from benchmarks.common import random_batch
from engine import autocast, to_device, train_steps
from models import build_model
from models.class_map import ClassMap
from models.detector import Detector
from models.nested_tensor import nested_tensor_from_tensor_list
from train_state import TrainState
from util.config import Config
from util.distributed import seed_everything


def make_step(
    mode: str, cfg: Config, device: torch.device, size: tuple[int, int], num_objects: int
) -> tuple[Detector, Callable]:
    """A model, and the step, which is always that of the same images of `size`: in mode "train" an
    optimiser step of `batch_size`, in "eval" forward pass and post-processing of
    `eval_batch_size`."""
    seed_everything(cfg.seed)
    model, criterion, postprocess = build_model(cfg)
    classes = ClassMap.identity([{"id": i} for i in range(cfg.num_labels)], cfg.num_labels)
    state = TrainState(cfg, model.place(device), classes)
    num_images = cfg.batch_size if mode == "train" else cfg.eval_batch_size
    images, targets = random_batch(num_images, size, num_objects, cfg.num_labels)
    batch = nested_tensor_from_tensor_list(images), targets
    if mode == "train":
        steps = train_steps(state, model, criterion, repeat(batch))
        return model, lambda: next(steps)
    model.eval().requires_grad_(False)  # as FlopCounterMode's hooks fail under no_grad otherwise

    @torch.no_grad()
    def evaluate() -> None:
        images, targets = to_device(batch, device)
        with autocast(device, cfg):
            outputs = model(images)
        postprocess(outputs, torch.stack([t["orig_size"] for t in targets]).to(device))

    return model, evaluate
