"""Detectors and losses: tensors in, tensors out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from util.config import Config

    from .backbone import Backbone
    from .criterion import SetCriterion
    from .position_encoding import SinePositionEncoding
    from .postprocess import PostProcess

DENSE_MODELS = (
    "dab_detr",
    "dn_dab_detr",
    "dn_dab_deformable_detr_deformable_encoder_only",
)
COCO_CLASSES = 91  # COCO's category ids are its labels; the unused ones stay empty


def build_model(cfg: Config) -> tuple[nn.Module, SetCriterion, PostProcess]:
    """Build the detector, its losses and its post-processing from a config.

    `cfg.num_classes` None stands for COCO's 91. The weights are random; pretrained ones are the
    caller's business (`util.checkpoint`).
    """
    # Imported here, so that `models.dn_components` comes without everything else.
    from .backbone import Backbone
    from .convnext import CONVNEXTS, ConvNeXt
    from .criterion import SetCriterion
    from .matcher import HungarianMatcher
    from .position_encoding import SinePositionEncoding
    from .postprocess import PostProcess
    from .swin import SWINS, Swin

    levels = [index + 1 for index in cfg.return_interm_indices]
    if cfg.backbone in (*SWINS, *CONVNEXTS):
        family = Swin if cfg.backbone in SWINS else ConvNeXt
        backbone = family(cfg.backbone, levels, cfg.use_checkpoint)
        if cfg.lr_backbone == 0:
            backbone.requires_grad_(False)
    else:
        backbone = Backbone(
            cfg.backbone,
            levels,
            dilation=cfg.dilation,
            norm=cfg.batch_norm_type,
            freeze_stem=cfg.pretrained_backbone,
            trainable=cfg.lr_backbone > 0,
        )
    for name, parameter in backbone.named_parameters():
        if any(keyword in name for keyword in cfg.backbone_freeze_keywords):
            parameter.requires_grad_(False)
    position_encoding = SinePositionEncoding(
        cfg.hidden_dim, cfg.pe_temperatureH, cfg.pe_temperatureW, cfg.pe_offset
    )
    build = build_dense if cfg.modelname in DENSE_MODELS else build_deformable
    model = build(cfg, backbone, position_encoding)
    matcher = HungarianMatcher(
        cfg.set_cost_class, cfg.set_cost_bbox, cfg.set_cost_giou, cfg.focal_alpha
    )
    criterion = SetCriterion(matcher, loss_weights(cfg), cfg.focal_alpha)
    return model, criterion, PostProcess(cfg.num_select)


def build_dense(
    cfg: Config, backbone: Backbone, position_encoding: SinePositionEncoding
) -> nn.Module:
    """DAB-DETR and DN-DETR, on one level or, with a deformable encoder, on several."""
    from torch import nn

    from .dab_detr import DABDETR
    from .deformable_detr import DeformableEncoderDABDETR, InputProjection
    from .deformable_transformer import DeformableEncoder
    from .transformer import Decoder, Encoder, MultiLevelDecoderLayer, Transformer

    layer_args = layer_sizes(cfg)
    if cfg.modelname in ("dab_detr", "dn_dab_detr"):
        detector, num_levels = DABDETR, None
        input_proj = nn.Conv2d(backbone.num_channels[-1], cfg.hidden_dim, kernel_size=1)
        encoder = Encoder(cfg.enc_layers, *layer_args)
        decoder = Decoder(cfg.dec_layers, *layer_args)
    else:
        detector, num_levels = DeformableEncoderDABDETR, cfg.num_feature_levels
        input_proj = InputProjection(backbone.num_channels, num_levels, cfg.hidden_dim)
        encoder = DeformableEncoder(cfg.enc_layers, *layer_args, num_levels, cfg.enc_n_points)
        layer = partial(MultiLevelDecoderLayer, num_levels=num_levels)
        decoder = Decoder(cfg.dec_layers, *layer_args, layer=layer)
    return detector(
        backbone,
        position_encoding,
        input_proj,
        Transformer(encoder, decoder, cfg.hidden_dim, cfg.num_patterns, num_levels),
        cfg.hidden_dim,
        cfg.num_classes or COCO_CLASSES,
        cfg.num_queries,
        cfg.num_patterns,
        has_denoising=cfg.modelname.startswith("dn_"),
        prepare_denoising=denoising(cfg),
    )


def build_deformable(
    cfg: Config, backbone: Backbone, position_encoding: SinePositionEncoding
) -> nn.Module:
    """DAB-Deformable-DETR, DN-Deformable-DETR and DINO."""
    from .deformable_detr import DeformableDETR, DeformableTransformer
    from .deformable_transformer import DeformableDecoder, DeformableEncoder

    is_dino = cfg.modelname == "dino"
    layer_args = (*layer_sizes(cfg), cfg.num_feature_levels)
    decoder = DeformableDecoder(
        cfg.dec_layers,
        *layer_args,
        cfg.dec_n_points,
        final_norm=is_dino,
        scales_queries=not is_dino,
        look_forward_twice=cfg.look_forward_twice,
    )
    transformer = DeformableTransformer(
        DeformableEncoder(cfg.enc_layers, *layer_args, cfg.enc_n_points),
        decoder,
        cfg.num_feature_levels,
        cfg.hidden_dim,
        selects_tokens=cfg.query_selection != "static",
    )
    num_classes = cfg.num_classes or COCO_CLASSES
    label_rows = None
    if is_dino:
        label_rows = cfg.dn_labelbook_size or num_classes
    elif cfg.modelname.startswith("dn_"):
        label_rows = num_classes
    return DeformableDETR(
        backbone,
        position_encoding,
        transformer,
        cfg.hidden_dim,
        cfg.num_feature_levels,
        num_classes,
        cfg.num_queries,
        selection=cfg.query_selection,
        is_dino=is_dino,
        shares_heads=(
            cfg.dec_pred_class_embed_share,
            cfg.dec_pred_bbox_embed_share,
            cfg.two_stage_class_embed_share,
            cfg.two_stage_bbox_embed_share,
        ),
        label_rows=label_rows,
        prepare_denoising=denoising(cfg),
    )


def layer_sizes(cfg: Config) -> tuple:
    """What every layer of an encoder or a decoder is made with."""
    return (
        cfg.hidden_dim,
        cfg.nheads,
        cfg.dim_feedforward,
        cfg.dropout,
        cfg.transformer_activation,
    )


def denoising(cfg: Config) -> Callable | None:
    """What puts denoising queries in front of the others, with its noise set; None without."""
    from .dn_components import prepare_for_cdn, prepare_for_cdn_of_dn_detr, prepare_for_dn

    if not cfg.use_dn:
        return None
    noise = {
        "label_noise_ratio": cfg.dn_label_noise_ratio,
        "box_noise_scale": cfg.dn_box_noise_scale,
    }
    if not cfg.contrastive:
        return partial(prepare_for_dn, num_groups=cfg.dn_number, **noise)
    if cfg.modelname == "dn_dab_dino_deformable_detr":
        return partial(prepare_for_cdn_of_dn_detr, num_denoising=cfg.dn_number, **noise)
    num_classes = cfg.num_classes or COCO_CLASSES
    # DINO's released code doubles the number that it is given.
    return partial(
        prepare_for_cdn, num_denoising=2 * cfg.dn_number, num_classes=num_classes, **noise
    )


def loss_weights(cfg: Config) -> dict[str, float]:
    """{loss name: weight} of every loss that the config trains with."""
    terms = {
        "loss_ce": cfg.cls_loss_coef,
        "loss_bbox": cfg.bbox_loss_coef,
        "loss_giou": cfg.giou_loss_coef,
    }
    parts = ["", "_dn"] if cfg.use_dn else [""]
    layers = ["", *(f"_{i}" for i in range(cfg.dec_layers - 1) if cfg.aux_loss)]
    weights = {
        f"{k}{part}{layer}": w for layer in layers for part in parts for k, w in terms.items()
    }
    if cfg.query_selection != "static":
        tokens = "_interm" if cfg.modelname == "dino" else "_enc"
        return weights | {f"{k}{tokens}": w for k, w in terms.items()}
    return weights
