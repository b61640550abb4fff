"""DETR with denoising, ResNet-50, DETR's settings. No code or weights of it were published."""

_base_ = "detr_r50.py"

modelname = "dn_detr"
use_dn = True
