"""A small DN-DETR for the toy data set, from random weights on a CPU in ten minutes.

Where it departs from the published settings, it is to learn within 22,000 images: one encoder layer
and 64 pixel tokens an image, so that attention finds its place early; a heavier class term and more
label noise, as six shapes take longer to tell apart than to find.
"""

modelname = "dn_dab_detr"
backbone = "timm/resnet10t"
return_interm_indices = [2]  # stride 16
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"  # frozen statistics only suit pretrained weights
hidden_dim = 128
enc_layers = 1
dec_layers = 3
dim_feedforward = 512
num_queries = 40
num_select = 100
pe_temperatureH = 2
pe_temperatureW = 2

use_dn = True
dn_label_noise_ratio = 0.5
cls_loss_coef = 4

data_aug_scales = [96, 112, 128]
data_aug_max_size = 128
data_aug_scales2_crop = []
num_workers = 0  # such images take a millisecond each; a worker would only take a core away

batch_size = 8
lr = 4e-4
lr_backbone = 4e-4
epochs = 11
lr_drop = 9
