"""DN-DETR, figure 1 and section 3, on 296 photos of playing cards."""

from experiments import CONSTANT_RATE, IMAGENET, Experiment
from experiments.convergence_toy import CLAIM, arms, figures

SIZES = {"data_aug_scales": [144, 160, 176], "data_aug_max_size": 256}

experiment = Experiment(
    title="Denoising halves the training: playing cards",
    claim=CLAIM,
    data="cards",
    epochs=8,
    arms=arms("toy/"),
    options={**IMAGENET, **SIZES, "log_matching": True, **CONSTANT_RATE},
    figures=figures(layers=3),
)
