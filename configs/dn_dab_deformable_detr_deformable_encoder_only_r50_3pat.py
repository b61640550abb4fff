"""DN-Deformable-DETR, deformable encoder only, 3 patterns, ResNet-50, 50 epochs. Published: 48.6 AP
on COCO val2017."""

modelname = "dn_dab_deformable_detr_deformable_encoder_only"
return_interm_indices = [1, 2, 3]
transformer_activation = "relu"
num_patterns = 3
use_dn = True
batch_size = 1  # on 16 GPUs
