"""Detect objects in images and videos; write pictures or videos with boxes and detections.json,
in COCO's instances format with scores. Videos keep their time stamps, but not their sound.

Examples:
  dn-dino predict checkpoint.pth --source photos street.jpg "more/*.png" --output found
  dn-dino predict checkpoint.pth --source clip.mp4 --output found.mp4
  dn-dino predict checkpoint.pth --source 0 --output webcam.mp4       until Ctrl-C
  dn-dino predict checkpoint.pth --coco_path COCO --output found      beside the annotations
"""

import argparse
import json
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..coco import CocoAnnotations
from ..detections import Detections
from ..download import local_file
from ..draw import side_by_side
from ..errors import UserError
from ..images import expand, read_image
from ..predictor import Predictor
from ..video import SUFFIXES, Video, VideoWriter, is_video, is_webcam
from .common import add_detector_arguments, load, read_split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_detector_arguments(parser)
    add = parser.add_argument
    add("--resume", metavar="FILE", help=argparse.SUPPRESS)
    text = "images, videos, directories of images, patterns, URLs, webcams (0)"
    add("--source", "--images", nargs="+", metavar="PATH", help=text)
    add("--coco_path", type=Path, metavar="DIR", help="data set, to use its val2017 instead")
    add("--num_images", type=int, default=16, metavar="N", help="images of val2017 (16)")
    text = "output directory, or for one video the video to write, with a .json beside it"
    add("--output", "--output_dir", type=Path, required=True, metavar="PATH", help=text)
    add("--threshold", type=float, default=0.3, metavar="X", help="minimum score (0.3)")


class Results:
    """Detects on files, draws them, and collects what detections.json contains.

    unique: whether no two files have the same name without suffix.
    """

    def __init__(self, predictor: Predictor, args: argparse.Namespace, unique: bool):
        self.names, self.output, self.unique = predictor.class_map.names, args.output, unique
        self.title = f"predictions, score ≥ {args.threshold:g}"
        options = args.threshold, args.batch_size
        self.detect = lambda images: predictor.stream(images, *options)
        pairs = predictor.class_map.ids.items()
        self.categories = [{"id": id_, "name": self.names[label]} for label, id_ in pairs]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, found: Detections, id_: int, **fields: Any) -> None:
        """Collect the detections on an image; `fields` are the image's, beside its id and size."""
        size = dict(zip(("height", "width"), found.image.shape[-2:], strict=True))
        self.images.append({"id": id_, **size, **fields})
        for row in found.to_coco(id_):
            self.annotations.append({"id": len(self.annotations) + 1, **row})

    def file(self, path: Path, id_: int, suffix: str) -> Path:
        return self.output / f"{'' if self.unique else f'{id_}_'}{path.stem}{suffix}"

    def detect_images(self, files: list[tuple[str, Path]], dataset: CocoAnnotations | None) -> None:
        """With a data set the files are its first images, drawn beside their annotations."""
        if dataset:
            images = (dataset.image(i) for i in range(len(files)))
        else:
            images = (read_image(path) for _, path in files)
        found_on = tqdm(self.detect(images), "detect", len(files), unit="image", disable=None)
        for i, ((name, path), found) in enumerate(zip(files, found_on, strict=True)):
            if dataset:
                id_ = int(dataset.image_ids[i])
                columns = {"ground truth": dataset.drawable_truth(id_), self.title: found}
                picture = side_by_side(found.image, columns, self.names)
            else:
                id_, picture = len(self.images) + 1, found.draw()
            file = self.file(path, id_, ".jpg")
            picture.save(file, quality=92, subsampling=0)
            self.add(found, id_, file_name=name, picture=file.name)

    def detect_video(self, name: str, path: Path, file: Path) -> None:
        """Writes the drawn frames to `file`. A webcam is stopped by Ctrl-C."""
        video, times = Video(path), deque[Fraction]()

        def images() -> Iterator[Tensor]:
            for frame in video:
                times.append(frame.time)
                yield frame.image

        total, stops = video.expected or None, (KeyboardInterrupt,) if is_webcam(path) else ()
        found_on = tqdm(self.detect(images()), "detect", total, unit="image", disable=None)
        with VideoWriter(file, video.rate) as writer, suppress(*stops):
            for i, found in enumerate(found_on):
                shown = times.popleft()
                writer.write(found.draw(), shown)
                fields = {"file_name": name, "frame": i, "time": float(shown)}
                self.add(found, len(self.images) + 1, **fields, picture=file.name)

    def write(self, file: Path) -> None:
        """In COCO's instances format, with scores."""
        keys = "images", "annotations", "categories"
        file.write_text(json.dumps({key: getattr(self, key) for key in keys}))


def run(args: argparse.Namespace) -> None:
    args.checkpoint = args.checkpoint or args.resume
    if bool(args.source) == bool(args.coco_path):
        raise UserError("pass either --source (or --images) or --coco_path")
    if args.num_images < 1 or not 0 <= args.threshold <= 1:
        raise UserError("num_images: at least 1; threshold: from 0 to 1")
    files = [(str(source), local_file(source)) for source in expand(args.source or [])]
    to_file = args.output.suffix.lower() in SUFFIXES
    if to_file and (len(files) != 1 or not is_video(files[0][1])):
        raise UserError(f"output: {args.output} is a video, but the source is not one video")
    predictor, dataset = load(args), None
    if args.coco_path:
        dataset = read_split(predictor, args.coco_path)
        predictor.class_map = dataset.class_map
        count = min(args.num_images, len(dataset))
        paths = [dataset.image_dir / dataset.file_name(i) for i in range(count)]
        files = [(str(path), path) for path in paths]
    inputs = {path.resolve() if to_file else path.parent.resolve() for _, path in files}
    if args.output.resolve() in inputs:
        what = "is the input" if to_file else "contains the input images"
        raise UserError(f"output: {args.output} {what}; use another one")
    (args.output.parent if to_file else args.output).mkdir(parents=True, exist_ok=True)

    start = perf_counter()
    results = Results(predictor, args, len({path.stem for _, path in files}) == len(files))
    for are_videos, group in groupby(files, lambda file: is_video(file[1])):
        if not are_videos:
            results.detect_images(list(group), dataset)
            continue
        for name, path in group:
            file = args.output if to_file else results.file(path, len(results.images) + 1, ".mp4")
            results.detect_video(name, path, file)
    results.write(args.output.with_suffix(".json") if to_file else args.output / "detections.json")
    count, seconds = len(results.images), perf_counter() - start
    summary = f"{len(results.annotations)} detections with score {args.threshold} or more"
    print(f"{args.output}: {summary} in {count} images, {count / seconds:.1f} images/s")
