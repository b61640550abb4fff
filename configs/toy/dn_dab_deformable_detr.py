"""A small DN-Deformable-DETR for the toy data set."""

_base_ = ["../dn_dab_deformable_detr_r50.py", "base_deformable.py"]

dn_label_noise_ratio = 0.5
