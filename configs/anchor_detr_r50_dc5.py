"""Anchor DETR-DC5, ResNet-50, 50 epochs. Published: 44.3 AP on COCO val2017."""

modelname = "anchor_detr"
dilation = True
dim_feedforward = 1024
transformer_activation = "relu"
cls_loss_coef = 2
num_select = 100
batch_size = 1  # on 8 GPUs
