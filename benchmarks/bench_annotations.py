"""Time and memory to load COCO's annotations in several processes with idle data-loading workers:
`python benchmarks/bench_annotations.py --processes 8`. They are generated: as many images, objects
and bytes as in instances_train2017.json. Memory of all processes together is the sum of their
proportional set sizes (PSS), in which a page that several processes share counts once."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets.coco import CocoDetection
from util.distributed import gather, join_processes, leave_processes

IMAGES, OBJECTS, CATEGORIES, MB = 118_287, 860_001, 80, 2**20


def generate(root: Path) -> None:
    """`root`/instances.json of 440 MB, and `root`/images with links to one JPEG."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    Image.new("RGB", (640, 480)).save(root / "image.jpg")
    images = [{"license": 3, "file_name": f"{i:012}.jpg", "id": i} for i in range(IMAGES)]
    for image in images:
        (root / "images" / image["file_name"]).symlink_to(root / "image.jpg")
        image |= {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45"}
        image |= {"coco_url": f"http://images.cocodataset.org/train2017/{image['file_name']}"}
    data = {"images": images, "categories": [{"id": i, "name": str(i)} for i in range(CATEGORIES)]}
    with open(root / "instances.json", "w") as file:
        file.write(json.dumps(data)[:-1] + ', "annotations": [')
        for i in range(OBJECTS):
            x, y, w, h = (rng.random(4) * [320, 240, 320, 240]).round(2).tolist()
            polygon = (rng.random(rng.integers(6, 80)) * 480).round(2).tolist()
            item = {"segmentation": [polygon], "area": w * h / 2, "iscrowd": 0, "id": i}
            item |= {"image_id": int(rng.integers(IMAGES)), "bbox": [x, y, w, h]}
            item["category_id"] = i % CATEGORIES
            file.write(", " * (i > 0) + json.dumps(item))
        file.write("]}")


def own_pss() -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Probe(torch.utils.data.Dataset):
    """Reads 250 images, waits until all processes have, and returns its worker's memory."""

    def __init__(self, dataset: CocoDetection, workers: int, done: Path):
        self.dataset, self.workers, self.done = dataset, workers, done

    def __len__(self) -> int:
        return self.workers

    def __getitem__(self, index: int) -> int:
        for i in np.random.default_rng(index).choice(len(self.dataset), 250):
            self.dataset[int(i)]
        (self.done / f"{os.getpid()}").touch()
        while not (self.done / "measure").exists():
            time.sleep(0.1)
        return own_pss()


def measure(rank: int, args: argparse.Namespace, root: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*worker processes")
    join_processes(args.processes, rank, f"file://{root}/store", 30)
    gather(None)
    before, start = own_pss(), time.perf_counter()
    transforms = lambda image, target: (image, target)
    dataset = CocoDetection(root / "images", root / "instances.json", transforms)
    gather(None)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    probe = Probe(dataset, args.workers, root / "done")
    loader = DataLoader(
        probe, num_workers=args.workers, prefetch_factor=1, multiprocessing_context="fork"
    )
    memory = iter(loader)
    while len(list(probe.done.iterdir())) < args.processes * args.workers:
        time.sleep(0.1)
    gather(None)
    (probe.done / "measure").touch()
    own = own_pss()
    figures = gather((before, peak * 1024, own, int(sum(memory))))
    if rank == 0:
        before, peaks, own, workers = zip(*figures, strict=True)
        print(f"{args.processes} processes with {args.workers} workers each: {seconds:.1f} s")
        print(f"peak RSS: {max(peaks) / MB:,.0f} MB in one, {sum(peaks) / MB:,.0f} MB in all")
        print(f"PSS: {sum(before) / MB:,.0f} MB before; then {sum(own) / MB:,.0f} MB and ", end="")
        print(f"{sum(workers) / MB:,.0f} MB in the workers")
    leave_processes()


def main() -> None:
    parser = argparse.ArgumentParser("bench_annotations.py", description="Measure loading COCO.")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="of each process")
    parser.add_argument("--root", metavar="DIR", help="keep the generated data there, or reuse it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(args.root or directory)
        root.mkdir(exist_ok=True)
        if not (root / "instances.json").exists():
            generate(root)
        print(f"instances.json: {(root / 'instances.json').stat().st_size / 1e6:.0f} MB")
        with tempfile.TemporaryDirectory(dir=root) as run:
            for name in ("images", "instances.json"):
                (Path(run) / name).symlink_to(root / name)
            (Path(run) / "done").mkdir()
            torch.multiprocessing.spawn(measure, (args, Path(run)), args.processes)


if __name__ == "__main__":
    main()
