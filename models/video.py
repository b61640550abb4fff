"""Videos: frames in, from a file or a webcam, and drawn pictures out, by PyAV."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError, import_extra

logger = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv")
WEBCAMS = {"linux": ("v4l2", "/dev/video"), "darwin": ("avfoundation", "")}  # format, name


def is_webcam(path: str | os.PathLike) -> bool:
    """Whether this is a webcam's number or device, and no file."""
    name = str(path)
    return (name.isdigit() and not Path(name).exists()) or name.startswith("/dev/video")


def is_video(path: str | os.PathLike) -> bool:
    return is_webcam(path) or Path(path).suffix.lower() in SUFFIXES


class Frame(NamedTuple):
    image: Tensor  # (3, H, W) uint8 RGB
    time: Fraction  # seconds after the first frame


class Video:
    """The frames of a video file or a webcam, for one pass, turned as the file says.

    expected: the number of frames according to the file, 0 if it does not say. A warning tells if
    fewer can be decoded. UserError if the file cannot be opened, or no frame decoded.
    """

    def __init__(self, path: str | os.PathLike):
        self.av: Any = import_extra("av", "video")
        self.path, self._problem = path, ""
        name, format = str(path), None
        if is_webcam(path):
            format, prefix = WEBCAMS.get(sys.platform, (None, ""))
            name = prefix + name if name.isdigit() else name
        try:
            self.container = self.av.open(name, format=format)
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, OSError, IndexError) as error:
            reason = getattr(error, "strerror", None) or "no video in it"
            problem = f"{path}: cannot be opened as a video ({reason})"
            raise UserError(f"{problem}; check the path, or copy the file again") from error
        self.stream.thread_type = "AUTO"
        self.rate = Fraction(self.stream.guessed_rate or 25)
        self.expected = self.stream.frames
        self._length = Fraction(self.container.duration or 0, self.av.time_base)  # seconds

    def __iter__(self) -> Iterator[Frame]:
        count, first, last = 0, None, Fraction(0)
        with self.container:
            for frame in self._decoded():
                time = count / self.rate if frame.pts is None else frame.pts * frame.time_base
                first = time if first is None else first
                last = time - first
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
                yield Frame(image, last)
                count += 1
        if not count:
            problem = f"{self.path}: no frame can be decoded ({self._problem or 'empty'})"
            raise UserError(f"{problem}; copy the file again")
        # Some formats have the number of frames in their header, others only the duration.
        if count < self.expected or (not self.expected and last + 1 < self._length):
            kept = f"{count} of {self.expected or 'more'} frames decoded and kept"
            logger.warning("%s: damaged, %s: %s", self.path, kept, self._problem or "the file ends")

    def _decoded(self) -> Iterator:
        """All frames that can be decoded, also those after a damaged part."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                yield from next(packets).decode()
            except StopIteration:
                return
            except self.av.FFmpegError as error:
                self._problem = error.strerror or str(error)


class VideoWriter:
    """Writes pictures of equal size as a video without sound, in the format of the file's suffix;
    a context. Odd sides lose a row or column of pixels. UserError if it cannot be written."""

    TIME_BASE = Fraction(1, 90_000)  # of MPEG; frames need not be equally far apart

    def __init__(self, path: Path, rate: Fraction):
        self.av: Any = import_extra("av", "video")
        self.path, self.rate, self.stream = path, rate, cast(Any, None)
        with self._errors():
            self.container = self.av.open(str(path), "w")

    def write(self, picture: Image.Image, time: Fraction) -> None:
        """Append a picture shown from `time` on, in seconds, later than the one before it."""
        width, height = (side // 2 * 2 for side in picture.size)
        with self._errors():
            if not self.stream:
                codec = self.container.default_video_codec
                self.stream = self.container.add_stream(codec, self.rate)
                self.stream.width, self.stream.height = width, height
                self.stream.pix_fmt = "yuv420p"
                self.stream.codec_context.time_base = self.TIME_BASE
            frame = self.av.VideoFrame.from_image(picture.crop((0, 0, width, height)))
            frame.pts, frame.time_base = round(time / self.TIME_BASE), self.TIME_BASE
            self.container.mux(self.stream.encode(frame))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self.av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "check the path and the space on the disk"
            raise UserError(f"{self.path}: cannot be written ({reason}); {remedy}") from error

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._errors():
            if self.stream:
                self.container.mux(self.stream.encode())
            self.container.close()
