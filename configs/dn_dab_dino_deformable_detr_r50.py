"""DINO in DN-DETR's code, ResNet-50, 36 epochs. Published: 50.8 to 51.0 AP on COCO val2017."""

_base_ = "dab_deformable_detr_r50.py"

modelname = "dn_dab_dino_deformable_detr"
use_dn = True
contrastive = True
dn_number = 100
query_selection = "mixed"
look_forward_twice = True
num_select = 300
epochs = 36
lr_drop = 30
