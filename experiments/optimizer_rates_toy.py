"""The learning rates to compare Muon and AdamW at, on the toy set: four of each."""

from collections.abc import Mapping, Sequence

from experiments import AP, AP50, TOY, TOY_SIZES, Arm, Experiment

CLAIM = "The best rate of each optimiser, of this seed, is the one that they are compared at."
RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3), "muon": (2.25e-4, 4.5e-4, 9e-4, 1.8e-3)}


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
    title="Rates of Muon and AdamW: toy set",
    claim=CLAIM,
    data=TOY,
    epochs=6,
    arms=arms("toy/dn_dab_deformable_detr", RATES, backbone=1),
    options=TOY_SIZES,
    seeds=(0,),
    figures=[AP, AP50],
)
