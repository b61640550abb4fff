"""DETR-DC5, ResNet-50, 300 epochs. Published: 43.3 AP on COCO val2017 after 500 epochs."""

_base_ = "detr_r50.py"
dilation = True
batch_size = 1  # on 16 GPUs
