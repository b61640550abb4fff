"""What the mask between denoising groups and matching queries is for, on the toy set."""

from experiments import AP, AP50, IMAGENET, TOY, TOY_SIZES, TRAINING_LOSS, Arm, Experiment

CLAIM = (
    "DN-DETR (section 4): without the mask, matching queries copy the answer from the denoising "
    "queries. The training loss falls, and the AP, measured without denoising queries, collapses, "
    "on COCO from 0.434 to 0.240."
)


def arms(config: str) -> dict[str, Arm]:
    without = Arm(config, against="with the mask", program="experiments.programs.without_mask")
    return {"with the mask": Arm(config), "without the mask": without}


experiment = Experiment(
    title="The mask between denoising and matching: toy set",
    claim=CLAIM,
    data=TOY,
    epochs=4,
    arms=arms("toy/dn_dab_deformable_detr"),
    options={**TOY_SIZES, **IMAGENET},
    figures=[AP, AP50, TRAINING_LOSS],
    drawn=["AP", "training loss"],
)
