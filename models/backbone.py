"""Backbones: an image batch in, feature maps of chosen levels out."""

from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Format, PatchEmbed, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from util.config import Config
from util.errors import UserError
from util.nested_tensor import NestedTensor

NORMS = {
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
}
TIMM = "timm/"
TIMM_NORMS = {  # a timm model brings its own normalisation; only BatchNorm is exchanged
    "FrozenBatchNorm2d": freeze_batch_norm_2d,
    "BatchNorm2d": lambda body: body,
    "SyncBatchNorm": convert_sync_batchnorm,
}


class Backbone(nn.Module):
    """A ResNet of torchvision, or any timm model that gives feature maps, as `body`.

    `levels` counts from 1, the first stage of a ResNet (stride 4), to 4 (stride 32); `num_channels`
    lists the channels of the levels asked for. With pretrained weights and frozen statistics, the
    stem and the first stage of a ResNet stay as they are, as published.
    """

    def __init__(self, cfg: Config, levels: list[int]):
        super().__init__()
        if cfg.backbone.startswith(TIMM):
            body = timm_features(cfg.backbone.removeprefix(TIMM), levels, cfg.dilation)
            self.num_channels = body.feature_info.channels()
            self.body = TIMM_NORMS[cfg.batch_norm_type](body)
        else:
            width, options = 256, {"replace_stride_with_dilation": [False, False, cfg.dilation]}
            if cfg.backbone in ("resnet18", "resnet34"):
                width, options = 64, {}
            norm = NORMS[cfg.batch_norm_type]
            resnet = torchvision.models.get_model(cfg.backbone, norm_layer=norm, **options)
            stages = {f"layer{level}": str(i) for i, level in enumerate(levels)}
            self.body = IntermediateLayerGetter(resnet, return_layers=stages)
            self.num_channels = [width * 2 ** (level - 1) for level in levels]
        for name, parameter in self.body.named_parameters():
            if cfg.pretrained_backbone and name.startswith(("conv1", "bn1", "layer1")):
                parameter.requires_grad_(False)

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Images (B, 3, H, W) -> a feature map (B, C, H / stride, W / stride) and mask a level."""
        if isinstance(self.body, IntermediateLayerGetter):
            features = self.body(images.tensors).values()
        else:
            features = run_timm(self.body, images.tensors)
        return [NestedTensor(x, resize_mask(images.mask, x)) for x in features]


def timm_features(name: str, levels: list[int], dilation: bool) -> nn.Module:
    """A timm model as the feature maps of its stages, for images of any size.

    Parameters that have no part in the maps do not train. UserError where it has no such maps or
    no dilation, and where it takes images of one size only.
    """
    options = {"features_only": True, "out_indices": [level - 5 for level in levels]}
    options |= {"output_stride": 16} if dilation else {}
    try:
        try:
            body = timm.create_model(name, **options, dynamic_img_size=True)
        except TypeError:  # most models take any size without being told
            body = timm.create_model(name, **options)
        for module in body.modules():
            if isinstance(module, PatchEmbed):
                module.dynamic_img_pad = True
        with torch.enable_grad():
            total = sum(x.sum() for x in body.eval()(torch.zeros(1, 3, 96, 160)))
    except (TypeError, AssertionError, RuntimeError) as e:
        raise UserError(
            f"backbone: timm/{name} gives no feature maps for images of any size"
            f"{' with dilation' if dilation else ''} ({e}); timm/convnext_tiny does, say"
        ) from e
    parameters = [p for p in body.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
    return body.train()


def run_timm(body: nn.Module, images: Tensor) -> list[Tensor]:
    """Images (B, 3, H, W) of any size -> maps (B, C, H / stride, W / stride), rounded up."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 32, 0, -height % 32))  # some models want whole strides
    features = body(padded)
    if getattr(body, "output_fmt", None) == Format.NHWC:
        features = [x.permute(0, 3, 1, 2) for x in features]
    rows = [-(-height * x.shape[-2] // padded.shape[-2]) for x in features]
    columns = [-(-width * x.shape[-1] // padded.shape[-1]) for x in features]
    return [x[..., :m, :n] for x, m, n in zip(features, rows, columns, strict=True)]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, twice: bool) -> Tensor:
    """x through all blocks; with `twice`, what backward needs of them is computed again there."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if twice else block(x)
    return x


def resize_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The padding mask (B, H, W) at the size of the feature map `like`, nearest neighbour."""
    return F.interpolate(mask[None].float(), size=like.shape[-2:]).bool()[0]
