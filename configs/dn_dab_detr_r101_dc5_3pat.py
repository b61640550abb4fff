"""DN-DETR-DC5, ResNet-101, 3 patterns, 12 epochs. Published: 42.8 AP on COCO val2017."""

_base_ = "dn_dab_detr_r50_dc5_3pat.py"
backbone = "resnet101"
