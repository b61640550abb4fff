"""Faster R-CNN, ResNet-50 with a feature pyramid; image size and epochs of torchvision's recipe.
Published: 37.0 AP on COCO val2017, by SGD with a warm-up of 1000 steps; here AdamW without."""

modelname = "faster_rcnn"
lr_backbone = 1e-4
clip_max_norm = 0
data_aug_scales = [800]
data_aug_scales2_crop = []
epochs = 26
multi_step_lr = True
lr_drop_list = [16, 22]
