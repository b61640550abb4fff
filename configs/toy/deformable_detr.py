"""A small Deformable DETR with box refinement for the toy data set."""

_base_ = ["../deformable_detr_r50_refine.py", "base_deformable.py"]

dropout = 0
