"""DN-Deformable-DETR, deformable encoder only, 3 patterns, ResNet-50, 12 epochs. Published: 43.4 AP
on COCO val2017 (48.6 after 50 epochs)."""

modelname = "dn_dab_deformable_detr_deformable_encoder_only"
return_interm_indices = [1, 2, 3]
transformer_activation = "relu"
num_patterns = 3
use_dn = True
epochs = 12
lr_drop = 11
