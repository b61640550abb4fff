"""Deformable DETR, ResNet-50, 4 scales, 50 epochs, 16 GPUs. Published: 44.5 AP on COCO val2017."""

modelname = "deformable_detr"
return_interm_indices = [1, 2, 3]
dim_feedforward = 1024
dropout = 0.1
transformer_activation = "relu"
pe_temperatureH = 10000
pe_temperatureW = 10000
pe_offset = -0.5
num_select = 100

cls_loss_coef = 2

lr = 2e-4
lr_backbone = 2e-5
param_dict_type = "ddetr_in_mmdet"  # a tenth of the rate for reference points and offsets
eval_batch_size = 2
save_checkpoint_interval = 5
