"""A small DN-DETR with a deformable encoder, for the toy data set."""

_base_ = ["../dn_dab_deformable_detr_deformable_encoder_only_r50_3pat.py", "base_deformable.py"]

num_patterns = 0
dn_label_noise_ratio = 0.5
