"""DN-DETR, ResNet-101, 50 epochs."""

_base_ = "dn_dab_detr_r50.py"
backbone = "resnet101"
