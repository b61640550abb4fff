"""What is in a data set, before it is trained on: `main.py --check_data`."""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from datasets.coco import CocoDetection
from models.draw import draw_boxes
from models.errors import UserError
from models.preprocess import resized_size
from util.config import Config

SHOWN = 5  # names in a line of the report
TINY = 8  # pixels of the shorter side, at the size of evaluation: the finest features' stride
HUGE = 0.9  # of the image's area
ALIKE = 3  # of 64 bits may differ between the hashes of images that look alike
SHEET = (6, 4)  # rows and columns of the contact sheet
THUMB = 400  # pixels of an image's longer side there

Report = dict[str, list[str]]  # {title: lines}


@dataclass
class Scan:
    """What only the pixels tell: sizes (n, 2) of the images (h, w), 0 if unreadable; their
    perceptual hashes (n,); {name: reason} of unreadable ones."""

    sizes: np.ndarray
    hashes: np.ndarray
    unreadable: dict[str, str]


def difference_hash(image: Tensor) -> int:
    """64 bits: whether each of 8 x 8 cells of an image (3, H, W) is brighter than its right
    neighbour. Resized, recompressed or slightly brightened images keep most bits."""
    grey = F.resize(F.rgb_to_grayscale(image), [8, 9], antialias=True)[0].int()
    bits = (grey[:, :-1] > grey[:, 1:]).flatten().tolist()
    return sum(bit << i for i, bit in enumerate(bits))


def scan(dataset: CocoDetection, name: str) -> Scan:
    """Read all images, as many at a time as there are cores."""
    found = Scan(np.zeros((len(dataset), 2)), np.zeros(len(dataset), dtype=np.uint64), {})

    def look(i: int) -> None:
        try:
            image = dataset.image(i)
            found.sizes[i], found.hashes[i] = image.shape[-2:], difference_hash(image)
        except UserError as error:
            found.unreadable[dataset.file_name(i)] = str(error)

    with ThreadPoolExecutor() as pool:
        steps = pool.map(look, range(len(dataset)))
        for _ in tqdm(steps, desc=name, total=len(dataset), disable=None, leave=False):
            pass
    return found


def look_alikes(hashes: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of indices whose hashes differ in at most `ALIKE` bits. Of the 4 parts of 16 bits, such
    a pair has one in common, so only images that share a part are compared."""
    pairs = set()
    for shift in range(0, 64, 16):
        groups: dict[int, list[int]] = defaultdict(list)
        for index, value in enumerate(hashes):
            groups[value >> shift & 0xFFFF].append(index)
        for group in groups.values():
            for k, a in enumerate(group):
                close = (b for b in group[k + 1 :] if (hashes[a] ^ hashes[b]).bit_count() <= ALIKE)
                pairs.update((a, b) for b in close)
    return sorted(pairs)


def some(names: Sequence[str]) -> str:
    """'3: a, b, c', or '0'."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)}" + (f": {', '.join(names[:SHOWN])}{more}" if names else "")


def describe(dataset: CocoDetection, found: Scan, cfg: Config) -> list[str]:
    """The lines of a split's part of the report."""
    names = [dataset.file_name(i) for i in range(len(dataset))]
    counts = np.diff(dataset._offsets)
    owner = np.repeat(np.arange(len(dataset)), counts)
    boxes, sizes = dataset._boxes, np.where(found.sizes > 0, found.sizes, dataset._sizes)
    sides = boxes[:, 2:] - boxes[:, :2]
    resize = max(cfg.data_aug_scales), cfg.data_aug_max_size
    scale = [
        resized_size(int(h), int(w), *resize)[0] / h if h * w < np.inf else np.inf  # unknown
        for h, w in sizes.tolist()
    ]
    tiny = (sides.min(axis=1, initial=np.inf) * np.array(scale)[owner]) < TINY
    huge = sides.prod(axis=1) > HUGE * sizes.prod(axis=1)[owner]
    rows = zip(owner.tolist(), dataset._labels.tolist(), map(tuple, boxes.tolist()), strict=True)
    twice = [names[row[0]] for row, count in Counter(rows).items() if count > 1]
    declared = np.isfinite(dataset._sizes).all(1) & (found.sizes > 0).all(1)
    wrong = np.flatnonzero(declared & (dataset._sizes != found.sizes).any(1))
    empty, outside, moved = dataset.ignored
    in_images = lambda chosen: f"in images: {some([names[i] for i in np.unique(owner[chosen])])}"
    most, crowded = dataset.most_objects()
    return [
        f"{len(names)} images, {len(boxes)} objects, {int(dataset._iscrowd.sum())} crowds",
        f"objects per image: mean {counts.mean():.1f}, most {most} in {crowded}",
        f"images without objects: {some([names[i] for i in np.flatnonzero(counts == 0)])}",
        f"unreadable images: {some([*found.unreadable])}",
        f"images of another size than annotated: {some([names[i] for i in wrong])}",
        f"boxes ignored: {empty} empty or not finite, {outside} outside the image",
        f"boxes clipped to the image: {moved}",
        f"boxes with a side under {TINY} pixels when evaluated: {tiny.sum()}, {in_images(tiny)}",
        f"boxes over {HUGE:.0%} of the image: {huge.sum()}, {in_images(huge)}",
        f"boxes annotated twice: {some(twice)}",
        *([masks(dataset)] if dataset.masks else []),
    ]


def masks(dataset: CocoDetection) -> str:
    shapes = dataset.shapes
    lost = int((~shapes.exist).sum())
    return f"bad polygons and RLEs left out: {shapes.bad}; annotations without a mask: {lost}"


def classes(splits: Mapping[str, CocoDetection]) -> list[str]:
    """Objects, and images that have one, of every class in every split."""
    lines = []
    class_map = splits["train"].class_map
    width = max(map(len, class_map.names.values()))
    owners = {
        split: np.repeat(np.arange(len(dataset)), np.diff(dataset._offsets))
        for split, dataset in splits.items()
    }
    for label, name in class_map.names.items():
        cells, absent = [], []
        for split, dataset in splits.items():
            chosen = dataset._labels == label
            images = len(np.unique(owners[split][chosen]))
            cells.append(f"{chosen.sum():7} in {images:6} {split} images")
            absent += [split] * (not chosen.any())
        note = f"  none in {' and '.join(absent)}" if absent else ""
        lines.append(f"{name:{width}}  id {class_map.ids[label]:4} {''.join(cells)}{note}")
    return lines


def contact_sheet(dataset: CocoDetection, seed: int) -> Image.Image:
    """Random training images with their boxes."""
    rows, columns = SHEET
    order = np.random.default_rng(seed).permutation(len(dataset))[: rows * columns]
    rows = -(-len(order) // columns)
    sheet = Image.new("RGB", (columns * (THUMB + 8), rows * (THUMB + 8)), "white")
    for position, index in enumerate(order.tolist()):
        try:
            image = dataset.image(index)
        except UserError:
            continue
        truth = dataset.drawable_truth(int(dataset.image_ids[index]))
        picture = draw_boxes(image, **truth, names=dataset.class_map.names)
        picture.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
        row, column = divmod(position, columns)
        sheet.paste(picture, (column * (THUMB + 8) + 4, row * (THUMB + 8) + 4))
    return sheet


def page(report: Report, sheet: Image.Image) -> str:
    """The report and the sheet as one HTML file."""
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    picture = base64.b64encode(buffer.getvalue()).decode()
    parts = "".join(
        f"<h2>{html.escape(title)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>"
        for title, lines in report.items()
    )
    return (
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Data set</title>"
        "<style>body{font-family:sans-serif;margin:2em}pre{white-space:pre-wrap}</style>"
        f"{parts}<h2>training images</h2><img alt='' src='data:image/jpeg;base64,{picture}'></html>"
    )


def check_data(train: CocoDetection, val: CocoDetection, cfg: Config) -> None:
    """Print what is in a data set, and with `cfg.output_dir` write it to data.html there, with some
    training images. UserError if the training would fail."""
    splits = {"train": train, "val": val}
    scans = {name: scan(dataset, name) for name, dataset in splits.items()}
    report: Report = {
        f"{name}: {splits[name].annotation_file}": describe(splits[name], scans[name], cfg)
        for name in splits
    }
    report["classes"] = classes(splits)
    names = [(split, d.file_name(i)) for split, d in splits.items() for i in range(len(d))]
    hashes = [int(h) for s in scans.values() for h in s.hashes]
    sizes = np.concatenate([s.sizes for s in scans.values()])
    pairs = [(a, b) for a, b in look_alikes(hashes) if sizes[[a, b]].all()]
    for title, together in (("within a split", True), ("of train and val", False)):
        chosen = [(a, b) for a, b in pairs if (names[a][0] == names[b][0]) == together]
        lines = [some([f"{names[a][1]} = {names[b][1]}" for a, b in chosen])]
        report[f"pairs of images that look alike, {title}"] = lines
    for title, lines in report.items():
        print(f"{title}\n  " + "\n  ".join(lines))
    if cfg.output_dir:
        path = Path(cfg.output_dir, "data.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(report, contact_sheet(train, cfg.seed)))
        print(f"also in {path}, with pictures")
    fatal = [*scans["val"].unreadable.values()]
    if cfg.strict_data:
        fatal += scans["train"].unreadable.values()
    if fatal:
        raise UserError(f"training would fail: {fatal[0]}: replace the image or remove it")
