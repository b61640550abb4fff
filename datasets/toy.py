"""Toy data set: coloured shapes on cluttered backgrounds, in COCO 2017's layout.

`python -m datasets.toy --root outputs/toy_coco` generates it in seconds, to try training and
evaluation without a download. Classes are shapes; colour, size, angle and position are random.

A box is the full extent of an object, including hidden parts, clipped to the image; `segmentation`
is its polygon, clipped too, and `area` the polygon's area. A ring's polygon follows the outer edge,
then the hole in reverse, so that the mask has a hole. A crowd is a cluster of tiny objects of one
class, annotated with one mask (RLE) and one box.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from models.errors import UserError

# Ids with gaps, as in COCO: code that uses an id as an index fails here too.
CATEGORIES = {3: "circle", 7: "square", 12: "triangle", 25: "star", 44: "ring", 81: "cross"}
SPLITS = ("train2017", "val2017")

# Ranges of an object's longer side as a fraction of `size`, and their probabilities.
EXTENTS = np.array([[0.1, 0.22], [0.22, 0.55], [0.55, 1.05]])
EXTENT_WEIGHTS = (0.42, 0.42, 0.16)
MIN_VISIBLE = 0.4
EMPTY_FRACTION = 0.04
CROWD_FRACTION = 0.03

MAX_IMAGES = 1_000_000  # per split; also the offset between the splits' ids
TITLE = "Toy COCO"  # near the start of every file, so that no other files are replaced


def regular(corners: int) -> np.ndarray:
    """Evenly spaced points (corners, 2) on the unit circle."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def random_outline(rng: np.random.Generator, name: str, extent: float) -> np.ndarray:
    """The outline (n, 2) of a class, centred on the origin, its longer side `extent` pixels; aspect
    ratio, angle and the proportions of some classes are random."""
    if name == "star":
        points = regular(10) * np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)[:, None]
    elif name == "ring":
        outer = regular(32)[np.arange(33) % 32]
        points = np.concatenate([outer, rng.uniform(0.45, 0.65) * outer[::-1]])
    elif name == "cross":
        a = rng.uniform(0.26, 0.38)
        arm, quarter_turn = np.array([[a, a], [a, 1], [-a, 1]]), np.array([[0, 1], [-1, 0]])
        points = np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])
    else:
        points = regular({"circle": 32, "square": 4, "triangle": 3}[name])
    points = points * [rng.uniform(0.8, 1.25), 1.0]
    angle = 2 * np.pi * rng.random()
    points = points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points -= (points.min(0) + points.max(0)) / 2
    return points * (extent / np.ptp(points, axis=0).max())


def clip_polygon(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """A polygon (n, 2) clipped to the image: (m, 2) (Sutherland and Hodgman 1974)."""
    for axis, sign, bound in ((0, 1, 0), (0, -1, -width), (1, 1, 0), (1, -1, -height)):
        distance = sign * points[:, axis] - bound  # >= 0 inside this border
        kept = []
        for i in range(len(points)):
            if (distance[i - 1] < 0) != (distance[i] < 0):
                t = distance[i - 1] / (distance[i - 1] - distance[i])
                kept.append(points[i - 1] + t * (points[i] - points[i - 1]))
            if distance[i] >= 0:
                kept.append(points[i])
        points = np.array(kept).reshape(-1, 2)
    return points


def polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def rasterize(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """The fraction of each pixel covered by a polygon (n, 2): (height, width) in [0, 1]."""
    canvas = Image.new("L", (3 * width, 3 * height))
    # Integer coordinates are pixel centres in PIL, pixel corners in annotations.
    ImageDraw.Draw(canvas).polygon((3 * points - 0.5).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(3), dtype=np.float32) / 255


def encode_rle(mask: np.ndarray) -> dict:
    """A mask (h, w) in COCO's uncompressed RLE: run lengths in column order, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    return {"counts": np.diff(ends, prepend=0).tolist(), "size": list(mask.shape)}


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Gradient, texture, stripes, soft blobs and thin lines: (height, width, 3) in [0, 255]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(width, height)
    base, direction = rng.uniform(30, 225, 3), rng.normal(size=2)
    gradient = direction[0] * x + direction[1] * y
    grain = rng.normal(0, rng.uniform(2, 12), rng.integers(3, 20, 2)).astype(np.float32)
    texture = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))
    if rng.random() < 0.4:
        texture = texture + rng.uniform(3, 12) * np.sin(rng.uniform(15, 70) * gradient)
    image = base + gradient[..., None] * rng.uniform(-40, 40, 3) + texture[..., None]
    for _ in range(rng.integers(0, 6)):
        cx, cy, radius = rng.random(), rng.random(), rng.uniform(0.03, 0.2)
        blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / radius**2)
        image += blob[..., None] * rng.uniform(-30, 30, 3)
    canvas = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    for _ in range(rng.integers(0, 8)):
        path = (rng.random((rng.integers(2, 5), 2)) * [width, height]).ravel().tolist()
        colour = (base + rng.uniform(-70, 70, 3)).clip(0, 255).astype(int).tolist()
        ImageDraw.Draw(canvas).line(path, fill=tuple(colour), width=int(rng.integers(1, 3)))
    return np.asarray(canvas, dtype=np.float32)


class Scene:
    """An image under construction: pixels, the object at each pixel, and annotations."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng = rng
        self.width, self.height = (round(size * f) for f in rng.uniform(0.75, 1.0, 2))
        self.image = draw_background(rng, self.width, self.height)
        self.owner = np.zeros((self.height, self.width), dtype=np.int64)  # 0 is the background
        self.full_areas = [0.0]  # of each owner, including parts outside the image
        self.annotations: list[dict] = []

    def random_centre(self, extent: float) -> np.ndarray:
        """A position (x, y) at which most of an object of this extent is inside the image."""
        sides = np.array([self.width, self.height])
        margin = np.minimum(0.3 * extent, sides / 2)
        return self.rng.uniform(margin, sides - margin)

    def claim(self, mask: np.ndarray, full_area: float) -> bool:
        """Assign the pixels of `mask` (h, w) to a new object, unless that hides too much of any."""
        owner = np.where(mask, len(self.full_areas), self.owner)
        areas = np.array([*self.full_areas, full_area])
        if (np.bincount(owner.ravel(), minlength=len(areas)) < MIN_VISIBLE * areas).any():
            return False
        self.owner, self.full_areas = owner, areas.tolist()
        return True

    def paint(self, cover: np.ndarray) -> None:
        """Blend in a shaded colour that contrasts with the background; `cover` (h, w) is alpha."""
        candidates = self.rng.uniform(0, 255, (8, 3))
        background = self.image[cover > 0.5].mean(0)
        colour = candidates[np.argmax(np.linalg.norm(candidates - background, axis=1) > 90)]
        shade = np.linspace(*self.rng.uniform(0.75, 1.2, 2), self.height)[:, None, None]
        self.image += cover[..., None] * (colour * shade - self.image)

    def annotate(self, category: int, box: list[float], area: float, **fields) -> None:
        numbers = {"bbox": [round(float(v), 2) for v in box], "area": round(float(area), 2)}
        self.annotations.append({"category_id": category, **numbers, **fields})

    def add_object(self, extent: float) -> None:
        """Draw an object of a random class, or none if 12 positions are all too crowded."""
        category = int(self.rng.choice(list(CATEGORIES)))
        outline = random_outline(self.rng, CATEGORIES[category], extent)
        for _ in range(12):
            points = outline + self.random_centre(extent)
            points = clip_polygon(points, self.width, self.height).round(2)
            cover = rasterize(points, self.width, self.height)
            if self.claim(cover > 0.5, polygon_area(outline)):
                self.paint(cover)
                box, polygon = [*points.min(0), *np.ptp(points, axis=0)], [points.ravel().tolist()]
                self.annotate(category, box, polygon_area(points), iscrowd=0, segmentation=polygon)
                return

    def add_crowd(self, size: int) -> None:
        """Draw a cluster of tiny objects of one class, annotated as a crowd."""
        category = int(self.rng.choice(list(CATEGORIES)))
        spread = self.rng.uniform(0.08, 0.15) * size
        centre = self.random_centre(4 * spread)
        mask = np.zeros_like(self.owner, dtype=bool)
        for _ in range(self.rng.integers(15, 31)):
            extent = max(5.0, self.rng.uniform(0.05, 0.09) * size)
            outline = random_outline(self.rng, CATEGORIES[category], extent)
            cover = rasterize(outline + self.rng.normal(centre, spread), self.width, self.height)
            if (cover > 0.5).any():
                self.paint(cover)
                mask |= cover > 0.5
        self.claim(mask, mask.sum())  # succeeds, as the crowd is drawn first
        (ys, xs), area = np.nonzero(mask), mask.sum()
        box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        self.annotate(category, box, area, iscrowd=1, segmentation=encode_rle(mask))


def draw_scene(seed: int, split: int, index: int, size: int) -> tuple[Image.Image, list[dict]]:
    """An image, determined by the arguments, and its annotations."""
    rng = np.random.default_rng([seed, split, index])
    scene = Scene(rng, size)
    if rng.random() >= EMPTY_FRACTION:
        if rng.random() < CROWD_FRACTION:
            scene.add_crowd(size)
        ranges = EXTENTS[rng.choice(len(EXTENTS), rng.integers(1, 9), p=EXTENT_WEIGHTS)]
        extents = np.maximum(8.0, rng.uniform(ranges[:, 0], ranges[:, 1]) * size)
        # Mostly large ones first: drawn later, they would hide others and be rejected.
        for i in np.argsort(-extents * rng.uniform(0.4, 1.0, len(extents))):
            scene.add_object(extents[i])
    noise = rng.standard_normal(scene.image.shape, dtype=np.float32) * rng.uniform(1, 7)
    return Image.fromarray((scene.image + noise).clip(0, 255).astype(np.uint8)), scene.annotations


def is_ours(path: Path) -> bool:
    """Whether this module wrote the file; an interrupted run may leave empty ones."""
    with path.open("rb") as file:
        head = file.read(100)
    return not head or TITLE.encode() in head


def write_split(root: Path, split: int, num_images: int, size: int, seed: int) -> None:
    """Write a split, annotation file last, unless it exists already."""
    folder = root / SPLITS[split]
    annotation_file = root / "annotations" / f"instances_{SPLITS[split]}.json"
    for directory in (folder, annotation_file.parent):
        directory.mkdir(parents=True, exist_ok=True)
    info = {"description": TITLE, "num_images": num_images, "size": size, "seed": seed}
    header = json.dumps({"info": info})[:-1]  # the start of the annotation file
    existing = list(folder.glob("*.jpg"))
    if annotation_file.exists():
        if len(existing) == num_images and annotation_file.read_text().startswith(header):
            return
        annotation_file.unlink()  # first, because its absence marks an incomplete split
    for path in existing:
        path.unlink()
    images, annotations = [], []
    for image_id in range(split * MAX_IMAGES + 1, split * MAX_IMAGES + num_images + 1):
        picture, objects = draw_scene(seed, split, len(images), size)
        name, (width, height) = f"{image_id:012d}.jpg", picture.size
        picture.save(folder / name, quality=92, comment=TITLE)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for k, annotation in enumerate(objects):
            annotations.append({"id": 100 * image_id + k, "image_id": image_id, **annotation})
    categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in CATEGORIES.items()]
    content = {"info": info, "licenses": [], "categories": categories}
    unfinished = annotation_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    unfinished.replace(annotation_file)


def make_toy_coco(
    root: str | Path, num_train: int = 2000, num_val: int = 500, size: int = 128, seed: int = 0
) -> Path:
    """Write the toy data set to `root` unless it is there already; returns `root`.

    Each side of an image is 0.75 to 1 times `size` pixels. An image and its ids depend on `seed`,
    `size`, split and index, not on the numbers of images. UserError for arguments out of range, and
    for a directory that cannot be written or has another data set.
    """
    for name, value in (("num_train", num_train), ("num_val", num_val)):
        if not 0 <= value < MAX_IMAGES:
            raise UserError(f"{name} is {value}; it must be from 0 to {MAX_IMAGES - 1}")
    if size < 32:
        raise UserError(f"size is {size}; it must be at least 32 pixels")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative")
    root = Path(root)
    try:
        files = (*root.glob("annotations/instances_*2017.json"), *root.glob("*2017/*.jpg"))
        if not all(is_ours(path) for path in files):
            raise UserError(f"{root} contains another data set; choose another directory")
        for split, num_images in enumerate((num_train, num_val)):
            write_split(root, split, num_images, size, seed)
    except OSError as error:
        raise UserError(f"cannot write the toy data set to {root}: {error}") from error
    return root


def main() -> None:
    text, formatter = __doc__.split("\n\n")[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("datasets.toy", description=text, formatter_class=formatter)
    add = parser.add_argument
    add("--root", default="outputs/toy_coco", metavar="DIR", help="output directory")
    add("--num_train", type=int, default=2000, metavar="N", help="number of training images")
    add("--num_val", type=int, default=500, metavar="N", help="number of validation images")
    add("--size", type=int, default=128, metavar="N", help="maximum side of an image in pixels")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random images")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        root = make_toy_coco(**vars(args))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{root}: ready in {time.perf_counter() - start:.1f} s")
    for name in SPLITS:
        content = json.loads((root / "annotations" / f"instances_{name}.json").read_text())
        print(f"{name}: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    main()
