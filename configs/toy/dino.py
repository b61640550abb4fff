"""A small DINO for the toy data set."""

_base_ = ["../dino_4scale_r50.py", "base_deformable.py"]

dn_number = 3  # 6 contrastive groups
dn_label_noise_ratio = 0.2
epochs = 5
