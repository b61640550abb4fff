"""A small DN-DETR for the toy data set."""

_base_ = "dab_detr.py"

modelname = "dn_dab_detr"
use_dn = True
dn_label_noise_ratio = 0.5
