"""A small Anchor DETR with denoising, for the toy data set."""

_base_ = "anchor_detr.py"

modelname = "dn_anchor_detr"
use_dn = True
dn_label_noise_ratio = 0.5
