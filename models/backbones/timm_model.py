"""Any timm model that gives feature maps for images of any size, as `timm/NAME`."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor

from ..errors import UserError
from ..options import ModelOptions
from .base import Backbone

PREFIX = "timm/"
NORMS = {  # a timm model has its own normalisation; only BatchNorm is exchanged
    "FrozenBatchNorm2d": freeze_batch_norm_2d,
    "BatchNorm2d": lambda body: body,
    "SyncBatchNorm": convert_sync_batchnorm,
}


class TimmModel(Backbone):
    """The timm model as `body`."""

    def __init__(self, options: ModelOptions, levels: list[int]):
        super().__init__()
        name = options.backbone.removeprefix(PREFIX)
        body = create_body(name, [level - 5 for level in levels], options.dilation)
        self.num_channels = body.feature_info.channels()
        self.strides = body.feature_info.reduction()
        self.body = NORMS[options.batch_norm_type](body)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Strides round up: sides that are no multiple of 32 are padded, and the maps cropped."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 32, 0, -height % 32))
        maps = self.body(padded)
        if getattr(self.body, "output_fmt", None) == Format.NHWC:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        # In positive numbers, as ONNX rounds quotients towards zero.
        up = lambda side, stride: (side + stride - 1) // stride
        sizes = [(up(height, stride), up(width, stride)) for stride in self.strides]
        return [x[..., :m, :n] for x, (m, n) in zip(maps, sizes, strict=True)]


def create_body(name: str, out_indices: list[int], dilation: bool) -> Any:
    """A timm model that returns the feature maps at `out_indices`, counted from the last, -1.

    Parameters that the maps do not depend on are frozen. UserError where the model has no such
    maps or no dilation, or accepts images of one size only.
    """
    options: dict[str, Any] = {"features_only": True, "out_indices": out_indices}
    options |= {"output_stride": 16} if dilation else {}
    try:
        try:
            body = timm.create_model(name, **options, dynamic_img_size=True)
        except TypeError:  # most models accept any size without this argument
            body = timm.create_model(name, **options)
        for module in body.modules():
            if isinstance(module, PatchEmbed):
                module.dynamic_img_pad = True  # type: ignore[misc]  # timm says Final
        with torch.enable_grad():
            total = sum(x.sum() for x in body.eval()(torch.zeros(1, 3, 96, 160)))
    except (TypeError, AssertionError, RuntimeError) as e:
        raise UserError(
            f"backbone: timm/{name} gives no feature maps for images of any size"
            f"{' with dilation' if dilation else ''} ({e}); try timm/convnext_tiny, for example"
        ) from e
    parameters = [p for p in body.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
    return body.train()
