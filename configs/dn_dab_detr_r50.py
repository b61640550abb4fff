"""DN-DETR, ResNet-50, 50 epochs. Published: 44.1 AP on COCO val2017 (44.4 retrained)."""

modelname = "dn_dab_detr"
use_dn = True
