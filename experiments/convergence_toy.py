"""DN-DETR, figure 1 and section 3, on the toy set: denoising halves the training."""

from collections.abc import Mapping
from typing import Any

from experiments import AP, AP50, Arm, Experiment, Figure, Toy, by_layer

CLAIM = (
    "DN-DETR (figure 1): with denoising, a detector reaches the final AP that it has without after "
    "half of the epochs. Section 3: the matching of queries to objects changes less from epoch to "
    "epoch, and anchors are closer to the objects that they are matched to."
)


def arms(
    place: str = "",
    suffix: str = "",
    dense: Mapping[str, Any] = {},
    deformable: Mapping[str, Any] = {},
) -> dict[str, Arm]:
    """A dense and a deformable detector, each without and with denoising; their config files are
    those in `place` with this suffix. `dense`, `deformable`: options of these."""
    name = lambda model: f"{place}{model}{suffix}"
    return {
        "DAB-DETR": Arm(name("dab_detr"), dense),
        "DN-DETR": Arm(name("dn_dab_detr"), dense, against="DAB-DETR"),
        "DAB-Deformable-DETR": Arm(name("dab_deformable_detr"), deformable),
        "DN-Deformable-DETR": Arm(
            name("dn_dab_deformable_detr"), deformable, against="DAB-Deformable-DETR"
        ),
    }


def figures(layers: int) -> list[Figure]:
    return [
        AP,
        AP50,
        *by_layer("matching instability", "test_matching_instability", layers),
        *by_layer("anchor distance", "test_anchor_distance", layers),
    ]


SIZES = {"data_aug_scales": [72, 84, 96], "data_aug_max_size": 96, "batch_size": 8}

experiment = Experiment(
    title="Denoising halves the training: toy set",
    claim=CLAIM,
    data=Toy(num_train=1000, num_val=200, size=96),
    epochs=10,
    arms=arms("toy/", dense={"return_interm_indices": [1]}),  # stride 8
    options={**SIZES, "log_matching": True, "onecyclelr": False, "lr_drop": 8},
    figures=figures(layers=3),
)
