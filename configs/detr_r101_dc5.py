"""DETR-DC5, ResNet-101, 300 epochs. Published: 44.9 AP on COCO val2017 after 500 epochs."""

_base_ = "detr_r50_dc5.py"
backbone = "resnet101"
