"""Boxes, masks and captions drawn on images."""

import colorsys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST = 640  # smaller images are enlarged to this longer side, in pixels
OPACITY = 128  # of masks, out of 255
MARGIN = 8  # pixels around the pictures of `side_by_side`


def class_colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a label, the same in every picture; adjacent labels contrast."""
    hue, saturation = label * 0.618034 % 1, (0.85, 0.5)[label // 8 % 2]
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font where that is installed, as PIL's covers little more than Latin."""
    if spec := find_spec("matplotlib"):  # importing it would take half a second
        file = Path(spec.origin or "").parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if file.exists():
            return ImageFont.truetype(file, size)
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def enlarged(image: Tensor) -> tuple[Image.Image, float]:
    """The image (3, H, W) uint8 RGB, enlarged if small, and the factor."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    scale = max(1.0, SMALLEST / max(picture.size))
    width, height = (max(round(scale * side), 1) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC), scale


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int] | Tensor,
    scores: Sequence[float] | Tensor | None = None,
    names: Mapping[int, str] | None = None,
    crowd: Sequence[bool] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    masks: Tensor | None = None,
) -> Image.Image:
    """The image, enlarged if small, with boxes and captions of name and score.

    image (3, H, W) uint8 RGB; boxes (n, 4) xyxy in pixels, the most important first; names {label:
    name}, by default the label itself; crowd: whether a box is a crowd; colours: RGB of the boxes,
    by default their classes'; masks (n, H, W).
    """
    picture, scale = enlarged(image)
    width, height = picture.size
    for label, mask in zip(reversed(labels), [] if masks is None else masks.flip(0), strict=False):
        cover = Image.fromarray((mask.cpu().numpy() * OPACITY).astype(np.uint8))
        picture.paste(class_colour(int(label)), mask=cover.resize((width, height)))
    draw, longer = ImageDraw.Draw(picture), max(width, height)
    line, font = max(2, longer // 400), load_font(min(max(14, longer // 60), 28))

    edges = (scale * boxes.detach().cpu().double().numpy().reshape(-1, 4)).round().astype(int)
    edges = (edges - [0, 0, 1, 1]).clip(0, [width - 1, height - 1] * 2)  # inclusive
    edges[:, 2:] = np.maximum(edges[:, :2], edges[:, 2:])
    drawn, captions = [], np.zeros((0, 4), dtype=int)
    for i, (x0, y0, x1, y1) in enumerate(edges.tolist()):
        label = int(labels[i])
        text = (names or {}).get(label, str(label))
        text += " (crowd)" if crowd is not None and crowd[i] else ""
        text += f" {float(scores[i]):.2f}" if scores is not None else ""
        while font.getlength(text) + 6 > width and len(text) > 2:
            text = text[:-2] + "…"
        w, h = round(font.getlength(text)) + 6, sum(font.getmetrics())
        # Along the upper or lower edge of the box, where it overlaps other captions least.
        xs = np.linspace(x0, x1 + 1 - w, 5, dtype=int).clip(0, max(width - w, 0))
        ys = np.clip((y0 - h, y0, y1 + 1, y1 + 1 - h), 0, max(height - h, 0))
        places = np.array([(x, y, x + w, y + h) for x in xs for y in ys])
        upper_left = np.maximum(places[:, None, :2], captions[:, :2])
        lower_right = np.minimum(places[:, None, 2:], captions[:, 2:])
        overlap = (lower_right - upper_left).clip(0).prod(axis=2).sum(axis=1)
        place = places[overlap.argmin()]
        captions = np.concatenate([captions, place[None]])
        colour = colours[i] if colours is not None else class_colour(label)
        drawn.append(((x0, y0, x1, y1), place.tolist(), text, colour))
    drawn.reverse()  # the most important on top
    for (x0, y0, x1, y1), _, _, colour in drawn:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=line + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    for _, (x0, y0, x1, y1), text, colour in drawn:
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 120
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
        draw.text((x0 + 3, y0), text, fill="black" if bright else "white", font=font)
    return picture


def side_by_side(
    image: Tensor, columns: Mapping[str, Mapping], names: Mapping[int, str] | None = None
) -> Image.Image:
    """Copies of the image in a row: `columns` is {title: keyword arguments of `draw_boxes`}."""
    return titled({t: draw_boxes(image, names=names, **part) for t, part in columns.items()})


def titled(parts: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one size in a row, {title: picture}."""
    width, height = next(iter(parts.values())).size
    font = load_font(min(max(16, max(width, height) // 45), 36))
    top = 2 * MARGIN + sum(font.getmetrics())
    column = MARGIN + max(width, *(round(font.getlength(title)) for title in parts))
    sheet = Image.new("RGB", (MARGIN + column * len(parts), top + height + MARGIN), "white")
    for i, (title, part) in enumerate(parts.items()):
        ImageDraw.Draw(sheet).text((MARGIN + i * column, MARGIN), title, fill="black", font=font)
        sheet.paste(part, (MARGIN + i * column, top))
    return sheet
