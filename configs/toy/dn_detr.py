"""A small DETR with denoising for the toy data set."""

_base_ = "detr.py"

modelname = "dn_detr"
use_dn = True
dn_label_noise_ratio = 0.5
