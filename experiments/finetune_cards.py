"""--finetune on 296 photos of playing cards, from a DINO that was trained on the toy set."""

from collections.abc import Callable
from dataclasses import replace

from experiments import IMAGENET, Arm, Experiment, Figure
from experiments.convergence_cards import SIZES

CLAIM = (
    "With few images, a detector that starts from a trained one, here of synthetic shapes, has a "
    "higher AP than one that starts from an ImageNet backbone. From either, warm-up and an "
    "average of the weights, which --finetune also sets, raise it. AP is that of the average where "
    "there is one."
)


def best(index: int) -> Callable[[dict], float]:
    return lambda line: line.get("ema_test_coco_eval_bbox", line["test_coco_eval_bbox"])[index]


RECIPE = {"warmup_epochs": 1, "use_ema": True, "ema_warmup": True}
IGNORED = {"finetune_ignore": ["class_embed", "label_enc"]}
of_toy = Arm("toy/dino", program="experiments.programs.after_toy")

experiment = Experiment(
    title="Fine-tuning: playing cards",
    claim=CLAIM,
    data="cards",
    epochs=8,
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
    # All epochs, so that the courses can be compared.
    options={**IMAGENET, **SIZES, "onecyclelr": False, "lr_drop": 6, "patience": 0},
    figures=[Figure("AP", best(0)), Figure("AP50", best(1))],
)
