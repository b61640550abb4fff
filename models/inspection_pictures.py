"""Pictures of `inspection.look`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .draw import class_colour, enlarged, side_by_side, titled
from .inspection import View

RAMP = np.array([(50, 80, 255), (255, 230, 0), (255, 0, 0)])  # blue, yellow, red


def ramp(values: np.ndarray) -> np.ndarray:
    """Numbers (...) from 0 to 1 as colours (..., 3)."""
    return np.stack([np.interp(values, (0, 0.5, 1), channel) for channel in RAMP.T], axis=-1)


def draw_query(view: View, layer: int, query: int) -> Image.Image:
    """The attention of a query in a decoder layer, relative to its largest weight. The samples of
    deformable attention become dots, a map of dense attention, the mean of the heads, covers the
    image. White is the box or point that the layer starts from, coloured the box it predicts."""
    seen, (picture, scale) = view.layers[layer], enlarged(view.image)
    dark = 0.5 * np.asarray(picture.convert("L").convert("RGB"), dtype=float)
    if seen.maps is not None:
        heat = attention_map(view, layer, query, picture.size)
        heat = (heat / heat.max())[..., None]
        dark = dark * (1 - heat) + ramp(heat[..., 0]) * heat
    picture = Image.fromarray(dark.round().astype(np.uint8))
    draw, unit = ImageDraw.Draw(picture), max(picture.size) / 160
    at = lambda places: (scale * places[query] - 0.5).tolist()
    if seen.locations is not None and seen.weights is not None:
        places = scale * seen.locations[query].flatten(0, 2) - 0.5
        weights = (seen.weights[query] / seen.weights[query].max()).flatten()
        for i in weights.argsort().tolist():  # the heaviest on top
            (x, y), radius = places[i].tolist(), unit * (0.6 + float(weights[i]))
            colour = tuple(ramp(weights[i].numpy()).round().astype(int))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, "black")
    if seen.references is not None and seen.references.shape[1] == 4:
        draw.rectangle(at(seen.references), outline="white", width=2)
    elif seen.references is not None:
        x, y = at(seen.references)
        draw.line((x - 2 * unit, y, x + 2 * unit, y), "white", 2)
        draw.line((x, y - 2 * unit, x, y + 2 * unit), "white", 2)
    draw.rectangle(at(seen.boxes), outline=class_colour(int(seen.labels[query])), width=3)
    return picture


def attention_map(view: View, layer: int, query: int, size: tuple[int, int]) -> np.ndarray:
    """The density of dense attention, all levels and heads together, at (width, height) pixels."""
    total = np.zeros(size[::-1])
    for level in view.layers[layer].maps or ():
        weights = level[query].mean(0)
        density = Image.fromarray((weights * weights.numel()).numpy())
        total += np.asarray(density.resize(size, Image.Resampling.BILINEAR))
    return total


def draw_layer(
    view: View, layer: int, queries: Sequence[int], names: Mapping[int, str]
) -> Image.Image:
    """Queries side by side; see `draw_query`."""
    seen = view.layers[layer]
    title = lambda q: f"query {q}: {names.get(int(seen.labels[q]), '?')} {seen.scores[q]:.2f}"
    return titled({title(query): draw_query(view, layer, query) for query in queries})


def draw_selection(view: View) -> Image.Image:
    """The selected tokens, coloured by score relative to the best, and larger on coarser levels."""
    assert view.selection is not None
    picture, scale = enlarged(view.image)
    picture = Image.fromarray(np.asarray(picture.convert("L").convert("RGB")) // 2)
    draw, unit = ImageDraw.Draw(picture), max(picture.size) / 300
    points, scores = scale * view.selection.points - 0.5, view.selection.scores
    colours = ramp((scores / scores.max()).numpy()).round().astype(int)
    for i in scores.argsort().tolist():
        radius = unit * (1 + float(view.selection.levels[i]))
        (x, y), colour = points[i].tolist(), tuple(colours[i])
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, "black")
    title = f"{len(scores)} selected tokens, scores {scores.min():.2f} to {scores.max():.2f}"
    return titled({title: picture})


def draw_denoising(view: View, group: int, names: Mapping[int, str]) -> Image.Image:
    """The objects, and a group's noised boxes and what the last layer makes of them."""
    seen = view.denoising
    assert seen is not None
    columns = {"objects": {"boxes": seen.boxes, "labels": seen.labels}}
    for kind, name in enumerate(("positive", "negative")[: seen.noised.shape[1]]):
        place = group, kind
        columns[f"{name} queries"] = {"boxes": seen.noised[place], "labels": seen.labels}
        columns[f"{name}, restored"] = {
            "boxes": seen.restored[-1][place],
            "labels": seen.labels_restored[-1][place],
            "scores": seen.scores[-1][place],
        }
    return side_by_side(view.image, columns, names)


def write_pictures(
    view: View, output: Path, queries: Sequence[int], names: Mapping[int, str], groups: int
) -> list[str]:
    """Write a picture of each decoder layer, of the selected tokens, and of the first `groups` of
    denoising, into a directory. Returns the files' names."""
    pictures = {
        f"layer_{i + 1}.png": draw_layer(view, i, queries, names) for i in range(len(view.layers))
    }
    if view.selection is not None:
        pictures["selection.png"] = draw_selection(view)
    if view.denoising is not None:
        for i in range(min(groups, len(view.denoising.noised))):
            pictures[f"denoising_{i + 1}.png"] = draw_denoising(view, i, names)
    output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(output / name)
    return list(pictures)
