"""A small DAB-Deformable-DETR for the toy data set."""

_base_ = ["../dab_deformable_detr_r50.py", "base_deformable.py"]
