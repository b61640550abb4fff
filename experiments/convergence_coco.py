"""DN-DETR, figure 1 and section 3, on COCO: 50 epochs as published."""

from experiments import on_coco
from experiments.convergence_toy import arms, figures
from experiments.convergence_toy import experiment as small

experiment = on_coco(
    small,
    title="Denoising halves the training: COCO",
    epochs=50,
    arms=arms(suffix="_r50"),
    options={"log_matching": True},
    figures=figures(layers=6),
)
