"""A small Anchor DETR for the toy data set."""

_base_ = ["../anchor_detr_r50.py", "base.py"]

return_interm_indices = [2]  # stride 16
epochs = 6
