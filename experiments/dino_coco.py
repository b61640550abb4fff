"""DINO, table 4, on COCO: 12 epochs as published."""

from experiments import AP, AP50, DUPLICATES, Experiment
from experiments.dino_toy import CLAIM, arms

experiment = Experiment(
    title="DINO's ablation: COCO",
    claim=CLAIM,
    data="coco",
    epochs=12,
    arms=arms("dino_4scale_r50"),
    options={"save_results": True},
    seeds=(0,),
    figures=[AP, AP50, DUPLICATES],
    processes=8,
)
