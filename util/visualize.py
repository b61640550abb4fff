"""Boxes drawn on images, and curves of training runs: `python -m util.visualize --help`."""

import argparse
import colorsys
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.errors import UserError

SMALLEST = 640  # smaller images are enlarged to this longer side, in pixels
MARGIN = 8  # pixels around the pictures of `side_by_side`

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


def class_colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a label, the same in every picture; adjacent labels contrast."""
    hue, saturation = label * 0.618034 % 1, (0.85, 0.5)[label // 8 % 2]
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, 1.0))


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, as PIL's covers little more than Latin."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int] | Tensor,
    scores: Sequence[float] | Tensor | None = None,
    names: Mapping[int, str] | None = None,
    crowd: Sequence[bool] | None = None,
) -> Image.Image:
    """The image, enlarged if small, with boxes and captions of name and score.

    image (3, H, W) uint8 RGB; boxes (n, 4) xyxy in pixels, the most important first; names {label:
    name}, by default the label itself; crowd: whether a box is a crowd.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    scale = max(1.0, SMALLEST / max(picture.size))
    width, height = (max(round(scale * side), 1) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    draw, longer = ImageDraw.Draw(picture), max(width, height)
    line, font = max(2, longer // 400), load_font(min(max(14, longer // 60), 28))

    edges = (scale * boxes.detach().cpu().double().numpy().reshape(-1, 4)).round().astype(int)
    edges = (edges - [0, 0, 1, 1]).clip(0, [width - 1, height - 1] * 2)  # inclusive
    edges[:, 2:] = np.maximum(edges[:, :2], edges[:, 2:])
    drawn, captions = [], np.zeros((0, 4), dtype=int)
    for i, (x0, y0, x1, y1) in enumerate(edges.tolist()):
        label = int(labels[i])
        text = (names or {}).get(label, str(label))
        text += " (crowd)" if crowd is not None and crowd[i] else ""
        text += f" {float(scores[i]):.2f}" if scores is not None else ""
        while font.getlength(text) + 6 > width and len(text) > 2:
            text = text[:-2] + "…"
        w, h = round(font.getlength(text)) + 6, sum(font.getmetrics())
        # Along the upper or lower edge of the box, where it overlaps other captions least.
        xs = np.linspace(x0, x1 + 1 - w, 5, dtype=int).clip(0, max(width - w, 0))
        ys = np.clip((y0 - h, y0, y1 + 1, y1 + 1 - h), 0, max(height - h, 0))
        places = np.array([(x, y, x + w, y + h) for x in xs for y in ys])
        upper_left = np.maximum(places[:, None, :2], captions[:, :2])
        lower_right = np.minimum(places[:, None, 2:], captions[:, 2:])
        overlap = (lower_right - upper_left).clip(0).prod(axis=2).sum(axis=1)
        place = places[overlap.argmin()]
        captions = np.concatenate([captions, place[None]])
        drawn.append(((x0, y0, x1, y1), place.tolist(), text, class_colour(label)))
    drawn.reverse()  # the most important on top
    for (x0, y0, x1, y1), _, _, colour in drawn:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=line + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    for _, (x0, y0, x1, y1), text, colour in drawn:
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 120
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
        draw.text((x0 + 3, y0), text, fill="black" if bright else "white", font=font)
    return picture


def side_by_side(
    image: Tensor, columns: Mapping[str, Mapping], names: Mapping[int, str] | None = None
) -> Image.Image:
    """Copies of the image in a row: `columns` is {title: keyword arguments of `draw_boxes`}."""
    parts = {title: draw_boxes(image, names=names, **part) for title, part in columns.items()}
    width, height = next(iter(parts.values())).size
    font = load_font(min(max(16, max(width, height) // 45), 36))
    top = 2 * MARGIN + sum(font.getmetrics())
    column = MARGIN + max(width, *(round(font.getlength(title)) for title in parts))
    sheet = Image.new("RGB", (MARGIN + column * len(parts), top + height + MARGIN), "white")
    for i, (title, part) in enumerate(parts.items()):
        ImageDraw.Draw(sheet).text((MARGIN + i * column, MARGIN), title, fill="black", font=font)
        sheet.paste(part, (MARGIN + i * column, top))
    return sheet


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
