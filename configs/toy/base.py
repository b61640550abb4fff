"""Common settings of the toy models: small images, and a small model with random initial weights.

The classification loss has a higher weight, as shapes are harder to classify than to localise.
"""

backbone = "timm/test_resnet"
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"  # frozen statistics need pretrained weights
hidden_dim = 128
nheads = 4
enc_layers = 1
dec_layers = 3
dim_feedforward = 256
num_queries = 40
num_select = 100
cls_loss_coef = 10

data_aug_scales = [96, 112, 128]
data_aug_max_size = 128
data_aug_scales2_crop = []
num_workers = 0  # images load in a millisecond; workers would only compete for cores

batch_size = 4
eval_batch_size = 20  # all images have the same size, so there is no padding
optimizer = "muon"
lr = 6e-4
lr_backbone = 6e-4
onecyclelr = True
epochs = 4
