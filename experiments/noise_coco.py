"""DN-DETR's ablations, on COCO."""

from experiments import Experiment
from experiments.noise_toy import CLAIM, arms

experiment = Experiment(
    title="DN-DETR's ablations: COCO",
    claim=CLAIM,
    data="coco",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50"),
    options={"lr_drop": 11},
    seeds=(0,),
    processes=8,
)
