"""A small Deformable DETR with box refinement for the toy data set."""

_base_ = ["../deformable_detr_r50_refine.py", "base.py"]

num_feature_levels = 3
dropout = 0
