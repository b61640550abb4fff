"""A small Faster R-CNN with denoising for the toy data set."""

_base_ = "faster_rcnn.py"

modelname = "dn_faster_rcnn"
use_dn = True
dn_number = 10
