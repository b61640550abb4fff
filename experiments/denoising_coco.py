"""DN-DETR's extended version, on COCO: denoising in other detectors, 12 epochs; in DETR 300."""

from experiments import on_coco
from experiments.denoising_toy import arms
from experiments.denoising_toy import experiment as small

CONFIGS = {
    "DETR": "detr_r50",
    "Anchor DETR": "anchor_detr_r50_dc5",
    "Deformable DETR": "deformable_detr_r50",
    "Faster R-CNN": "faster_rcnn_r50_fpn",
}

experiment = on_coco(
    small,
    title="Denoising in other detectors: COCO",
    epochs=12,
    arms=arms(
        CONFIGS,
        {"DETR": {"epochs": 300, "lr_drop": 200}, "Faster R-CNN": {"lr_drop_list": [8, 11]}},
    ),
    options={"lr_drop": 11},
)
