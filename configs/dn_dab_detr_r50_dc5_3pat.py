"""DN-DETR-DC5, ResNet-50, 3 patterns, 12 epochs. Published: 41.7 AP on COCO val2017."""

_base_ = "dn_dab_detr_r50_dc5.py"
num_patterns = 3
epochs = 12
lr_drop = 11
