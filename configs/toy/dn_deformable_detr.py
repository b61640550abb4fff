"""A small Deformable DETR with denoising for the toy data set."""

_base_ = "deformable_detr.py"

modelname = "dn_deformable_detr"
use_dn = True
dn_label_noise_ratio = 0.5
