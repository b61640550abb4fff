"""Faster R-CNN with denoising, ResNet-50 with a feature pyramid, the settings of Faster R-CNN and
ten groups as in DN-DETR's extended version. No code or weights of it were published."""

_base_ = "faster_rcnn_r50_fpn.py"

modelname = "dn_faster_rcnn"
use_dn = True
dn_number = 10
