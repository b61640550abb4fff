"""Deformable DETR with box refinement and two stages, ResNet-50, 50 epochs. Published: 46.9 AP on
COCO val2017."""

_base_ = "deformable_detr_r50_refine.py"

query_selection = "pure"
