"""Anchor DETR-DC5 with denoising, ResNet-50, 50 epochs."""

_base_ = "anchor_detr_r50_dc5.py"
modelname = "dn_anchor_detr"
use_dn = True
