"""A small DINO for the toy data set, from random weights on a CPU in ten minutes."""

_base_ = "../dino_4scale_r50.py"

backbone = "timm/resnet10t"
return_interm_indices = [1, 2, 3]
num_feature_levels = 3
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"  # frozen statistics only suit pretrained weights
hidden_dim = 128
enc_layers = 2
dec_layers = 3
dim_feedforward = 512
num_queries = 40
num_select = 100

dn_number = 50  # 100 denoising queries in all

data_aug_scales = [96, 112, 128]
data_aug_max_size = 128
data_aug_scales2_crop = []
num_workers = 0  # such images take a millisecond each; a worker would only take a core away

batch_size = 8
lr = 4e-4
lr_backbone = 4e-4
epochs = 11
lr_drop = 9
