"""DINO, table 4, on COCO: 12 epochs as published."""

from experiments import on_coco
from experiments.dino_toy import arms
from experiments.dino_toy import experiment as small

experiment = on_coco(
    small,
    title="DINO's ablation: COCO",
    epochs=12,
    arms=arms("dino_4scale_r50"),
    options={"save_results": True},
)
