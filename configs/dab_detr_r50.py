"""DAB-DETR, ResNet-50, 50 epochs."""

modelname = "dab_detr"
