"""Tables, plots and docs/RESULTS.md from the logs of finished runs (tools/experiment.py)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure as Plot
from scipy.stats import t as student
from torchvision.ops import box_convert, box_iou

from experiments import Experiment, load, names

if TYPE_CHECKING:
    from tools.experiment import Run

Lines = list[dict]  # of a log.txt
Runs = dict[str, dict[int, Lines]]  # by arm and seed

PAGE = """# Results

Small comparisons of what the papers claim, made by `python tools/experiment.py NAME`, which wrote
this page from the logs in `results/`. A row is the mean ± the standard deviation over the seeds;
a difference is paired, seed by seed, with its 95% interval (Student's t) in brackets. AP is COCO's,
from 0 to 1.
"""
WAITING = """
## What waits for GPUs

These descriptions are the same comparisons on COCO; nothing of them has been run. `python
tools/experiment.py NAME --slurm --ngpus 8 --data DIR` submits one, where DIR contains `coco`.

| experiment | runs | epochs |
| --- | --- | --- |
"""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def complete_log(run: Path) -> Lines:
    """The lines of a run's log.txt; none if it does not have its last epoch yet."""
    if not (run / "log.txt").exists():
        return []
    lines = read_lines(run / "log.txt")
    epochs = json.loads((run / "config.json").read_text())["epochs"]
    return lines if lines and lines[-1]["epoch"] == epochs - 1 else []


def duplicates_per_object(data: Path, run: Path, score: float = 0.3, iou: float = 0.5) -> float:
    """How many detections above the score an object has beside the best one, from a run's
    results.json; a detection belongs to the object of its class that it overlaps most, by at least
    `iou`. Crowds count neither way."""
    truth = json.loads((data / "annotations/instances_val2017.json").read_text())["annotations"]
    objects: dict[tuple, list] = defaultdict(list)
    found: dict[tuple, list] = defaultdict(list)
    for entry in truth:
        if not entry.get("iscrowd"):
            objects[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    for entry in json.loads((run / "results.json").read_text()):
        if entry["score"] > score:
            found[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    duplicates = 0
    for key in objects.keys() & found.keys():
        boxes = (box_convert(torch.tensor(b[key]), "xywh", "xyxy") for b in (found, objects))
        overlap, nearest = box_iou(*boxes).max(dim=1)
        hits = Counter(nearest[overlap >= iou].tolist())
        duplicates += sum(n - 1 for n in hits.values())
    return duplicates / max(sum(map(len, objects.values())), 1)


def read_lines(log: Path) -> Lines:
    return [json.loads(line) for line in log.read_text().splitlines()]


def read_runs(experiment: Experiment, finished: Sequence[Run]) -> Runs:
    """The logs of finished runs."""
    runs: Runs = {arm: {} for arm in experiment.arms}
    for run in finished:
        runs[run.arm][run.settings["seed"]] = read_lines(run.results / "log.txt")
    return runs


def epochs_to_reach(values: Sequence[float], level: float) -> float:
    """After how many epochs a figure, 0 at the start and `values` after every epoch, first reaches
    the level, by linear interpolation; infinite if it does not."""
    before = 0.0
    for epoch, value in enumerate(values):
        if value >= level:
            return epoch + (level - before) / (value - before) if value > before else float(epoch)
        before = value
    return math.inf


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def interval(values: Sequence[float], form: str) -> str:
    """The mean of paired differences and its 95% interval."""
    if not values or not all(map(math.isfinite, values)):
        return "-"
    mean, n = fmean(values), len(values)
    if n == 1:
        return f"{mean:{form}}"
    half = student.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def table(experiment: Experiment, runs: Runs) -> str:
    """Two Markdown tables: every arm's figures, and the differences between arms."""
    figures = experiment.figures
    titles = [figure.title for figure in figures]
    text = row("arm", "runs", *titles) + row(*["---"] * (2 + len(figures)))
    for arm, found in runs.items():
        cells = [spread([f.value(lines) for lines in found.values()], f.digits) for f in figures]
        text += row(arm, len(found), *cells)
    pairs = [(name, arm.against) for name, arm in experiment.arms.items() if arm.against]
    if not pairs:
        return text
    head = f"epochs to the other's final {titles[0]}"
    text += "\n" + row("difference", *titles, head) + row(*["---"] * (2 + len(figures)))
    for ours, other in pairs:
        seeds = sorted(runs[ours].keys() & runs[other].keys())
        both = [(runs[ours][seed], runs[other][seed]) for seed in seeds]
        cells = [
            interval([f.value(a) - f.value(b) for a, b in both], f"+.{f.digits}f") for f in figures
        ]
        first = figures[0]
        needed = [epochs_to_reach(first.by_epoch(a), first.value(b)) for a, b in both]
        missed = sum(map(math.isinf, needed))
        course = f"not reached in {missed} of {len(needed)}" if missed else "-"
        if needed and not missed:
            epochs = max(len(lines) for _, lines in both)
            course = f"{interval(needed, '.1f')} of {epochs} ({fmean(needed) / epochs:.0%})"
        text += row(f"{ours} - {other}", *cells, course)
    return text


def plot(experiment: Experiment, runs: Runs, path: Path) -> None:
    """A panel for each of the drawn figures: the mean of each arm by epoch, and a band of one
    standard deviation."""
    drawn = [figure for figure in experiment.figures if figure.title in experiment.drawn]
    image = Plot(figsize=(5.5 * len(drawn), 3.8), layout="constrained")
    for axis, figure in zip(image.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for number, (arm, found) in enumerate(runs.items()):
            if not found:
                continue
            values = np.array([figure.by_epoch(lines) for lines in found.values()])
            epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            style = "-" if experiment.arms[arm].against else "--"
            axis.plot(epochs, mean, style, color=f"C{number}", label=arm)
            if len(values) > 1:
                band = values.std(0, ddof=1)
                axis.fill_between(epochs, mean - band, mean + band, color=f"C{number}", alpha=0.2)
        axis.set(xlabel="epoch", ylabel=figure.title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    image.axes[0].legend(fontsize="small")
    image.savefig(path, dpi=90)


def extent(numbers: Collection[int]) -> str:
    """`3`, or `3 to 5` if they differ."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def write_results(name: str, experiment: Experiment, finished: Sequence[Run], folder: Path) -> str:
    """Write results/NAME/README.md and curves.png; returns the page's text."""
    if not finished:
        return f"{name}: no run is finished\n"
    runs = read_runs(experiment, finished)
    origins = [json.loads((run.results / "run.json").read_text()) for run in finished]
    made = {k: ", ".join(sorted({o[k] for o in origins})) for k in ("commit", "processor", "torch")}
    epochs = extent({len(lines) for found in runs.values() for lines in found.values()})
    text = f"## {experiment.title}\n\n{experiment.claim}\n\n{table(experiment, runs)}\n"
    if experiment.drawn:
        plot(experiment, runs, folder / "curves.png")
        text += "![by epoch](curves.png)\n\n"
    text += f"`python tools/experiment.py {name}`, commit {made['commit']}, {made['processor']}, "
    text += f"torch {made['torch']}; data `{experiment.data}`, {epochs} epochs.\n"
    (folder / "README.md").write_text(text)
    return text


def write_page(root: Path) -> None:
    """docs/RESULTS.md: all results/NAME/README.md, and a list of what waits for GPUs."""
    text, waiting = PAGE, ""
    for name in names():
        path = root / "results" / name / "README.md"
        if path.exists():
            plot = f"(../results/{name}/curves.png)"
            text += "\n" + path.read_text().replace("(curves.png)", plot)
        elif (experiment := load(name)).data == "coco":
            runs = len(experiment.arms) * len(experiment.seeds)
            arms = experiment.arms.values()
            epochs = extent({arm.options.get("epochs", experiment.epochs) for arm in arms})
            waiting += row(f"`{name}`: {experiment.title}", runs, epochs)
    page = root / "docs/RESULTS.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(text + (WAITING + waiting if waiting else ""))
