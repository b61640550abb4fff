"""DN-DETR's extended version, on 296 photos of playing cards: denoising in other detectors."""

from dataclasses import replace

from experiments import IMAGENET
from experiments.convergence_cards import SIZES
from experiments.denoising_toy import CLASS_WEIGHT, TOY_CONFIGS, arms
from experiments.denoising_toy import experiment as of_toy

experiment = replace(
    of_toy,
    title="Denoising in other detectors: playing cards",
    data="cards",
    epochs=8,
    arms=arms(
        TOY_CONFIGS, {"DETR": {"epochs": 12}, "Faster R-CNN": {"cls_loss_coef": 1.0, "epochs": 4}}
    ),
    options={**IMAGENET, **SIZES, **CLASS_WEIGHT},
)
