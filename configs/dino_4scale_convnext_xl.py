"""DINO, ConvNeXt-XL, 4 scales, 12 epochs. The authors give no AP for it."""

_base_ = "dino_4scale_r50.py"

backbone = "convnext_xlarge_22k"
