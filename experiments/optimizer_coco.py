"""What this project claims itself, on COCO: Muon against AdamW, and the average of the weights."""

from experiments import AP, AP50, AP_OF_AVERAGE, Experiment
from experiments.optimizer_toy import CLAIM, arms

RATES = {"adamw": (5e-5, 1e-4, 2e-4), "muon": (1e-4, 2e-4, 4e-4)}

experiment = Experiment(
    title="Muon and AdamW, and averaged weights: COCO",
    claim=CLAIM,
    data="coco",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50", RATES, backbone=0.1),
    options={"use_ema": True, "lr_drop": 11},
    seeds=(0,),
    figures=[AP, AP50, AP_OF_AVERAGE],
    processes=8,
)
