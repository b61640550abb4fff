"""Images from files, directories, URLs, videos and memory, as (3, H, W) uint8 RGB."""

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .download import local_file
from .errors import UserError
from .video import Video, is_video

try:
    import simplejpeg  # PIL's pixels in less time
except ImportError:
    simplejpeg = None  # type: ignore[assignment]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations


def read_image(path: str | Path, size: tuple[float, float] | None = None) -> Tensor:
    """An image file of any mode as (3, H, W) uint8 RGB, rotated to its EXIF orientation.

    size: (height, width) in the annotations. If it matches the stored image but not the rotated
    one, the boxes were drawn without regard to EXIF, and the image is not rotated.
    Transparency is ignored. UserError if the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            is_plain = image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1
            if simplejpeg and is_plain:
                with contextlib.suppress(ValueError):  # a broken file, which PIL may still read
                    return _tensor(simplejpeg.decode_jpeg(Path(path).read_bytes()))
            return _from_pil(image, size)
    except Exception as error:  # decoders may raise anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def displayed_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, rotated to its EXIF orientation; without decoding it."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if _orientation(image) in SWAPS_SIDES else image.size
    except OSError as e:
        raise UserError(f"{path}: cannot be read as an image ({e}); replace or remove it") from e


def _from_pil(image: Image.Image, size: tuple[float, float] | None = None) -> Tensor:
    stored, orientation = (image.height, image.width), _orientation(image)
    swaps_sides = orientation in SWAPS_SIDES
    if orientation != 1 and (not swaps_sides or size != stored or stored[0] == stored[1]):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; PIL would clip at 255
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P":  # PIL would warn about transparency
        image = image.convert("RGBA")
    return _tensor(np.array(image.convert("RGB")))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels last in memory, for fast resizing


def expand(source: Any) -> Iterator[Any]:
    """The images and videos of a source: files of directories and patterns by name, the rest as it
    is. UserError if there are none."""
    if not isinstance(source, str | os.PathLike):
        is_one = isinstance(source, Tensor | np.ndarray | Image.Image)
        if not is_one and not isinstance(source, Iterable):
            raise UserError(f"source: {type(source).__name__} is no image, path or list of these")
        if is_one:
            yield source
        else:
            for part in source:
                yield from expand(part)
        return
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{source}: holds no images with suffixes {', '.join(SUFFIXES)}")
        yield from found
    elif glob.has_magic(str(source)) and not path.exists() and "://" not in str(source):
        names = sorted(glob.glob(str(source), recursive=True))
        if not (files := [Path(name) for name in names if os.path.isfile(name)]):
            raise UserError(f"{source}: no file matches")
        yield from files
    else:
        yield source


def read_source(source: Any) -> Iterator[tuple[str, Tensor]]:
    """The images of a source one after another, each with its name, as (3, H, W) uint8 RGB.

    source: an image or a video file, a directory of images, a pattern (`photos/**/*.jpg`), a URL,
    a webcam ("0" or /dev/video0), a PIL image, an array (H, W, 3) or a tensor (3, H, W), both uint8
    RGB, or an iterable of these. The name is the path or URL, `clip.mp4#0` for a frame, or
    `image 0` for images in memory. UserError if there is no image, or one of another form.
    """
    number = 0
    for item in expand(source):
        if isinstance(item, str | os.PathLike):
            if is_video(path := local_file(item)):
                for i, frame in enumerate(Video(path)):
                    yield f"{item}#{i}", frame.image
            else:
                yield str(item), read_image(path)
        else:
            yield f"image {number}", _from_memory(item)
            number += 1


def _from_memory(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    if isinstance(image, Image.Image):
        return _from_pil(image)
    shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    is_array = isinstance(image, np.ndarray)
    channels = shape[2 if is_array else 0] if len(shape) == 3 else 0
    if channels != 3 or dtype != "uint8" or 0 in shape:
        kind, wanted = ("an array", "(H, W, 3)") if is_array else ("a tensor", "(3, H, W)")
        problem = f"source: {kind} of shape {shape} and type {dtype}"
        raise UserError(f"{problem}; an image is {wanted} uint8, RGB, from 0 to 255")
    # A copy, because torch takes no negative strides, as of `bgr[..., ::-1]`.
    return image.cpu() if isinstance(image, Tensor) else _tensor(np.array(image, order="C"))
