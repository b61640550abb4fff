"""DN-DETR, figure 1 and section 3, on COCO: 50 epochs as published."""

from experiments import Experiment
from experiments.convergence_toy import CLAIM, arms, figures

experiment = Experiment(
    title="Denoising halves the training: COCO",
    claim=CLAIM,
    data="coco",
    epochs=50,
    arms=arms(suffix="_r50"),
    options={"log_matching": True},
    seeds=(0,),
    figures=figures(layers=6),
    processes=8,
)
