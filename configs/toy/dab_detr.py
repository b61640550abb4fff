"""A small DAB-DETR for the toy data set."""

_base_ = "base.py"

modelname = "dab_detr"
return_interm_indices = [2]  # stride 16
pe_temperatureH = 2
pe_temperatureW = 2
epochs = 6
