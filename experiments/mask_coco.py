"""What the mask between denoising groups and matching queries is for, on COCO."""

from experiments import on_coco
from experiments.mask_toy import arms
from experiments.mask_toy import experiment as small

experiment = on_coco(
    small,
    title="The mask between denoising and matching: COCO",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50"),
    options={"lr_drop": 11},
)
