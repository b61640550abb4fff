"""DN-DETR-DC5, ResNet-50, 50 epochs. Published: 46.3 AP on COCO val2017."""

_base_ = "dn_dab_detr_r50.py"
dilation = True
batch_size = 1  # on 16 GPUs
