"""Augmentation: published sizes and frequencies, and boxes that stay on their objects."""

from collections import Counter

import pytest
import torch
from torchvision import tv_tensors

from datasets.transforms import (
    DropEmptyBoxes,
    RandomSizeCrop,
    ResizeShortestSide,
    eval_transforms,
    train_transforms,
)
from models.errors import UserError
from models.preprocess import IMAGENET_MEAN, IMAGENET_STD, resized_size

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


def sample(height, width, boxes):
    """Solid rectangles on black, channels last in memory like the reader's images."""
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    for colour, (x0, y0, x1, y1) in zip(COLOURS, boxes, strict=False):
        pixels[y0:y1, x0:x1] = colour
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.Image(pixels.permute(2, 0, 1)), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
    }


def coloured_box(image, label):
    """Bounding box (4,) xyxy of the pixels of a label's colour."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    strength = (image * std + mean)[label]
    # An edge pixel half covered by the object has half the strength.
    columns, rows = strength.max(0).values, strength.max(1).values

    def extent(profile):
        inside = (profile > 0.5).nonzero().flatten()
        return int(inside[0]), int(inside[-1]) + 1

    (x0, x1), (y0, y1) = extent(columns), extent(rows)
    return torch.tensor([x0, y0, x1, y1], dtype=torch.float32)


def published_size(height, width, size, max_size):
    """The published rule, written out case by case."""
    if max_size is not None and max(height, width) / min(height, width) * size > max_size:
        size = round(max_size * min(height, width) / max(height, width))
    if height < width:
        return [size, int(size * width / height)]
    return [int(size * height / width), size]


def test_resized_size_follows_the_published_rule():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(20, 3000, (3000, 2), generator=generator).tolist()
    for i, (height, width) in enumerate(draws):
        size, max_size = 480 + 32 * (i % 11), (1333, None, 1000)[i % 3]
        expected = published_size(height, width, size, max_size)
        assert resized_size(height, width, size, max_size) == expected


def test_resized_size_by_hand():
    assert resized_size(480, 640, 800, 1333) == [800, 1066]  # 1066.67, truncated
    assert resized_size(640, 480, 800, 1333) == [1066, 800]
    assert resized_size(427, 640, 800, 1333) == [800, 1199]
    assert resized_size(300, 640, 800, 1333) == [625, 1333]  # the longer side decides
    assert resized_size(500, 500, 480, 1333) == [480, 480]
    assert resized_size(1, 5000, 800, 1333)[0] == 1  # at least one pixel


@pytest.mark.parametrize("second", [[], [200, 250, 300]])
def test_boxes_stay_on_their_objects(second):
    boxes = [[15, 20, 115, 100], [150, 10, 210, 165], [220, 120, 317, 235]]
    transforms = train_transforms(range(240, 401, 16), 666, second, [192, 300] if second else [])
    checked = Counter()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = transforms(*sample(240, 320, boxes))
        assert image.dtype == torch.float32 and image.is_contiguous()
        height, width = image.shape[1:]
        cx, cy, w, h = (target["boxes"] * torch.tensor([width, height, width, height])).unbind(1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1)
        assert (corners >= -1e-3).all()
        assert (corners[:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        for box, label in zip(corners, target["labels"].tolist(), strict=True):
            if (box[2:] - box[:2]).min() > 4:  # slivers at the edge are barely visible
                assert (box - coloured_box(image, label)).abs().max() <= 1.5
                checked[label] += 1
    assert all(checked[label] >= 20 for label in range(3))


def test_crop_drops_outside_boxes_with_their_labels():
    pipeline = lambda *inputs: DropEmptyBoxes()(*RandomSizeCrop(50, 50)(*inputs))
    counts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = pipeline(*sample(100, 100, [[0, 0, 10, 10], [40, 40, 60, 60]]))
        assert image.shape == (3, 50, 50) and target["boxes"].canvas_size == (50, 50)
        assert len(target["boxes"]) == len(target["labels"])
        assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) > 0).all()
        visible = [label for label in range(2) if image[label].any()]
        assert target["labels"].tolist() == visible
        counts.add(len(visible))
    assert 1 in counts and 2 in counts


def test_a_crop_without_objects_is_allowed():
    transforms = train_transforms([100], 200, [100], [20, 20])
    empty = 0
    for seed in range(40):
        torch.manual_seed(seed)
        _, target = transforms(*sample(100, 100, [[0, 0, 5, 5]]))
        assert target["boxes"].shape == (len(target["labels"]), 4)
        empty += len(target["labels"]) == 0
    assert empty > 5


def test_images_without_objects_are_accepted():
    image, target = train_transforms([64], 100, [60], [20, 40])(*sample(80, 100, []))
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert min(image.shape[1:]) > 0


def test_crop_sides_are_uniform_and_bounded():
    torch.manual_seed(0)
    crop, sides = RandomSizeCrop(3, 6), Counter()
    for _ in range(2000):
        image, _ = crop(*sample(5, 40, []))
        sides[tuple(image.shape[1:])] += 1
    heights, widths = (Counter(shape[i] for shape in sides.elements()) for i in (0, 1))
    assert set(heights) == {3, 4, 5} and set(widths) == {3, 4, 5, 6}  # the image is 5 high
    assert all(abs(count / 2000 - 1 / 3) < 0.05 for count in heights.values())
    assert all(abs(count / 2000 - 1 / 4) < 0.05 for count in widths.values())
    assert RandomSizeCrop(8, 9)(*sample(5, 6, []))[0].shape == (3, 5, 6)  # too small to crop


def test_frequencies_of_flip_scale_and_crop():
    torch.manual_seed(0)
    transforms, runs = train_transforms([16, 32, 48, 64], 1000, [20], [10, 10]), 1200
    flips, sizes, crops = 0, Counter(), 0
    for _ in range(runs):
        # The crop is square, the image is not: the shape identifies the branch.
        image, _ = transforms(*sample(20, 40, [[0, 0, 20, 20]]))
        sizes[min(image.shape[1:])] += 1
        crops += image.shape[1] == image.shape[2]
    for _ in range(runs):
        _, target = train_transforms([16], 1000, [], [])(*sample(20, 40, [[0, 0, 20, 20]]))
        flips += bool(target["boxes"][0, 0] > 0.5)
    assert set(sizes) == {16, 32, 48, 64}
    assert all(abs(count / runs - 0.25) < 0.06 for count in sizes.values())
    assert abs(crops / runs - 0.5) < 0.06 and abs(flips / runs - 0.5) < 0.06


def test_fix_size_gives_every_image_the_same_size():
    """As released, the largest scale high and the maximum size wide, for any image shape."""
    transforms, flips = train_transforms([30, 60], 90, [20], [10, 10], fix_size=True), set()
    for seed in range(12):
        torch.manual_seed(seed)
        height, width = (50, 100) if seed % 2 else (80, 40)
        image, target = transforms(*sample(height, width, [[0, 0, width // 2, height]]))
        assert image.shape == (3, 60, 90)
        flipped = bool(target["boxes"][0, 0] > 0.5)
        centre = 0.75 if flipped else 0.25
        assert torch.allclose(target["boxes"], torch.tensor([[centre, 0.5, 0.5, 1.0]]))
        flips.add(flipped)
    assert flips == {True, False}


def test_evaluation_normalises_and_accepts_a_bare_image():
    white = torch.full((3, 10, 20), 255, dtype=torch.uint8)
    image = eval_transforms([10], 20)(tv_tensors.Image(white))
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert image.shape == (3, 10, 20) and type(image) is torch.Tensor
    assert torch.allclose(image[:, 5, 5], expected) and (white == 255).all()
    assert eval_transforms([480, 800], 1333)(tv_tensors.Image(white)).shape == (3, 666, 1332)


def test_resizing_agrees_with_pil():
    from PIL import Image

    pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    for size in (33, 60, 97):
        resized = ResizeShortestSide([size])(tv_tensors.Image(pixels.permute(2, 0, 1)))
        pil = Image.fromarray(pixels.numpy()).resize(tuple(resized.shape[:0:-1]), Image.BILINEAR)
        reference = torch.tensor(list(pil.tobytes()), dtype=torch.int16).view(*resized.shape[1:], 3)
        assert (resized.permute(1, 2, 0) - reference).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([], 1333, [], []), "data_aug_scales"),
        (([480], 1333, [], [384, 600]), "data_aug_scales2_resize"),
        (([480], 1333, [400], [384]), "data_aug_scales2_crop"),
        (([480], 1333, [400], [600, 384]), "data_aug_scales2_crop"),
    ],
)
def test_invalid_settings_are_named(arguments, name):
    with pytest.raises(UserError, match=name):
        train_transforms(*arguments)
