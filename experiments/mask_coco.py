"""What the mask between denoising groups and matching queries is for, on COCO."""

from experiments import AP, AP50, TRAINING_LOSS, Experiment
from experiments.mask_toy import CLAIM, arms

experiment = Experiment(
    title="The mask between denoising and matching: COCO",
    claim=CLAIM,
    data="coco",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50"),
    options={"lr_drop": 11},
    seeds=(0,),
    figures=[AP, AP50, TRAINING_LOSS],
    drawn=["AP", "training loss"],
    processes=8,
)
