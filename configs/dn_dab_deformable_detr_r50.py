"""DN-DAB-Deformable-DETR (v2), ResNet-50, 50 epochs. Published: 49.5 AP on COCO val2017 (48.4
after 24 epochs)."""

_base_ = "dab_deformable_detr_r50.py"

modelname = "dn_dab_deformable_detr"
use_dn = True
