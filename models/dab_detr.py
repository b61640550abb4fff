"""DAB-DETR (Liu et al. 2022) and DN-DETR (Li et al. 2022): one feature level, dense attention."""

from torch import Tensor, nn

from .backbones import Backbone
from .detector import Encoded, Queries
from .detr import DenseDetector
from .dn_components import with_indicator
from .heads import box_head, class_head, spread_centres
from .options import DetectorOptions
from .position_encoding import SinePositionEncoding
from .transformer import Decoded, Decoder, Encoder, Transformer


class DABDETR(DenseDetector):
    """Learned anchors as queries, refined layer by layer; the content starts at zero."""

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        input_proj, self.transformer = self.make_transformer(options)
        if options.num_patterns:
            self.transformer.patterns = nn.Embedding(options.num_patterns, options.hidden_dim)
        self.class_embed = class_head(options)
        self.bbox_embed = box_head(options)
        self.transformer.decoder.bbox_embed = self.bbox_embed
        self.refpoint_embed = nn.Embedding(options.num_queries, 4)
        if options.random_refpoints_xy:
            spread_centres(self.refpoint_embed)
        self.input_proj = input_proj
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(options)])
        self.hidden_dim, self.num_patterns = options.hidden_dim, options.num_patterns

    def make_transformer(self, options: DetectorOptions) -> tuple[nn.Module, nn.Module]:
        """The projection of the backbone's channels to the transformer's width, and that."""
        input_proj = nn.Conv2d(self.num_channels[-1], options.hidden_dim, kernel_size=1)
        return input_proj, Transformer(Encoder(options), Decoder(options))

    def initial_content(self) -> Tensor:
        """The queries' content (1, D) before patterns are added."""
        return self.refpoint_embed.weight.new_zeros(1, self.hidden_dim)

    def queries(self, encoded: Encoded) -> Queries:
        """With P patterns, the anchors are repeated P times, each time with another content."""
        num_anchors = len(self.refpoint_embed.weight)
        anchors = self.refpoint_embed.weight.repeat(max(self.num_patterns, 1), 1)
        content = self.initial_content().expand(len(anchors), -1)
        if self.num_patterns:
            patterns = self.transformer.patterns.weight
            content = content + patterns.repeat_interleave(num_anchors, dim=0)
        batch_size = encoded.memory.shape[0]  # len() would make it a constant of an export
        return Queries(
            content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1), outputs={}
        )

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        tokens = encoded.tokens
        memory = encoded.memory, tokens.pos, tokens.mask
        return self.transformer.decoder(content, anchors, blocked, *memory)


class DNDETR(DABDETR):
    """DAB-DETR with denoising. The content of all queries is a label embedding and the indicator
    that tells denoising queries; `label_enc`'s last row is that of matching queries."""

    has_denoising = True
    label_enc: nn.Embedding

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        self.label_enc = nn.Embedding(options.num_labels + 1, options.hidden_dim - 1)

    def initial_content(self) -> Tensor:
        return with_indicator(self.label_enc.weight[-1:], self.hidden_dim, 0.0)
