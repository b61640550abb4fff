"""DETR's mask head (Carion et al. 2020, section 4.4) on a detector with one feature level. A
query's attention over the pixels becomes a mask with the help of the backbone's finer maps.

Masks are only computed for the queries that are asked for: those that are matched or selected.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detector import Detector, Outputs
from .dn_components import focal_term
from .errors import import_extra
from .nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from .options import DetectorOptions
from .recompute import run

ALPHA = 0.25  # of the focal loss
CHUNK = 32  # masks computed at a time in evaluation, to limit memory


class AttentionMaps(nn.Module):
    """Where queries look: attention weights, without values."""

    def __init__(self, options: DetectorOptions):
        super().__init__()
        self.num_heads = options.nheads
        self.q_linear = nn.Linear(options.hidden_dim, options.hidden_dim)
        self.k_linear = nn.Linear(options.hidden_dim, options.hidden_dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, memory: Tensor, padding: Tensor, image: Tensor) -> Tensor:
        """States (N, D) of queries of the images `image` (N,), memory (B, S, D), padding (B, S) ->
        (N, heads, S), which sum to 1 over heads and pixels together."""
        pair = self.q_linear(states), self.k_linear(memory)[image]
        query, key = (x.unflatten(-1, (self.num_heads, -1)) for x in pair)
        weights = torch.einsum("nhd,nshd->nhs", query * query.shape[-1] ** -0.5, key)
        weights = weights.masked_fill(padding[image, None], -torch.inf)
        return weights.flatten(1).softmax(-1).view_as(weights)


class MaskHead(nn.Module):
    """Convolutions `lay`, and between them `adapter`s of the backbone's finer maps, the coarsest
    first, which have `num_channels`."""

    def __init__(self, options: DetectorOptions, num_channels: Sequence[int]):
        super().__init__()
        self.dim, width = options.hidden_dim, options.hidden_dim + options.nheads
        widths = [width, width, *(self.dim // 2**i for i in range(1, len(num_channels) + 2))]
        for i, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"lay{i}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"gn{i}", nn.GroupNorm(gcd(8, after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for i, (before, after) in enumerate(zip(num_channels, widths[2:-1], strict=True), 1):
            self.add_module(f"adapter{i}", nn.Conv2d(before, after, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, content: Tensor, maps: Tensor, image: Tensor, *finer: Tensor) -> Tensor:
        """Content (B, D, h, w), attention maps (N, heads, h, w) of queries of the images `image`
        (N,), finer maps -> logits (N, H, W), of the size of the finest map."""
        part = lambda name, i: self.get_submodule(f"{name}{i}")
        refined = lambda i, x: F.relu(part("gn", i)(part("lay", i)(x)))
        weight, bias = part("lay", 1).parameters()
        x = F.conv2d(content, weight[:, : self.dim], padding=1)[image]  # once for an image
        x = F.relu(part("gn", 1)(x + F.conv2d(maps, weight[:, self.dim :], bias, padding=1)))
        x = refined(2, x)
        for i, level in enumerate(finer, 1):
            level = part("adapter", i)(level)
            x = refined(i + 2, level[image] + F.interpolate(x, level.shape[-2:]))
        return self.out_lay(x)[:, 0]


class MaskDetector(Detector):
    """A detector, `detr`, and the mask head, under the released names. With `frozen_weights` in the
    options only the head trains."""

    def __init__(self, options: DetectorOptions, detr: Detector):
        nn.Module.__init__(self)
        self.detr, self.is_frozen = detr, options.frozen_weights is not None
        self.prepare_denoising = detr.prepare_denoising
        if self.is_frozen:
            detr.requires_grad_(False)
        # As plain attributes, or their parameters would have two names.
        self.__dict__.update(backbone=detr.backbone, transformer=detr.transformer)
        self.bbox_attention = AttentionMaps(options)
        self.mask_head = MaskHead(options, detr.num_channels[-2::-1])
        self.recompute = options.use_checkpoint

    def train(self, mode: bool = True) -> "MaskDetector":
        """A frozen detector keeps the statistics of its norms; its dropout is on, as released."""
        super().train(mode)
        for module in self.detr.modules() if self.is_frozen else ():
            module.training &= not isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    def forward(self, images: Any, targets: Any = None) -> Outputs:
        """As `Detector.forward`; the outputs are `MaskOutputs`."""
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        return cast(Outputs, MaskOutputs(self.detr(images, targets), self, images.mask))


class MaskOutputs(dict):
    """A detector's outputs, from which masks can be computed, in the same precision. The key
    "pred_masks" computes the logits of all queries (B, Q, h, w), at the finest map's size."""

    def __init__(self, outputs: Outputs, model: MaskDetector, padding: Tensor):
        """`padding` (B, H, W) is the mask of the batch."""
        super().__init__(outputs)
        self.model, self.padding, device = model, padding, padding.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.precision = partial(torch.autocast, device, dtype, enabled)

    def __missing__(self, key: str) -> Tensor:
        if key != "pred_masks":
            raise KeyError(key)
        batch_size, queries = self["pred_logits"].shape[:2]
        index = torch.arange(batch_size * queries, device=self.padding.device)
        return self.logits(index // queries, index % queries).unflatten(0, (batch_size, queries))

    def logits(self, image: Tensor, query: Tensor) -> Tensor:
        """The logits (N, h, w) of queries `query` (N,) of the images `image` (N,)."""
        encoded, model = self["encoded"], self.model
        *finer, last = (level.tensors for level in encoded.features)
        with self.precision():
            states, padding = self["states"][-1][image, query], encoded.tokens.mask
            maps = model.bbox_attention(states, encoded.memory, padding, image)
            content = encoded.tokens.content.transpose(1, 2)
            maps, content = (x.unflatten(-1, last.shape[-2:]) for x in (maps, content))
            return run(model.mask_head, model.recompute, content, maps, image, *reversed(finer))

    def enlarged(self, image: Tensor, query: Tensor) -> Tensor:
        """As `logits`, float32 and at the size of the padded image."""
        logits, size = self.logits(image, query)[:, None].float(), self.padding.shape[-2:]
        return F.interpolate(logits, size, mode="bilinear")[:, 0]

    @torch.no_grad()
    def masks(self, image: int, query: Tensor, size: Sequence[int]) -> Tensor:
        """The masks (k, *size), bool, of queries (k,) of an image without its padding."""
        inside = ~self.padding[image]
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        unique, place = query.unique(return_inverse=True)  # of a query for several classes
        parts = [torch.zeros(0, *size, dtype=torch.bool, device=query.device)]
        for part in unique.split(CHUNK) if len(unique) else ():
            found = self.enlarged(torch.full_like(part, image), part).sigmoid() > 0.5
            found = found[:, None, :height, :width].float()
            parts.append(F.interpolate(found, tuple(size))[:, 0].bool())
        return torch.cat(parts)[place]


def matched_masks(matching: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of a `Matching`: logits (N, H, W) of the last layer's queries, the targets' masks (N, H, W),
    bool, padded like the images, and whether a target has a query (N,)."""
    outputs, (image, query) = matching.layers[-1], matching.to_label
    query, found, (height, width) = query[-1], matching.found[-1], outputs.padding.shape[-2:]
    masks = [t["masks"] for t in matching.targets]
    targets = torch.cat([F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks])
    if not len(image):  # any query, without weight: DDP waits for the head's gradient
        image, query, found = image.new_zeros(1), query.new_zeros(1), found.new_zeros(1)
        targets = targets.new_zeros(1, height, width)
    return outputs.enlarged(image, query), targets, found


def mask_loss(matching: Any) -> Tensor:
    """Focal loss, (1,), the mean over an object's pixels, summed over objects."""
    logits, masks, found = matching.masks
    losses = focal_term(torch.where(masks, -logits, logits), 1.0)
    losses = losses * torch.where(masks, ALPHA, 1 - ALPHA)
    return (losses.flatten(1).mean(1) * found).sum(0, keepdim=True)


def dice_loss(matching: Any) -> Tensor:
    """1 - the Dice coefficient, smoothed by 1 pixel, (1,), summed over objects."""
    logits, masks, found = matching.masks
    p, masks = logits.sigmoid().flatten(1), masks.flatten(1)
    dice = (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return ((1 - dice) * found).sum(0, keepdim=True)


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (n, h, w), bool, as COCO's compressed RLE, fit for JSON."""
    library: Any = import_extra("pycocotools.mask", "eval")
    columns = masks.permute(0, 2, 1).contiguous().to("cpu", torch.uint8).numpy()
    rles = [library.encode(mask.T) for mask in columns]
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def decode(rles: Sequence | np.ndarray, size: Sequence[int] = (0, 0)) -> Tensor:
    """RLE as masks (n, h, w), uint8; `size` is that of none."""
    if not len(rles):
        return torch.zeros(0, *size, dtype=torch.uint8)
    library: Any = import_extra("pycocotools.mask", "eval")
    return torch.from_numpy(library.decode(list(rles))).permute(2, 0, 1).contiguous()
