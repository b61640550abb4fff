"""main.py, where TOY_TRAINED in the arguments stands for a checkpoint that is made first: of the
same model and seed, trained on the toy set, but for its backbone, which would forget what it knows
of photos. It is next to the arms, which share it."""

import dataclasses
import fcntl
import sys
from collections.abc import Sequence
from pathlib import Path

import main as program
from datasets.toy import make_toy_coco
from experiments import TOY, TOY_SIZES

TOY_TRAINED = "TOY_TRAINED"
EPOCHS = 6


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    place = out.parents[1] / TOY_TRAINED.lower() / out.name
    place.mkdir(parents=True, exist_ok=True)
    flags = {"output_dir": place, "coco_path": place / "data", "epochs": EPOCHS, "onecyclelr": True}
    flags |= {"backbone_freeze_keywords": ["body"], **TOY_SIZES}
    toy_argv = [*argv, *(f"--{k}={v}" for k, v in flags.items())]  # the last ones count
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "data/annotations/instances_val2017.json").exists():
            make_toy_coco(place / "data", **dataclasses.asdict(TOY))
        status = program.main([word for word in toy_argv if TOY_TRAINED not in word])
    checkpoint = str(place / "checkpoint.pth")
    return status or program.main([word.replace(TOY_TRAINED, checkpoint) for word in argv])


if __name__ == "__main__":
    sys.exit(main())
