"""Deformable DETR with iterative box refinement, ResNet-50, 50 epochs. Published: 46.2 AP on COCO
val2017."""

_base_ = "deformable_detr_r50.py"

with_box_refine = True
