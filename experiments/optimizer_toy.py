"""What this project claims itself: Muon against AdamW, and the average of the weights."""

from collections.abc import Mapping, Sequence

from experiments import AP, AP50, AP_OF_AVERAGE, Arm, Experiment, Toy

CLAIM = (
    "Ours: from random weights, Muon learns faster than AdamW, when the rates of both were tuned; "
    "the average of the weights has a higher AP than the weights. The best rate of each optimiser "
    "is the one to compare."
)
RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3), "muon": (1.5e-4, 3e-4, 6e-4, 1.2e-3)}


def arms(config: str, rates: Mapping[str, Sequence[float]], backbone: float) -> dict[str, Arm]:
    """An arm for each of the optimisers' rates; `backbone`: its rate relative to the others."""
    return {
        f"{name}, {rate:g}": Arm(
            config, {"optimizer": name, "lr": rate, "lr_backbone": backbone * rate}
        )
        for name in rates
        for rate in rates[name]
    }


experiment = Experiment(
    title="Muon and AdamW, and averaged weights: toy set",
    claim=CLAIM,
    data=Toy(num_train=1000, num_val=250),
    epochs=8,
    arms=arms("toy/dn_dab_deformable_detr", RATES, backbone=1),
    options={"use_ema": True, "ema_decay": 0.99},
    figures=[AP, AP50, AP_OF_AVERAGE],
)
