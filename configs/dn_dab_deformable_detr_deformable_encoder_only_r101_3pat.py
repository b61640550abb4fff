"""DN-Deformable-DETR, deformable encoder only, 3 patterns, ResNet-101, 12 epochs. Published: 44.1
AP on COCO val2017."""

_base_ = "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat_12ep.py"

backbone = "resnet101"
