"""A small DETR for the toy data set."""

_base_ = "base.py"

modelname = "detr"
return_interm_indices = [2]  # stride 16
set_cost_class = 1
cls_loss_coef = 1
epochs = 6
