"""DN-Deformable-DETR, deformable encoder only, 3 patterns, ResNet-50, 12 epochs. Published: 43.4 AP
on COCO val2017."""

_base_ = "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat.py"
epochs = 12
lr_drop = 11
