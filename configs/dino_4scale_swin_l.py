"""DINO, Swin-L, 4 scales, 12 epochs. Published: 56.8 AP on COCO val2017 (58.0 after 36 epochs)."""

_base_ = "dino_4scale_r50.py"

backbone = "swin_L_384_22k"
use_checkpoint = True
