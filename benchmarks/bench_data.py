"""Images/s of one process with one thread, beside a pipeline like the released one, which decodes
and resizes with PIL: `python benchmarks/bench_data.py`. CPU time, median of interleaved rounds."""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets import transforms
from datasets.coco import build_dataset, collate
from models import coco
from models.preprocess import IMAGENET_MEAN, IMAGENET_STD, resized_size
from util.config import Config

STAGES = [
    (coco, "read_image", "read and decode"),
    (transforms.v2.RandomHorizontalFlip, "forward", "flip"),
    (transforms.ResizeShortestSide, "forward", "resize"),
    (transforms.RandomSizeCrop, "forward", "crop"),
    (transforms, "normalize", "normalise"),
]


def make_images(root: Path, count: int = 32) -> None:
    """COCO's layout: smooth colours and noise, 640 x 480, about 130 kB each, with 7 boxes each."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for split in ("train2017", "val2017", "annotations"):
        (root / split).mkdir()
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480))
        pixels = np.asarray(colours) + rng.normal(0, 12, (480, 640, 3))
        for split in ("train2017", "val2017"):
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640})
        box = {"image_id": i, "category_id": 1, "bbox": [50, 60, 200, 300]}
        annotations += [{"id": 7 * i + j, **box} for j in range(7)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    for split in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def resized(image: Image.Image, size: int, max_size: int | None = None) -> Image.Image:
    height, width = resized_size(image.height, image.width, size, max_size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def like_released(path: Path, train: bool, cfg: Config) -> Tensor:
    """The image alone; boxes are left out."""
    size, image = max(cfg.data_aug_scales), Image.open(path).convert("RGB")
    if train:
        size = random.choice(cfg.data_aug_scales)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < 0.5:
            image = resized(image, random.choice(cfg.data_aug_scales2_resize))
            low, high = cfg.data_aug_scales2_crop
            w, h = (random.randint(min(low, n), min(high, n)) for n in image.size)
            x, y = random.randint(0, image.width - w), random.randint(0, image.height - h)
            image = image.crop((x, y, x + w, y + h))
    pixels = F.to_tensor(resized(image, size, cfg.data_aug_max_size))
    return F.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)


def cpu_time(function: Callable[[int], object], count: int) -> float:
    """Milliseconds for each of `count` indices."""
    start = time.process_time()
    for i in range(count):
        function(i)
    return (time.process_time() - start) * 1000 / count


def by_stage(function: Callable[[int], object], count: int) -> dict[str, float]:
    """Milliseconds an image in each of STAGES."""
    spent: Counter[str] = Counter()

    def timed(original: Callable, stage: str) -> Callable:
        def call(*args: object) -> object:
            start = time.process_time()
            result = original(*args)
            spent[stage] += (time.process_time() - start) * 1000 / count
            return result

        return call

    patches = [patch.object(o, n, timed(getattr(o, n), stage)) for o, n, stage in STAGES]
    for each in patches:
        each.start()
    spent["rest"] = cpu_time(function, count)
    for each in patches:
        each.stop()
    spent["rest"] -= sum(spent.values()) - spent["rest"]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser("bench_data.py", description="Measure images/s.")
    parser.add_argument("--coco_path", metavar="DIR", help="data set; by default generated images")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="in a round")
    parser.add_argument("--rounds", type=int, default=11, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"{cpu.group(1) if cpu else platform.processor()}, one thread")
    with tempfile.TemporaryDirectory() as directory:
        if not args.coco_path:
            make_images(Path(directory))
        cfg = Config(coco_path=args.coco_path or directory)
        for split in ("train", "val"):
            dataset, train = build_dataset(cfg, split), split == "train"
            count = min(args.images, len(dataset))
            paths = [dataset.image_dir / dataset.file_name(i) for i in range(count)]
            released = lambda i, p=paths, train=train: like_released(p[i], train, cfg)
            pair = lambda i, d=dataset: collate([d[i], d[i]])
            sides = {"PIL": released, "ours": dataset.__getitem__}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for epoch in range(args.rounds):
                dataset.set_epoch(epoch)
                for name, side in sides.items():
                    times[name].append(cpu_time(side, count))
            pil, ours = (statistics.median(times[name]) for name in sides)
            ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
            rates = f"PIL {1000 / pil:.0f} images/s, ours {1000 / ours:.0f}"
            print(f"{split}: {rates}, {ratio:.2f} times as many")
            stages = by_stage(dataset.__getitem__, count)
            stages["collate"] = cpu_time(pair, count) / 2 - ours
            print("  ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items()))


if __name__ == "__main__":
    main()
