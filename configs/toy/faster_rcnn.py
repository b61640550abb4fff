"""A small Faster R-CNN for the toy data set. Its smallest anchors are 32 pixels, so images are
twice as large as for the other models."""

modelname = "faster_rcnn"
backbone = "timm/test_resnet"
pretrained_backbone = False
batch_norm_type = "BatchNorm2d"
hidden_dim = 32
dim_feedforward = 256
num_regions = 64  # most of the time on a CPU is theirs

data_aug_scales = [192, 224, 256]
data_aug_max_size = 256
data_aug_scales2_crop = []
num_workers = 0

batch_size = 4
eval_batch_size = 20
optimizer = "muon"
lr = 6e-4
lr_backbone = 6e-4
onecyclelr = True
epochs = 3  # it learns fastest
