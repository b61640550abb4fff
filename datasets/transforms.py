"""The published augmentation.

A pipeline is called as `pipeline(image, target)`: image a `tv_tensors.Image` (3, H, W) uint8,
target a dict with "boxes", `tv_tensors.BoundingBoxes` (n, 4) XYXY in pixels, "labels" (n,) and for
masks "masks", `tv_tensors.Mask` (n, H, W) uint8. It returns the normalised float32 image and the
target with boxes (n, 4) cxcywh in [0, 1] and masks bool. Evaluation pipelines also accept an image
alone. All randomness comes from torch's CPU generator.

Images are tensors, channels last in memory: resizing them is several times faster than with PIL,
and the results differ by at most one grey level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from models.errors import UserError
from models.preprocess import normalize, resized_size


class ResizeShortestSide(v2.RandomShortestSize):
    """Resizes the shorter side to a random one of `min_size`, the longer to at most `max_size`,
    with sides rounded as in the released code."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = self.min_size[torch.randint(len(self.min_size), ())]
        return {"size": resized_size(*v2.query_size(flat_inputs), size, self.max_size)}


class RandomSizeCrop(v2.Transform):
    """Crops to sides drawn uniformly from [low, high], limited by the image's sides."""

    def __init__(self, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        ranges = [(min(self.low, side), min(self.high, side) + 1) for side in (height, width)]
        h, w = (int(torch.randint(*limits, ())) for limits in ranges)
        top, left = (int(torch.randint(margin + 1, ())) for margin in (height - h, width - w))
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        cropped = F.crop(inpt, **params)  # clips boxes to the crop
        if isinstance(inpt, tv_tensors.Image):
            # Resizing is slow if rows are not adjacent in memory.
            rows = cropped.as_subclass(Tensor).permute(1, 2, 0).contiguous()
            cropped = tv_tensors.wrap(rows.permute(2, 0, 1), like=inpt)
        return cropped


class DropEmptyBoxes(nn.Module):
    """Removes empty boxes, such as those of objects outside a crop, and what belongs to them."""

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        boxes = target["boxes"]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        kept = {k: tv_tensors.wrap(v[keep], like=v) for k, v in target.items() if k != "labels"}
        return image, {**kept, "labels": target["labels"][keep]}


class ToModelInput(v2.Transform):
    """Normalises the image for ImageNet backbones; converts boxes to cxcywh in [0, 1]; masks to
    bool."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            boxes = F.convert_bounding_box_format(inpt, new_format="CXCYWH").as_subclass(Tensor)
            return boxes / boxes.new_tensor([width, height, width, height])
        if isinstance(inpt, tv_tensors.Mask):
            return inpt.as_subclass(Tensor).bool()
        return normalize(inpt.as_subclass(Tensor))


def train_transforms(
    scales: Sequence[int],
    max_size: int,
    scales2_resize: Sequence[int],
    scales2_crop: Sequence[int],
    fix_size: bool = False,
) -> nn.Module:
    """Horizontal flip; then, with equal probability, a resize to one of `scales`, or a resize to
    one of `scales2_resize`, a crop with sides in `scales2_crop` = (min, max) and a resize to one of
    `scales`. If `scales2_crop` is empty, there are no crops. With `fix_size`, as released, images
    are resized to (max(scales), max_size) without preserving the aspect ratio."""
    flip = v2.RandomHorizontalFlip(0.5)
    _check_scales("data_aug_scales", scales)
    if fix_size:
        return v2.Compose([flip, v2.Resize((max(scales), max_size)), ToModelInput()])
    resize = ResizeShortestSide(scales, max_size)
    if scales2_crop:
        _check_scales("data_aug_scales2_resize", scales2_resize)
        if len(scales2_crop) != 2 or not 0 < scales2_crop[0] <= scales2_crop[1]:
            raise UserError(f"data_aug_scales2_crop is {scales2_crop}, not [min, max] in pixels")
        shrink, crop = ResizeShortestSide(scales2_resize), RandomSizeCrop(*scales2_crop)
        resize = v2.RandomChoice([resize, v2.Compose([shrink, crop, DropEmptyBoxes(), resize])])
    return v2.Compose([flip, resize, ToModelInput()])


def eval_transforms(scales: Sequence[int], max_size: int) -> nn.Module:
    """Resizes the shorter side to the largest of `scales`, the longer to at most `max_size`."""
    _check_scales("data_aug_scales", scales)
    return v2.Compose([ResizeShortestSide([max(scales)], max_size), ToModelInput()])


def _check_scales(name: str, scales: Sequence[int]) -> None:
    if not scales or min(scales) < 1:
        raise UserError(f"{name} is {list(scales)}, not a list of sizes in pixels")
