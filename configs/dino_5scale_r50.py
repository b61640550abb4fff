"""DINO, ResNet-50, 5 scales, 12 epochs. Published: 49.4 AP on COCO val2017 (51.3 after 24 epochs,
51.2 after 36)."""

_base_ = "dino_4scale_r50.py"

return_interm_indices = [0, 1, 2, 3]
num_feature_levels = 5
batch_size = 1  # on 16 GPUs
