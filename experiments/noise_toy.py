"""DN-DETR's ablations, on the toy set: groups, box noise, label noise."""

from experiments import IMAGENET, TOY, TOY_SIZES, Arm, Experiment

CLAIM = (
    "DN-DETR (ablations): several denoising groups are better than one, on COCO 0.441 and 0.434 "
    "with five and one; moderate noise is better than none or much. Its models have five groups, "
    "box noise 0.4 and label noise 0.2."
)
# The published settings, and what one arm after the other changes.
PUBLISHED = {"dn_number": 5, "dn_box_noise_scale": 0.4, "dn_label_noise_ratio": 0.2}
CHANGES = {
    "1 group": {"dn_number": 1},
    "10 groups": {"dn_number": 10},
    "box noise 0": {"dn_box_noise_scale": 0.0},
    "box noise 0.2": {"dn_box_noise_scale": 0.2},
    "box noise 0.8": {"dn_box_noise_scale": 0.8},
    "label noise 0": {"dn_label_noise_ratio": 0.0},
    "label noise 0.4": {"dn_label_noise_ratio": 0.4},
}


def arms(config: str) -> dict[str, Arm]:
    base = "5 groups, box noise 0.4, label noise 0.2"
    changed = {
        name: Arm(config, {**PUBLISHED, **change}, against=base) for name, change in CHANGES.items()
    }
    return {base: Arm(config, PUBLISHED), **changed}


experiment = Experiment(
    title="DN-DETR's ablations: toy set",
    claim=CLAIM,
    data=TOY,
    epochs=4,
    arms=arms("toy/dn_dab_deformable_detr"),
    options={**TOY_SIZES, **IMAGENET},
)
