"""What this project claims itself, on COCO: Muon against AdamW, and the average of the weights."""

from experiments import on_coco
from experiments.optimizer_rates_toy import arms
from experiments.optimizer_toy import experiment as small

RATES = {"adamw": (5e-5, 1e-4, 2e-4), "muon": (1e-4, 2e-4, 4e-4)}

experiment = on_coco(
    small,
    title="Muon and AdamW, and averaged weights: COCO",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50", RATES, backbone=0.1),
    options={"use_ema": True, "lr_drop": 11},
)
