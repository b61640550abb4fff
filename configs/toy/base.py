"""What the toy models share: small images, and a small model that learns from random weights.

The class term is heavier, as six shapes take longer to tell apart than to find.
"""

backbone = "timm/test_resnet"
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"  # frozen statistics only suit pretrained weights
hidden_dim = 128
nheads = 4
enc_layers = 4
dec_layers = 3
dim_feedforward = 256
num_queries = 40
num_select = 100
cls_loss_coef = 10

data_aug_scales = [96, 112, 128]
data_aug_max_size = 128
data_aug_scales2_crop = []
num_workers = 0  # such images take a millisecond each; a worker would only take a core away

batch_size = 4
optimizer = "muon"
lr = 6e-4
lr_backbone = 6e-4
onecyclelr = True
epochs = 4
