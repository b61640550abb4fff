"""A small DAB-Deformable-DETR for the toy data set."""

_base_ = ["../dab_deformable_detr_r50.py", "base.py"]

num_feature_levels = 3
