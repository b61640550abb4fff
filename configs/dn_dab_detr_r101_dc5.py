"""DN-DETR-DC5, ResNet-101, 50 epochs."""

_base_ = "dn_dab_detr_r50_dc5.py"
backbone = "resnet101"
