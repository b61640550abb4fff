"""DAB-DETR (Liu et al. 2022) and DN-DETR (Li et al. 2022) on one feature level, dense attention."""

from torch import Tensor, nn

from util.config import Config
from util.nested_tensor import NestedTensor

from .detector import Detector, box_head, class_head, spread_centres
from .dn_components import with_indicator
from .position_encoding import SinePositionEncoding
from .transformer import Decoder, Encoder, Transformer


class DABDETR(Detector):
    """Anchors as queries, refined layer by layer; DN-DETR's content comes from `label_enc`."""

    def __init__(self, cfg: Config, backbone: nn.Module):
        super().__init__(cfg)
        dim = cfg.hidden_dim
        input_proj, self.transformer = self.make_transformer(cfg, backbone.num_channels)
        if cfg.num_patterns:
            self.transformer.patterns = nn.Embedding(cfg.num_patterns, dim)
        self.class_embed = class_head(cfg)
        self.bbox_embed = box_head(cfg)
        self.transformer.decoder.bbox_embed = self.bbox_embed
        self.refpoint_embed = nn.Embedding(cfg.num_queries, 4)
        if cfg.random_refpoints_xy:
            spread_centres(self.refpoint_embed)
        self.input_proj = input_proj
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(cfg)])
        has_denoising = cfg.modelname.startswith("dn_")
        self.label_enc = nn.Embedding(cfg.num_classes + 1, dim - 1) if has_denoising else None
        self.hidden_dim, self.num_patterns = dim, cfg.num_patterns

    def make_transformer(self, cfg: Config, channels: list[int]) -> tuple[nn.Module, nn.Module]:
        """What brings the backbone's `channels` to the width of the transformer, and that."""
        input_proj = nn.Conv2d(channels[-1], cfg.hidden_dim, kernel_size=1)
        return input_proj, Transformer(Encoder(cfg), Decoder(cfg))

    def encode(self, images: NestedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> memory and position encoding (B, S, D), and (B, 1, 1, S), False on padding."""
        features = self.backbone[0](images)[-1]
        pos = self.backbone[1](features.mask).flatten(1, 2)
        pixels = self.input_proj(features.tensors).flatten(2).transpose(1, 2)
        pos = pos.to(pixels.dtype)
        allowed = ~features.mask.flatten(1)[:, None, None, :]
        return self.transformer.encoder(pixels, pos, allowed), pos, allowed

    def queries(self, batch_size: int, *encoded) -> tuple[Tensor, Tensor, dict]:
        """As in `Detector`; with P patterns the anchors stand P times in a row, each time with
        another content."""
        anchors = self.refpoint_embed.weight.repeat(max(self.num_patterns, 1), 1)
        if self.label_enc is None:
            content = anchors.new_zeros(len(anchors), self.hidden_dim)
        else:
            content = with_indicator(self.label_enc.weight[-1:], self.hidden_dim, 0.0)
            content = content.expand(len(anchors), -1)
        if self.num_patterns:
            patterns = self.transformer.patterns.weight
            content = content + patterns.repeat_interleave(len(self.refpoint_embed.weight), dim=0)
        return content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1), {}

    def classify(self, states: Tensor) -> Tensor:
        return self.class_embed(states)
