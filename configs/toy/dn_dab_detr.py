"""A small DN-DETR for the toy data set, trained from scratch on a CPU."""

modelname = "dn_dab_detr"
use_dn = True
backbone = "resnet18"
return_interm_indices = [2]
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"
hidden_dim = 128
nheads = 8
enc_layers = 2
dec_layers = 3
dim_feedforward = 512
num_queries = 50
num_select = 100
data_aug_scales = [96, 112, 128]
data_aug_max_size = 160
data_aug_scales2_crop = []
batch_size = 16
lr = 4e-4
lr_backbone = 4e-4
onecyclelr = True
epochs = 20
