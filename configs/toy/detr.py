"""A small DETR for the toy data set."""

_base_ = "base.py"

modelname = "detr"
return_interm_indices = [2]  # stride 16
set_cost_class = 1
cls_loss_coef = 5  # its cross-entropy is larger than the focal loss of the others
epochs = 6
