"""Curves of training runs: `python -m util.visualize --help`."""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from models.errors import UserError

# The panels of a plot: suffix of the log's keys, title.
PANELS = {
    "loss": "loss, sum of all terms",
    "AP": "AP",
    "AP50": "AP50",
    "loss_ce": "classification loss, loss_ce",
    "loss_bbox": "L1 loss, loss_bbox",
    "loss_giou": "GIoU loss, loss_giou",
}
# The curves of a panel: prefix and suffix of the log's key, name, line style.
CURVES = (
    ("test_", "", "test", "-"),
    ("ema_test_", "", "test, averaged weights", "-."),
    ("train_", "", "train", "--"),
    ("train_", "_dn", "train, denoising part", ":"),
)


def read_log(path: Path) -> dict[int, dict]:
    """{epoch: row} of a log.txt, with added keys for AP and AP50. UserError if it is not a log."""
    rows, number = {}, 0
    try:
        for line in path.read_text().splitlines():
            number += 1
            row = json.loads(line)
            for prefix in ("test_", "ema_test_"):
                if figures := row.get(f"{prefix}coco_eval_bbox"):
                    row[f"{prefix}AP"], row[f"{prefix}AP50"] = figures[:2]
            rows[int(row["epoch"])] = row  # of repeated epochs, the last counts
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a text file"
        raise UserError(f"{path}: cannot be read: {reason}; pass a run's log.txt") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: line {number} is not a JSON line of log.txt; remove it") from e
    return dict(sorted(rows.items()))


def plot_log(log_files: str | Path | Sequence[str | Path], out_file: str | Path) -> None:
    """Plot losses, AP and AP50 by epoch, with a colour for each run, to a PNG, PDF or SVG file.
    Each of `log_files` is a run's log.txt or directory. Training losses include denoising, test
    losses do not. UserError if a log has nothing to plot or a file cannot be read or written."""
    paths = [Path(p) for p in ([log_files] if isinstance(log_files, str | Path) else log_files)]
    paths = [path / "log.txt" if path.is_dir() else path for path in paths]
    figure, styles = Figure(figsize=(13, 7.5), layout="constrained"), {}
    axes = dict(zip(PANELS, figure.subplots(2, 3).flat, strict=True))
    for i, path in enumerate(paths):
        rows, plotted = read_log(path), False
        for (key, axis), (begin, end, name, style) in itertools.product(axes.items(), CURVES):
            values = {epoch: row.get(begin + key + end) for epoch, row in rows.items()}
            # Leaves out NaN, and the AP of -1 that means no objects.
            values = {e: v for e, v in values.items() if isinstance(v, int | float) and v >= 0}
            if values:
                marker = "." if len(values) < 30 else ""
                axis.plot(values.keys(), values.values(), style, color=f"C{i}", marker=marker)
                styles[name], plotted = Line2D([], [], color="black", linestyle=style), True
        if not plotted:
            raise UserError(f"{path}: has no losses and no AP; pass the log.txt of a longer run")
    for key, axis in axes.items():
        axis.set(xlabel="epoch", ylabel=PANELS[key], ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    runs = [Line2D([], [], color=f"C{i}", linewidth=5) for i in range(len(paths))]
    labels = [path.resolve().parent.name for path in paths]
    figure.legend(runs, labels, loc="outside upper center", ncols=5, frameon=False)
    keys = styles.values(), styles.keys()
    figure.legend(*keys, loc="outside lower center", ncols=4, frameon=False)
    try:
        figure.savefig(out_file, dpi=120)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{out_file}: cannot be written: {reason}") from e


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("util.visualize", description="Plot losses and AP by epoch.")
    parser.add_argument("logs", nargs="+", metavar="RUN", help="a run's directory or log.txt")
    parser.add_argument("--output", required=True, metavar="FILE", help="output (PNG, PDF, SVG)")
    args = parser.parse_args(argv)
    try:
        plot_log(args.logs, args.output)
    except UserError as e:
        print(f"{parser.prog}: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
