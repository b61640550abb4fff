"""DETR, ResNet-101, 300 epochs. Published: 43.5 AP on COCO val2017 after 500 epochs."""

_base_ = "detr_r50.py"
backbone = "resnet101"
