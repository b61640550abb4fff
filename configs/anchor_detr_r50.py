"""Anchor DETR, ResNet-50, 50 epochs. Published: 42.1 AP on COCO val2017."""

_base_ = "anchor_detr_r50_dc5.py"
dilation = False
