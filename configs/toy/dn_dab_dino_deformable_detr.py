"""A small DINO as in DN-DETR's code, for the toy data set."""

_base_ = ["../dn_dab_dino_deformable_detr_r50.py", "base_deformable.py"]
