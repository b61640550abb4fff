"""The page of `--eval_report`: a case counted by hand, hard cases, and what a browser shows."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import hotcoco.plot
import numpy as np
import pytest
import torch
from PIL import Image

from main import main as train
from models.cli import main
from models.coco import CocoAnnotations
from models.evaluation import CocoEvaluator
from models.report import COLOURS, ERRORS, FIGURES, write_report
from tests.conftest import DETECTOR

SECTIONS = [
    *("COCO's figures", "Precision and recall", "AP by class", "AP by size and IoU"),
    *("Confusion matrix", "Score calibration", "Kinds of errors", "The worst images"),
]
DOG, CAT, YAK = (
    "<b>dog</b> & co",
    "cat for $1, $2 and \\",
    "yak, of which there are no objects at all",
)
CATEGORIES = [{"id": 3, "name": DOG}, {"id": 7, "name": CAT}, {"id": 9, "name": YAK}]
OBJECTS = [  # image, category, box xywh, crowd
    (1, 3, (0, 0, 50, 50), 0),
    (1, 3, (100, 0, 50, 50), 0),
    (2, 7, (0, 0, 100, 100), 0),
    (2, 7, (120, 120, 60, 60), 0),
    (4, 3, (0, 0, 100, 200), 1),
    (4, 3, (150, 150, 50, 50), 0),
]
DETECTIONS = {  # {image: (score, label, x0, y0, x1, y1)}
    1: [(0.92, 0, 0, 0, 50, 50), (0.82, 1, 100, 0, 150, 50)],  # correct; of the wrong class
    2: [(0.72, 1, 0, 0, 40, 100)],  # IoU 0.4; the other cat is missed
    3: [(0.62, 0, 10, 10, 40, 40), (0.22, 1, 10, 10, 40, 40)],  # of nothing
    4: [(0.95, 0, 10, 10, 40, 40), (0.86, 0, 150, 150, 200, 200), (0.76, 0, 150, 150, 200, 200)],
}  # the last: in the crowd, correct, duplicate


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(objects, detections, categories): an evaluator of images with 200 x 200 pixels."""

    def make(objects, detections, categories=CATEGORIES):
        root = tmp_path_factory.mktemp("data")
        Image.new("RGB", (200, 200)).save(root / "<i>1.png")
        keys = "image_id", "category_id", "bbox", "iscrowd"
        image = {"file_name": "<i>1.png", "height": 200, "width": 200}
        data = {
            "images": [{"id": i} | image for i in (1, 2, 3, 4)],
            "categories": categories,
            "annotations": [dict(zip(keys, row, strict=True)) for row in objects],
        }
        (root / "instances.json").write_text(json.dumps(data))
        evaluator = CocoEvaluator(CocoAnnotations(root, root / "instances.json"))
        for image_id, rows in detections.items():
            rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
            result = {"scores": rows[:, 0], "labels": rows[:, 1].long(), "boxes": rows[:, 2:]}
            evaluator.update({image_id: result})
        evaluator.summarize()
        return evaluator

    return make


@pytest.fixture(scope="module")
def counted(make, tmp_path_factory):
    """The evaluator and the page of the case above, and what hotcoco plotted."""
    plotted, out = {}, tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("confusion_matrix", "reliability_diagram"):
            real = getattr(hotcoco.plot, name)
            spy = lambda data, name=name, real=real, **how: real(
                plotted.setdefault(name, data), **how
            )
            patch.setattr(hotcoco.plot, name, spy)
        evaluator = make(OBJECTS, DETECTIONS)
        path = write_report(evaluator, out, "a/<b>.pth")
    return evaluator, path, plotted


def rows_of(path: Path, title: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    section = path.read_text().split(f"<h2>{title}")[1].split("</section>")[0]
    rows = re.findall("<tr>(<td>.*?)</tr>", section)
    return [[unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in rows]


def shown(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def test_figures_are_those_of_the_evaluation(counted):
    evaluator, path, _ = counted
    printed = [float(line.split("=")[-1]) for line in evaluator.table().splitlines()]
    assert rows_of(path, "COCO&#x27;s figures") == [
        [name, shown(value)] for name, value in zip(FIGURES, printed, strict=True)
    ]
    sizes = {name: values for name, *values in rows_of(path, "AP by size and IoU")}
    stats = [shown(value) for value in evaluator.figures["bbox"]]
    assert sizes["mean"] == [stats[0], *stats[3:6]]
    assert [sizes["0.50"][0], sizes["0.75"][0]] == stats[1:3]
    classes = rows_of(path, "AP by class")
    assert {row[0]: row[3] for row in classes} == {
        name: shown(ap) for name, ap in evaluator.per_class().items()
    }
    assert classes[0][:3] == [CAT, "7", "2"]  # the worst
    with open(path.with_name("classes.csv"), newline="") as file:
        table = {row["class"]: row for row in csv.DictReader(file)}
    assert float(table[DOG]["AP"]) == pytest.approx(evaluator.per_class()[DOG])
    assert table[YAK]["objects"] == "0" and table[YAK]["AP"] == ""


def test_errors_counted_by_hand(counted):
    _, path, plotted = counted
    assert plotted["confusion_matrix"]["matrix"].tolist() == [
        [2, 1, 0, 0],  # one dog was taken for a cat
        [0, 0, 0, 2],  # both cats were missed
        [0, 0, 0, 0],
        [2, 1, 0, 0],  # a duplicate and a dog of nothing; the poor box. Not what is in the crowd
    ]
    bins = plotted["reliability_diagram"]["bins"]
    assert [b["count"] for b in bins] == [0, 0, 1, 0, 0, 0, 1, 2, 2, 1]
    assert [b["avg_accuracy"] for b in bins[-3:]] == [0, 0.5, 1]
    errors = {kind: (int(n), rise) for kind, _, n, rise in rows_of(path, "Kinds of errors")}
    assert list(errors) == list(ERRORS)
    assert [n for n, _ in errors.values()] == [1, 1, 0, 1, 2, 1]
    # Before, two of three dogs are found first: AP50 67/101 and 0. With its class corrected, all
    # three; with its box corrected, one of two cats after a false one: half of 51/101.
    assert errors["Cls"][1] == shown((1 - 67 / 101) / 2)
    assert errors["Loc"][1] == shown(51 / 101 / 2 / 2)
    assert all(errors[kind][1] == "0.000" for kind in ("Both", "Dupe", "Bkg"))


def test_worst_images(counted):
    _, path, _ = counted
    headings = re.findall("<h3>&lt;i&gt;1.png: (.*?)</h3>", path.read_text())
    expected = [(2, 1), (1, 1), (0, 1), (0, 1)]  # of images 2, 1, 3 and 4
    assert headings == [f"{missed} missed, {false} false" for missed, false in expected]

    def colour(name, x, y):
        """At the right edge of a box there; pictures are 640 / 200 as large as the image."""
        with Image.open(path.with_name(f"worst_{name}.jpg")) as picture:
            edge = np.asarray(picture)[int(y * 3.2), int(x * 3.2) - 6 : int(x * 3.2) + 3]
        return edge[edge.sum(axis=1).argmax()].tolist()

    near = lambda status: pytest.approx(COLOURS[status], abs=70)
    assert colour("1_objects", 100, 50) == near("fn")
    assert colour("1_detections", 40, 50) == near("fp")
    assert colour("2_objects", 50, 35) == near("matched")
    assert colour("2_objects", 150, 35) == near("fn")
    assert colour("2_detections", 50, 35) == near("tp")
    assert colour("2_detections", 150, 35) == near("fp")
    crowd = colour("4_objects", 100, 100)
    assert max(crowd) - min(crowd) < 40 and not any(crowd == near(status) for status in COLOURS)


@pytest.mark.parametrize("case", ["nothing found", "no objects", "many classes"])
def test_hard_cases(case, make, tmp_path):
    """Zero detections of one class, images without objects alone, 1203 classes."""
    categories, objects, detections = CATEGORIES[:1], OBJECTS[:2], {1: [], 2: []}
    if case == "no objects":
        detections = {3: DETECTIONS[3][:1]}
    if case == "many classes":
        categories = [{"id": i, "name": f"class {i}"} for i in range(1203)]
        objects = [(1, i, (i % 150, i // 10, 40, 40), 0) for i in range(0, 1203, 10)]
        boxes = [(*box[:2], box[0] + 40, box[1] + 40) for _, _, box, _ in objects]
        detections = {1: [(0.9, 10 * i // 20 * 10, *box) for i, box in enumerate(boxes[:80])]}
    evaluator = make(objects, detections, categories)
    (tmp_path / "worst_9_objects.jpg").touch()  # of an earlier report
    path = write_report(evaluator, tmp_path, "x.pth")
    assert re.findall("<h2>(.*?)</h2>", unescape(path.read_text())) == SECTIONS
    assert rows_of(path, "COCO&#x27;s figures")[0] == ["AP", shown(evaluator.figures["bbox"][0])]
    assert len(rows_of(path, "AP by class")) == {"no objects": 0, "many classes": 30}.get(case, 1)
    assert len(path.with_name("classes.csv").read_text().splitlines()) == 1 + len(categories)
    assert len(list(tmp_path.glob("worst_*.jpg"))) == 2  # of one image


def test_commands_write_the_same_page(saved, toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text("\n".join(f"{k} = {v!r}" for k, v in DETECTOR.items()))
    data = ["--coco_path", str(toy), "--device", "cpu", "--eval_report"]
    argv = ["-c", str(tmp_path / "tiny.py"), "--resume", str(saved), "--num_workers", "0"]
    assert train([*argv, "--eval", *data, str(tmp_path / "a")]) == 0
    assert main(["eval", str(saved), "--batch_size", "1", *data, str(tmp_path / "b")]) == 0
    first, second = ((tmp_path / d / "report.html").read_text() for d in "ab")
    assert first == second and f"<title>{saved} on {toy}" in first
    (tmp_path / "file").touch()
    assert main(["eval", str(saved), *data, str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import fails
    for status in (main(["eval", str(saved), *data, "c"]), train([*argv, *data, "c"])):
        assert status == 2 and not Path("c").exists()
    assert capsys.readouterr().err.count("pip install dn_dino[report]") == 2


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_everything(counted, tmp_path):
    """At the width of a phone: every picture, from the page alone, and nothing beside it."""
    script = """<script>onload = () => { document.body.innerText = JSON.stringify({
        titles: [...document.querySelectorAll("h1, h2")].map(e => e.innerText),
        widths: [...document.images].map(e => e.naturalWidth),
        requests: performance.getEntriesByType("resource").map(e => e.name)
            .filter(name => !name.startsWith("data:")),
        beside: document.documentElement.scrollWidth - innerWidth,
    }) }</script>"""
    page = tmp_path / "copy.html"
    page.write_text(counted[1].read_text() + script)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(unescape(re.search("<body>(.*)</body>", done.stdout, re.S)[1]))
    assert found["titles"][0].startswith("a/<b>.pth on ") and found["titles"][1:] == SECTIONS
    assert len(found["widths"]) == 7 + 2 * 4 and min(found["widths"]) >= 600
    assert found["requests"] == [] and found["beside"] <= 0
