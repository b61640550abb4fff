"""Writes a checkpoint of main.py in the authors' released format, to go back to their code:

    python tools/export_checkpoint.py --resume outputs/run/checkpoint.pth --output released.pth

from any directory. The file holds "model", "epoch" (the last complete one) and "args", as theirs
do, and the labels' "class_map", which their code passes over and main.py and inference.py read.
Weights keep their names, which are the released ones. "optimizer" and "lr_scheduler" are left out:
a saved optimiser tells parameters apart by their order alone, and the authors' is another. Their
code evaluates such a file or begins a training with it, but cannot go on with the one that made it.
"""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.errors import UserError
from util.checkpoint import read_checkpoint, save_checkpoint
from util.config import ALIASES, Config, Parser, load_config


def released_args(cfg: Config) -> Namespace:
    """The config under today's names, and under the released ones where these differ."""
    args = dataclasses.asdict(cfg)
    args |= {old: args[new] for old, new in ALIASES.items()}
    # DN-DETR's code and DINO's each have a switch for whether tokens are selected, and one for
    # whether the content is learned all the same; util.config.resolve_selection is the inverse.
    selects, mixed = cfg.query_selection != "static", cfg.query_selection == "mixed"
    args |= {"two_stage": selects, "two_stage_type": "standard" if selects else "no"}
    args |= {"use_mqs": mixed, "embed_init_tgt": mixed}
    # Here None stands for num_classes; DINO's code wants the number.
    args["dn_labelbook_size"] = cfg.dn_labelbook_size or cfg.num_classes
    return Namespace(**args)


def export(path: str | Path, ema: bool = False) -> dict:
    """What the released file of main.py's checkpoint `path` holds. `ema`: the averaged weights.

    UserError where the checkpoint cannot be read, is none of main.py's, or has no average.
    """
    checkpoint = read_checkpoint(path)
    if missing := {"model", "epoch", "config", "class_map"} - checkpoint.keys():
        raise UserError(
            f"{path}: holds no {', '.join(sorted(missing))}, so it is a released checkpoint "
            "already or none of main.py's; name a checkpoint.pth that main.py wrote"
        )
    if ema and not checkpoint.get("ema_model"):
        raise UserError(f"{path}: holds no averaged weights (ema_model); leave out --ema")
    kept = {key: checkpoint[key] for key in ("epoch", "class_map")}
    weights, cfg = checkpoint["ema_model" if ema else "model"], checkpoint["config"]
    return {"model": weights, "args": released_args(load_config(overrides=cfg)), **kept}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for a mistake of the user."""
    description = "Write a checkpoint of main.py in the authors' released format."
    epilog = "It holds no optimiser: their code evaluates it or fine-tunes it, but cannot go on."
    parser = Parser("export_checkpoint.py", description=description, epilog=epilog)
    parser.add_argument("--resume", required=True, metavar="FILE", help="checkpoint of main.py")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    try:
        args = parser.parse_args(argv)
        state, output = export(args.resume, args.ema), Path(args.output)
        if output.is_dir():
            raise UserError(f"--output: {output} is a directory; name a file")
        if output.exists() and output.samefile(args.resume):
            raise UserError(f"--output: {output} is the checkpoint itself; name another file")
        save_checkpoint(output, state)
    except (UserError, OSError) as e:  # an OSError names its file
        print(f"export_checkpoint.py: error: {e}", file=sys.stderr)
        return 2
    options, rows = state["args"], state["class_map"]["categories"]
    print(f"{output}: {options.modelname} after epoch {state['epoch']}")
    if options.backbone.startswith("timm/"):
        print(f"note: the authors' code has no backbone {options.backbone}")
    if any(label != id_ for label, id_, _ in rows):
        print("note: the authors' code takes category ids for labels; renumber the data set's:")
        print("  " + ", ".join(f"{id_} -> {label}" for label, id_, _ in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
