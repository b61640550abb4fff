"""Exports a checkpoint of main.py to the authors' released format, for use with their code:

    python tools/export_checkpoint.py --resume outputs/run/checkpoint.pth --output released.pth

The file contains "model", "epoch" (the last complete one) and "args", like theirs, and the
"class_map", which their code ignores and main.py and inference.py read. Weights have the released
names. "optimizer" and "lr_scheduler" are omitted: optimiser states identify parameters by order,
which differs in the authors' code. It can evaluate or fine-tune the model, not resume the training.
"""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.cli import Parser
from models.errors import UserError
from util.checkpoint import read_checkpoint, save_checkpoint
from util.config import ALIASES, Config, load_config


def released_args(cfg: Config) -> Namespace:
    """The config under its current names, and also the released ones if they differ."""
    args = dataclasses.asdict(cfg)
    args |= {old: args[new] for old, new in ALIASES.items()}
    # The inverse of util.config.resolve_selection. DN-DETR's and DINO's code each have a switch for
    # selecting tokens and one for learned content.
    selects, mixed = cfg.query_selection != "static", cfg.query_selection == "mixed"
    args |= {"two_stage": selects, "two_stage_type": "standard" if selects else "no"}
    args |= {"use_mqs": mixed, "embed_init_tgt": mixed}
    # None means num_classes here; DINO's code needs the number.
    args["dn_labelbook_size"] = cfg.dn_labelbook_size or cfg.num_classes
    return Namespace(**args)


def export(path: str | Path, ema: bool = False) -> dict:
    """The contents of the released file for main.py's checkpoint `path`. `ema`: use the EMA.
    UserError if the checkpoint cannot be read, was not written by main.py, or has no EMA."""
    checkpoint = read_checkpoint(path)
    if missing := {"model", "epoch", "config", "class_map"} - checkpoint.keys():
        raise UserError(
            f"{path}: holds no {', '.join(sorted(missing))}, so it is a released checkpoint "
            "already or was not written by main.py; pass a checkpoint.pth of main.py"
        )
    if ema and not checkpoint.get("ema_model"):
        raise UserError(f"{path}: holds no averaged weights (ema_model); leave out --ema")
    kept = {key: checkpoint[key] for key in ("epoch", "class_map")}
    weights, cfg = checkpoint["ema_model" if ema else "model"], checkpoint["config"]
    return {"model": weights, "args": released_args(load_config(overrides=cfg)), **kept}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user error."""
    description = "Export a checkpoint of main.py to the authors' released format."
    epilog = "There is no optimiser state: their code can evaluate or fine-tune it, but not resume."
    parser = Parser("export_checkpoint.py", description=description, epilog=epilog)
    parser.add_argument("--resume", required=True, metavar="FILE", help="checkpoint of main.py")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights (EMA)")
    try:
        args = parser.parse_args(argv)
        state, output = export(args.resume, args.ema), Path(args.output)
        if output.is_dir():
            raise UserError(f"--output: {output} is a directory; pass a file name")
        if output.exists() and output.samefile(args.resume):
            raise UserError(f"--output: {output} is the checkpoint itself; pass another file")
        save_checkpoint(output, state)
    except (UserError, OSError) as e:  # an OSError names its file
        print(f"export_checkpoint.py: error: {e}", file=sys.stderr)
        return 2
    options, rows = state["args"], state["class_map"]["categories"]
    print(f"{output}: {options.modelname} after epoch {state['epoch']}")
    if options.backbone.startswith("timm/"):
        print(f"note: the authors' code has no backbone {options.backbone}")
    if any(label != id_ for label, id_, _ in rows):
        print("note: the authors' code uses category ids as labels; renumber those of the data:")
        print("  " + ", ".join(f"{id_} -> {label}" for label, id_, _ in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
