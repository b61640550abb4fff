"""DINO, Swin-L, 5 scales, 12 epochs. Published: 57.3 AP on COCO val2017 (58.5 after 36 epochs)."""

_base_ = "dino_4scale_swin_l.py"

return_interm_indices = [0, 1, 2, 3]
num_feature_levels = 5
batch_size = 1  # on 16 GPUs
