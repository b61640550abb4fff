"""DINO, ConvNeXt-XL, 4 scales, 12 epochs. No published AP."""

_base_ = "dino_4scale_r50.py"

backbone = "convnext_xlarge_22k"
