"""DINO, table 4, on the toy set: one after the other of its three ideas."""

from experiments import AP, AP50, DUPLICATES, IMAGENET, TOY, TOY_SIZES, Arm, Experiment

CLAIM = (
    "DINO (table 4): pure query selection, then mixed selection, contrastive denoising and look "
    "forward twice each raise the AP of DN-Deformable-DETR, on COCO by 0.016, 0.005, 0.005 and "
    "0.004. Section 3.2: contrastive denoising suppresses duplicates, detections of an object "
    "beside its best one."
)


def arms(config: str) -> dict[str, Arm]:
    """DINO's config without its ideas, and then with one more in every arm. The noise of boxes is
    DN-DETR's before contrastive denoising, and DINO's with it."""
    options = {
        "query_selection": "static",
        "contrastive": False,
        "dn_box_noise_scale": 0.4,
        "look_forward_twice": False,
    }
    steps = {
        "DN-Deformable-DETR": {},
        "+ pure selection": {"query_selection": "pure"},
        "+ mixed selection": {"query_selection": "mixed"},
        "+ contrastive denoising": {"contrastive": True, "dn_box_noise_scale": 1.0},
        "+ look forward twice (DINO)": {"look_forward_twice": True},
    }
    found: dict[str, Arm] = {}
    for name, step in steps.items():
        options = options | step
        found[name] = Arm(config, options, against=next(reversed(found), ""))
    return found


experiment = Experiment(
    title="DINO's ablation: toy set",
    claim=CLAIM,
    data=TOY,
    epochs=10,
    arms=arms("toy/dino"),
    options={**TOY_SIZES, **IMAGENET, "save_results": True},
    figures=[AP, AP50, DUPLICATES],
)
