"""A small DINO for the toy data set."""

_base_ = ["../dino_4scale_r50.py", "base.py"]

num_feature_levels = 3
enc_layers = 2  # a step takes three quarters of the time that four need
dn_number = 3  # 6 contrastive groups
dn_label_noise_ratio = 0.2
batch_size = 8  # two thirds of the time that batches of 4 need
lr = 9e-4
lr_backbone = 9e-4
epochs = 5
