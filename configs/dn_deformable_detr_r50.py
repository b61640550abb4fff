"""Deformable DETR with box refinement and denoising, ResNet-50, 50 epochs. Its authors released
neither code nor settings: those are Deformable DETR's and DN-DETR's."""

_base_ = "deformable_detr_r50_refine.py"

modelname = "dn_deformable_detr"
use_dn = True
