"""`predict` on videos: boxes on the right frames, times, damaged files."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from models import load_detector
from models.cli import main
from models.errors import UserError
from models.images import read_source
from models.video import Video, VideoWriter

TIMES = [Fraction(i + (i > 5) * 3, 10) for i in range(9)]  # seconds; with a pause


@pytest.fixture(scope="module")
def pictures(toy: Path) -> list[Image.Image]:
    paths = sorted((toy / "train2017").glob("*.jpg"))[: len(TIMES)]
    return [Image.open(path).convert("RGB").resize((96, 64)) for path in paths]


@pytest.fixture(scope="module")
def clip(pictures: list[Image.Image], tmp_path_factory) -> Path:
    """Toy images as a video whose index is in front, so that it can be cut."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, TIMES, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = int(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def test_frames_are_the_pictures(pictures, clip, caplog):
    video = Video(clip)
    frames = list(video)
    assert [frame.time for frame in frames] == TIMES
    assert video.expected == len(TIMES) and not caplog.messages
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.image.dtype == torch.uint8 and frame.image.shape == (3, 64, 96)
        assert difference(frame.image.permute(1, 2, 0), picture) < 6


def test_boxes_are_on_the_right_frames(saved, clip, tmp_path, capsys):
    predictor, out = load_detector(saved), tmp_path / "out.mp4"
    found = predictor.predict(clip, threshold=0)
    assert [d.source for d in found] == [f"{clip}#{i}" for i in range(len(TIMES))]
    threshold = float(torch.cat([d.scores for d in found]).quantile(0.8))
    command = ["predict", str(saved), "--source", str(clip), "--threshold", str(threshold)]
    assert main([*command, "--output", str(out), "--device", "cpu"]) == 0
    assert f"in {len(TIMES)} images, " in (printed := capsys.readouterr().out)
    assert "images/s" in printed

    content = json.loads(out.with_suffix(".json").read_text())
    assert [image["time"] for image in content["images"]] == [float(time) for time in TIMES]
    expected = predictor.predict(clip, threshold)
    for image, detections in zip(content["images"], expected, strict=True):
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        assert [row["score"] for row in rows] == pytest.approx(detections.scores.tolist())
    drawn = list(Video(out))
    assert [frame.time for frame in drawn] == TIMES
    wanted = [np.asarray(detections.draw())[:426:4, ::4] for detections in expected]
    for i, frame in enumerate(drawn):
        pixels = frame.image.permute(1, 2, 0)[::4, ::4]
        differences = [difference(pixels, picture) for picture in wanted]
        assert np.argmin(differences) == i and differences[i] < 8


def test_a_truncated_video_keeps_what_was_decoded(saved, clip, tmp_path, caplog):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    command = ["predict", str(saved), "--device", "cpu", "--source", str(cut)]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    (warning,) = caplog.messages
    kept = len(list(Video(tmp_path / "out" / "cut.mp4")))
    assert 3 <= kept < len(TIMES)
    assert f"cut.mp4: damaged, {kept} of {len(TIMES)} frames decoded and kept: " in warning
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["frame"] for image in content["images"]] == list(range(kept))


def test_a_format_without_a_number_of_frames(pictures, tmp_path, caplog):
    """Matroska's header has the duration."""
    path = tmp_path / "x.mkv"
    with VideoWriter(path, Fraction(1)) as writer:
        for i, picture in enumerate(pictures):
            writer.write(picture, Fraction(i))
    assert len(list(Video(path))) == len(pictures) and not caplog.messages
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    kept = len(list(Video(path)))
    assert 1 <= kept < len(pictures)
    assert f"damaged, {kept} of more frames decoded and kept" in caplog.text


def test_images_and_videos_together(saved, clip, pictures, tmp_path):
    for name in ("a", "b"):
        pictures[0].save(tmp_path / f"{name}.png")
    sources = [str(tmp_path / "a.png"), str(clip), str(tmp_path / "b.png")]
    command = ["predict", str(saved), "--device", "cpu", "--source", *sources]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.jpg", "clip.mp4", "b.jpg", "detections.json"}
    images = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [image["id"] for image in images] == list(range(1, len(TIMES) + 3))
    assert [image["file_name"] for image in images[::10]] == [sources[0], sources[2]]


def test_rotation_of_a_phone_is_applied(clip, pictures, tmp_path):
    """The header's matrix, which says how to turn frames, changed by hand."""
    content, one, minus = clip.read_bytes(), b"\0\1\0\0", b"\xff\xff\0\0"
    zero, end = bytes(4), b"\x40\0\0\0"
    identity = one + zero * 3 + one + zero * 3 + end
    quarter = zero + one + zero + minus + zero * 4 + end  # clockwise
    track = content.index(b"tkhd")
    turned = content[:track] + content[track:].replace(identity, quarter, 1)
    (tmp_path / "turned.mp4").write_bytes(turned)
    frame = next(iter(Video(tmp_path / "turned.mp4"))).image
    assert difference(frame.permute(1, 2, 0), np.rot90(np.asarray(pictures[0]), -1)) < 6


def test_odd_sizes(tmp_path):
    with VideoWriter(tmp_path / "x.mp4", Fraction(5)) as writer:
        for i in range(3):
            writer.write(Image.new("RGB", (33, 47), (80 * i, 0, 0)), Fraction(i, 5))
    assert [image.shape for _, image in read_source(tmp_path / "x.mp4")] == [(3, 46, 32)] * 3


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("broken.mp4", "out.mp4", "broken.mp4: cannot be opened as a video"),
        ("clip.mp4", "clip.mp4", "clip.mp4 is the input"),
        ("clip.mp4", ".", "contains the input"),
        ("clip.mp4", "picture.png/out.mp4", "File exists: 'picture.png'"),
        ("picture.png", "out.mp4", "the source is not one video"),
    ],
)
def test_errors(source, output, message, saved, clip, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.mp4").write_bytes(b"no video")
    Path("clip.mp4").write_bytes(clip.read_bytes())
    pictures[0].save("picture.png")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    command = ["predict", str(saved), "--device", "cpu", "--source", source, "--output", output]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("dn-dino predict: error: ") and message in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_missing_package_is_named(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)  # its import fails
    with pytest.raises(UserError, match=r"pip install dn_dino\[video\]"):
        Video(clip)
