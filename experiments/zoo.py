"""A toy model of every kind, each with the settings of its config in configs/toy/."""

from statistics import fmean

from experiments import AP, AP50, FOLDER, Arm, Experiment, Figure, Toy, logged

CONFIGS = FOLDER.parent / "configs/toy"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("base"))


def minutes(line: dict) -> float:
    hours, minutes, seconds = map(int, line["epoch_time"].split(":"))
    return 60 * hours + minutes + seconds / 60


experiment = Experiment(
    title="Every toy model",
    claim=(
        "What the models of `configs/toy/` reach on the data set of `make demo`. They are trained "
        "for different numbers of epochs and on one core each, so the table does not rank them."
    ),
    data=Toy(num_val=200),
    epochs=None,
    arms={name: Arm(f"toy/{name}") for name in NAMES},
    seeds=(0,),
    figures=[
        AP,
        AP50,
        Figure("M parameters", lambda line: line["n_parameters"] / 1e6, digits=1),
        Figure("minutes", minutes, sum, digits=1),
        logged("images/s", "train_images_per_second", summary=fmean, digits=0),
    ],
    drawn=(),
)
