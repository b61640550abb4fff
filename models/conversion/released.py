"""The authors' released format, which their code evaluates and fine-tunes.

"model", under the released names, which are those here; "args"; "epoch", the last complete one; and
"class_map", which their code ignores. Optimiser states are left out: they identify parameters by
order, which differs.
"""

from argparse import Namespace
from typing import Any

from ..options import ALIASES, DetectorOptions


def export(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The contents of the released file for a checkpoint from `conversion.read`."""
    class_map = checkpoint["class_map"]
    options = DetectorOptions.of(checkpoint["config"], num_classes=class_map["num_classes"])
    args = checkpoint["config"] | vars(options)
    args |= {old: args[new] for old, new in ALIASES.items() if new in args}
    # DN-DETR's and DINO's code each have a switch for selecting tokens and one for learned content.
    selects, mixed = options.query_selection != "static", options.query_selection == "mixed"
    args |= {"two_stage": selects, "two_stage_type": "standard" if selects else "no"}
    args |= {"use_mqs": mixed, "embed_init_tgt": mixed}
    # None means num_classes here; DINO's code needs the number.
    args["dn_labelbook_size"] = options.dn_labelbook_size or options.num_classes
    epoch = checkpoint.get("epoch", 0)
    args = Namespace(**args)
    return {"model": checkpoint["model"], "args": args, "epoch": epoch, "class_map": class_map}
