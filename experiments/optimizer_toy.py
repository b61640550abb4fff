"""What this project claims itself: Muon against AdamW, and the average of the weights."""

from dataclasses import replace

from experiments import AP, AP50, AP_OF_AVERAGE, CONSTANT_RATE, GAIN_BY_AVERAGING, Experiment
from experiments.optimizer_rates_toy import arms
from experiments.optimizer_rates_toy import experiment as tuning

CLAIM = (
    "Ours: from random weights, Muon learns faster than AdamW, each at the best of four rates (see "
    "the comparison of rates, whose seed is another); and as long as the rate has not fallen, the "
    "average of the weights has a higher AP than the weights."
)
BEST = {"adamw": 1e-3, "muon": 9e-4}

adamw, muon = arms("toy/dn_dab_deformable_detr", {k: [v] for k, v in BEST.items()}, 1).values()

experiment = Experiment(
    title="Muon and AdamW, and averaged weights: toy set",
    claim=CLAIM,
    data=tuning.data,
    epochs=tuning.epochs,
    arms={
        "AdamW": adamw,
        "Muon": replace(muon, against="AdamW"),
        "Muon, constant rate": replace(
            muon, options={**muon.options, **CONSTANT_RATE}, against="Muon"
        ),
    },
    options={**tuning.options, "use_ema": True, "ema_decay": 0.99},
    seeds=(1, 2, 3),
    figures=[AP, AP50, AP_OF_AVERAGE, GAIN_BY_AVERAGING],
    drawn=["AP", "AP of the averaged weights"],
)
