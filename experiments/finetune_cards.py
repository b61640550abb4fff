"""--finetune on 296 photos of playing cards, from a DINO that was trained on the toy set."""

from collections.abc import Callable
from dataclasses import replace

from experiments import CONSTANT_RATE, GAIN_BY_AVERAGING, IMAGENET, Arm, Experiment, Figure
from experiments.convergence_cards import SIZES

CLAIM = (
    "With few images, --finetune's warm-up and average of the weights raise the AP, whether a "
    "detector starts from an ImageNet backbone or from a trained detector, here of synthetic "
    "shapes. A trained one has a higher AP in the first epoch. AP is that of the average where "
    "there is one."
)


def of_average(index: int) -> Callable[[dict], float]:
    return lambda line: line.get("ema_test_coco_eval_bbox", line["test_coco_eval_bbox"])[index]


RECIPE = {"warmup_epochs": 1, "use_ema": True, "ema_warmup": True}
IGNORED = {"finetune_ignore": ["class_embed", "label_enc"]}
of_toy = Arm("toy/dino", program="experiments.programs.after_toy")

experiment = Experiment(
    title="Fine-tuning: playing cards",
    claim=CLAIM,
    data="cards",
    epochs=10,
    arms={
        "ImageNet backbone": Arm("toy/dino"),
        "ImageNet backbone, recipe": Arm("toy/dino", RECIPE, against="ImageNet backbone"),
        "toy-trained DINO": replace(
            of_toy,
            options={"pretrain_model_path": "TOY_TRAINED", **IGNORED},
            against="ImageNet backbone",
        ),
        "toy-trained DINO, --finetune": replace(
            of_toy, options={"finetune": "TOY_TRAINED"}, against="toy-trained DINO"
        ),
    },
    # As with early stopping, nobody knows before when the rate should fall; but all epochs, so that
    # the courses can be compared.
    options={**IMAGENET, **SIZES, **CONSTANT_RATE, "patience": 0},
    figures=[
        Figure("AP", of_average(0)),
        Figure("AP50", of_average(1)),
        Figure("AP in the first epoch", of_average(0), lambda values: values[0]),
        GAIN_BY_AVERAGING,
    ],
)
