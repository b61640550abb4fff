"""DN-DETR's ablations, on COCO."""

from experiments import on_coco
from experiments.noise_toy import arms
from experiments.noise_toy import experiment as small

experiment = on_coco(
    small,
    title="DN-DETR's ablations: COCO",
    epochs=12,
    arms=arms("dn_dab_deformable_detr_r50"),
    options={"lr_drop": 11},
)
