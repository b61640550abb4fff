"""DAB-Deformable-DETR, ResNet-50, 4 scales, 50 epochs."""

modelname = "dab_deformable_detr"
return_interm_indices = [1, 2, 3]
transformer_activation = "relu"
pe_temperatureH = 10000
pe_temperatureW = 10000
pe_offset = -0.5
num_select = 100
