"""DN-DETR, figure 1 and section 3, on the toy set: denoising halves the training."""

from experiments import (
    AP,
    AP50,
    CONSTANT_RATE,
    IMAGENET,
    TOY,
    TOY_SIZES,
    Arm,
    Experiment,
    Figure,
    by_layer,
)

CLAIM = (
    "DN-DETR (figure 1): with denoising, a detector reaches the final AP that it has without after "
    "half of the epochs; on COCO, 0.444 after 25 epochs and 0.445 after 50, deformable 0.468 and "
    "0.469. Section 3: the matching of queries to objects changes less from epoch to epoch, and "
    "anchors are closer to the objects that they are matched to."
)


def arms(place: str = "", suffix: str = "") -> dict[str, Arm]:
    """A dense and a deformable detector, each without and with denoising; their config files are
    those in `place` with this suffix."""
    name = lambda model: f"{place}{model}{suffix}"
    return {
        "DAB-DETR": Arm(name("dab_detr")),
        "DN-DETR": Arm(name("dn_dab_detr"), against="DAB-DETR"),
        "DAB-Deformable-DETR": Arm(name("dab_deformable_detr")),
        "DN-Deformable-DETR": Arm(name("dn_dab_deformable_detr"), against="DAB-Deformable-DETR"),
    }


def figures(layers: int) -> list[Figure]:
    return [
        AP,
        AP50,
        *by_layer("matching instability", "test_matching_instability", layers),
        *by_layer("anchor distance", "test_anchor_distance", layers),
    ]


experiment = Experiment(
    title="Denoising halves the training: toy set",
    claim=CLAIM,
    data=TOY,
    epochs=6,
    arms=arms("toy/"),
    options={**TOY_SIZES, **IMAGENET, "log_matching": True, **CONSTANT_RATE},
    figures=figures(layers=3),
)
