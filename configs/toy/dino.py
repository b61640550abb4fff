"""A small DINO for the toy data set."""

_base_ = ["../dino_4scale_r50.py", "base.py"]

num_feature_levels = 3
dn_number = 50  # 100 denoising queries in all
epochs = 6
