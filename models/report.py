"""One HTML page on what a detector finds, misses and confuses: hotcoco's figures and plots."""

import base64
import csv
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

from .draw import draw_boxes
from .errors import import_extra

if TYPE_CHECKING:  # needs pycocotools, which the base installation lacks
    from .evaluation import CocoEvaluator, Columns

SCORE = 0.3  # that detections need to be counted as errors, as in `dn-dino predict`
IOU = 0.5  # that detections need to find an object, for everything but AP
SHOWN = 15  # worst and best classes in the table
PLOTTED = 10  # classes with curves of their own
BARS = 25  # classes for which hotcoco draws AP as bars without leaving some out
WORST = 12  # images
SIDE = 800  # pixels of their longer side
LONGEST = 40  # characters of a name in plots

FIGURES = (
    *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    *("AR, 1 detection", "AR, 10 detections", "AR, 100 detections"),
    *("AR small", "AR medium", "AR large"),
)
SIZES = ("all", "small, under 32² pixels", "medium", "large, over 96² pixels")
CLASS_COLUMNS = (
    *("class", "id", "objects", "AP", "AP50", "AP75"),
    *("AP small", "AP medium", "AP large", "AR"),
)
ERRORS = {
    "Cls": "wrong class: overlaps an object of another class",
    "Loc": "poor box: IoU 0.1 to 0.5 with an object of its class",
    "Both": "wrong class and poor box",
    "Dupe": "duplicate: the object has a detection of a higher score",
    "Bkg": "background: IoU under 0.1 with every object",
    "Miss": "an object without a detection, not even a wrong one",
}
COLOURS = {  # of objects and detections by their status in hotcoco's diagnostics
    "matched": (60, 130, 255),
    "fn": (255, 60, 220),
    "tp": (70, 200, 90),
    "fp": (255, 140, 0),
}
IGNORED = (160, 160, 160)  # crowds, and what they cover
STYLE = """
:root { color-scheme: light }
body { background: #fff; color: #1a1a1a; font: 16px/1.5 sans-serif;
  margin: auto; max-width: 1200px; padding: 0 16px 48px }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { margin-top: 2em }
img { height: auto; max-width: 100% }
.row { align-items: flex-start; display: flex; flex-wrap: wrap; gap: 16px; margin-top: 16px }
.row > img { flex: 1 1 340px; max-width: min(100%, 592px); min-width: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 3px 10px; text-align: right }
th:first-child, td:first-child, .text td, .text th { text-align: left }
"""


def prepare(directory: str | Path) -> None:
    """Create the directory of a report. UserError if a package is missing: it would be a pity to
    notice that after the evaluation."""
    for module in ("pycocotools", "hotcoco.plot", "matplotlib.pyplot"):
        import_extra(module, "report")
    Path(directory).mkdir(parents=True, exist_ok=True)


def write_report(evaluator: "CocoEvaluator", directory: str | Path, checkpoint: str) -> Path:
    """Write report.html, which needs no other file, and its parts: PNG of the plots, JPEG of the
    worst images, classes.csv. After `summarize`. Returns the page's path."""
    from .evaluation import evaluate_by_hotcoco

    prepare(directory)
    directory, dataset = Path(directory), evaluator.dataset
    truth, found = evaluator.columns()
    evaluate = lambda found: evaluate_by_hotcoco(
        len(evaluator.results), _plot_names(evaluator.categories), truth, found
    )
    select = lambda columns, chosen: {key: column[chosen] for key, column in columns.items()}
    evaluation, sure = evaluate(found), select(found, found["score"] >= SCORE)
    with redirect_stdout(StringIO()):
        evaluation.summarize()  # which the plots need
    status = evaluate(sure).image_diagnostics(iou_thr=IOU)
    # Detections without a status are in crowds, which only the confusion matrix does not ignore.
    counted = np.array([i in status["dt_status"] for i in range(1, len(sure["score"]) + 1)], bool)
    confusion = evaluate(select(sure, counted)).confusion_matrix(iou_thr=IOU)

    title = f"{checkpoint} on {dataset.annotation_file}"
    objects = np.bincount(
        truth["category_id"][~truth["iscrowd"]], minlength=len(evaluator.categories)
    )
    summary = (
        f"{len(evaluator.results)} images with {objects.sum()} objects of "
        f"{np.count_nonzero(objects)} classes and {truth['iscrowd'].sum()} crowds; "
        f"{len(found['score'])} detections, {len(sure['score'])} of them with a score of {SCORE} "
        "or more."
    )
    figures = list(zip(FIGURES, map(_figure, evaluator.figures["bbox"]), strict=True))
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # font weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means without objects, characters that the font lacks
        sections = [
            _section(
                "COCO's figures",
                "Average precision (AP) and recall (AR), as printed; higher is better, 1 is "
                "perfect, and - means that there are no such objects.",
                _row(_table(("precision", ""), figures[:6]), _table(("recall", ""), figures[6:])),
            ),
            _curves(evaluation, objects, directory),
            _classes(evaluation, evaluator.categories, objects, directory),
            _sizes(evaluation),
            _confusions(confusion, directory),
            _calibration(evaluation, directory),
            _errors(evaluation, directory),
            _worst(evaluator, truth, sure, status, directory),
        ]
    page = (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><p>{summary}</p>\n{''.join(sections)}</body></html>\n"
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")  # file names
    return path


def _plot_names(categories: Mapping[int, str]) -> list[str]:
    """Names that are short, unique and without matplotlib's formulas."""
    names, taken = [], set()
    for id_, name in categories.items():
        short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        short = f"{short} ({id_})" if short in taken else short
        taken.add(short)
        names.append(short.replace("$", r"\$"))
    return names


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "-"  # COCO's -1, and NaN


def _section(title: str, sentence: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(sentence)}</p>\n{body}</section>\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    line = lambda tag, cells: "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return (
        f"<div class='wide'><table class='{kind}'><thead><tr>{line('th', header)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(path: Path, alt: str) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escape(alt)}' src='data:image/{kind};base64,{data}'>\n"


def _plot(name: str, data: Any, path: Path, **options: Any) -> str:
    """One of hotcoco's plots, in its file and as HTML."""
    from hotcoco import plot
    from matplotlib import pyplot

    figure, _ = getattr(plot, name)(data, save_path=path, paper_mode=True, **options)
    pyplot.close(figure)
    return _image(path, path.stem.replace("_", " "))


def _row(*parts: str) -> str:
    return f"<div class='row'>{''.join(parts)}</div>\n"


def _curves(evaluation: Any, objects: np.ndarray, directory: Path) -> str:
    by_count = np.argsort(-objects, kind="stable")[:PLOTTED]
    frequent = [i for i in by_count.tolist() if objects[i]]
    return _section(
        "Precision and recall",
        "The further a curve reaches to the upper right the better; the first plot is for boxes "
        "that must fit ever more closely (IoU), the second for the classes with the most objects, "
        "and where a curve drops to 0, no detection of any score finds the rest.",
        _row(
            _plot("pr_curve_iou_sweep", evaluation, directory / "precision_recall_by_iou.png"),
            _plot(
                "pr_curve_top_n",
                evaluation,
                directory / "precision_recall_by_class.png",
                cat_ids=frequent,
                iou_thr=IOU,
            ),
        ),
    )


def _classes(
    evaluation: Any, categories: Mapping[int, str], objects: np.ndarray, directory: Path
) -> str:
    # (IoUs, recalls, classes, sizes) and (IoUs, classes), for 100 detections per image
    precision = np.ma.masked_less(evaluation.eval["precision"][..., -1], 0)
    recall = np.ma.masked_less(evaluation.eval["recall"][:, :, 0, -1], 0)
    by_size = precision.mean(axis=(0, 1))
    single = precision[[0, 5], :, :, 0].mean(axis=1)
    columns = np.ma.stack([by_size[:, 0], *single, *by_size[:, 1:].T, recall.mean(axis=0)])
    figures = columns.filled(np.nan).T.tolist()
    known = zip(categories.items(), objects.tolist(), figures, strict=True)
    rows = [(name, id_, count, *values) for (id_, name), count, values in known]
    path = directory / "classes.csv"
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        blank = lambda value: "" if value != value else value  # NaN
        csv.writer(file).writerows([CLASS_COLUMNS, *([blank(v) for v in row] for row in rows)])

    rows = sorted((row for row in rows if row[3] == row[3]), key=lambda row: row[3])
    lines = [[*row[:3], *map(_figure, row[3:])] for row in rows]
    few = len(rows) <= 2 * SHOWN
    parts = [("", lines)] if few else [("worst", lines[:SHOWN]), ("best", lines[-SHOWN:])]
    body = "".join(
        (f"<h3>The {SHOWN} {which} classes</h3>" if which else "") + _table(CLASS_COLUMNS, part)
        for which, part in parts
    )
    if 0 < len(rows) <= BARS:
        bars = evaluation.results(per_class=True)
        body += _row(_plot("per_category_ap", bars, directory / "ap_by_class.png"))
    return _section(
        "AP by class",
        f"The worst classes first; {len(rows)} of {len(objects)} classes have objects here, and "
        f"{path.name} beside this page lists all.",
        body,
    )


def _sizes(evaluation: Any) -> str:
    precision = np.ma.masked_less(evaluation.eval["precision"][..., -1], 0)
    by_iou = precision.mean(axis=(1, 2)).filled(np.nan)
    total = precision.mean(axis=(0, 1, 2)).filled(np.nan)
    rows = [
        (f"{iou:.2f}", row) for iou, row in zip(evaluation.params.iou_thrs, by_iou, strict=True)
    ]
    return _section(
        "AP by size and IoU",
        "Down a column boxes must fit ever more closely: a fast fall means imprecise boxes; across "
        "a row are objects of different sizes.",
        _table(
            ("IoU", *SIZES), [(name, *map(_figure, row)) for name, row in [*rows, ("mean", total)]]
        ),
    )


def _confusions(confusion: Mapping, directory: Path) -> str:
    return _section(
        "Confusion matrix",
        f"The parts of the objects of a class (row) that were detected as each class (column), by "
        f"detections with a score of {SCORE} or more and IoU of at least {IOU}: in the column BG "
        "are missed objects, in the row BG detections of nothing; the bars are the most frequent "
        "mistakes, and of more than 30 classes the matrix has the 25 most confused.",
        _row(
            _plot("confusion_matrix", confusion, directory / "confusion_matrix.png"),
            _plot("top_confusions", confusion, directory / "top_confusions.png"),
        ),
    )


def _calibration(evaluation: Any, directory: Path) -> str:
    calibration = evaluation.calibration(iou_threshold=IOU)
    return _section(
        "Score calibration",
        "How many of the detections with a score are correct: bars on the diagonal mean that a "
        "score is a probability, bars below it that scores are too high; ECE is the mean gap.",
        _row(_plot("reliability_diagram", calibration, directory / "calibration.png")),
    )


def _errors(evaluation: Any, directory: Path) -> str:
    tide = evaluation.tide_errors(pos_thr=IOU)
    rows = [
        (kind, text, tide["counts"][kind], f"{tide['delta_ap'][kind]:.3f}")
        for kind, text in ERRORS.items()
    ]
    return _section(
        "Kinds of errors",
        "By how much AP50 would rise if all errors of a kind were corrected (TIDE, Bolya et al. "
        "2020): the longest bar is what to work on; counts are of detections of any score.",
        _table(("kind", "meaning", "count", "ΔAP50"), rows, "text")
        + _row(_plot("tide_errors", tide, directory / "error_kinds.png")),
    )


def _worst(
    evaluator: "CocoEvaluator",
    truth: "Columns",
    found: "Columns",
    status: Mapping[str, Mapping],
    directory: Path,
) -> str:
    """status: hotcoco's diagnostics of `truth` and `found`."""
    for stale in directory.glob("worst_*.jpg"):
        stale.unlink()
    image_ids, dataset = sorted(evaluator.results), evaluator.dataset
    count = {i: s["fn"] + s["fp"] for i, s in status["img_summary"].items() if s["fn"] + s["fp"]}
    body = []
    for place, i in enumerate(sorted(count, key=lambda i: (-count[i], i))[:WORST], start=1):
        index = int(np.flatnonzero(dataset.image_ids == image_ids[i])[0])
        image = dataset.image(index)
        scale = min(1.0, SIDE / max(image.shape[-2:]))
        image = F.resize(image, [max(round(scale * side), 1) for side in image.shape[-2:]])
        pictures = []
        for kind, key, columns in (("objects", "gt", truth), ("detections", "dt", found)):
            rows = np.flatnonzero(columns["image_id"] == i)
            boxes = box_convert(torch.from_numpy(columns["bbox"][rows]), "xywh", "xyxy")
            states = [status[f"{key}_status"].get(row + 1, "") for row in rows.tolist()]
            picture = draw_boxes(
                image,
                scale * boxes,
                columns["category_id"][rows].tolist(),
                columns["score"][rows].tolist() if kind == "detections" else None,
                dict(enumerate(evaluator.categories.values())),
                columns["iscrowd"][rows].tolist() if kind == "objects" else None,
                [COLOURS.get(state, IGNORED) for state in states],
            )
            path = directory / f"worst_{place}_{kind}.jpg"
            picture.save(path, quality=85)
            pictures.append(_image(path, f"{kind} of image {place}"))
        errors = status["img_summary"][i]
        text = f"{dataset.file_name(index)}: {errors['fn']} missed, {errors['fp']} false"
        body.append(f"<h3>{escape(text)}</h3>{_row(*pictures)}")
    return _section(
        "The worst images",
        f"Those with most missed objects and false detections together, counting detections with a "
        f"score of {SCORE} or more and IoU of at least {IOU}: objects in the first picture are "
        "blue if found and magenta if missed, detections in the second are green if correct and "
        "orange if false; crowds, and what they cover, are grey and not counted.",
        "".join(body) or "<p>No image has an error.</p>",
    )
