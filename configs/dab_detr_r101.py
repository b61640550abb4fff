"""DAB-DETR, ResNet-101, 50 epochs."""

_base_ = "dab_detr_r50.py"
backbone = "resnet101"
