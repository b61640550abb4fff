"""DINO (Zhang et al. 2022), as its difference from DN-Deformable-DETR.

Contrastive denoising, mixed query selection and look forward twice are options of DAB-Deformable
and DN-Deformable-DETR too, which DINO enables in `implied` and in its configs. This file has the
rest: separate heads for the tokens, their score and their losses, a label embedding without
indicator, and a decoder with a final norm.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .attention import xavier_matrices
from .deformable_detr import DABDeformableDETR, DNDeformableDETR, layer_heads
from .deformable_transformer import DeformableDecoder
from .detector import LayerOutputs
from .dn_components import prepare_for_cdn_of_dn_detr
from .options import DetectorOptions
from .query_selection import Selection


class DINO(DABDeformableDETR):
    """DINO as in its authors' code."""

    implied = {"contrastive": True, "look_forward_twice": True, "dn_num_boxes": "mean"}
    has_denoising = True
    token_losses = "_interm"
    trains_all_tokens = False

    def make_denoising(self, options: DetectorOptions) -> Callable:
        """As released, with twice the given number."""
        return super().make_denoising(dataclasses.replace(options, dn_number=2 * options.dn_number))

    def make_decoder(self, options: DetectorOptions) -> DeformableDecoder:
        return DeformableDecoder(options, final_norm=True, scale_queries=False)

    def make_heads(self, options: DetectorOptions) -> None:
        """The tokens have heads of their own, initially equal to the first layer's."""
        transformer = self.transformer
        self.class_embed, self.bbox_embed = layer_heads(options, options.dec_layers)
        transformer.decoder.bbox_embed = self.bbox_embed
        transformer.decoder.class_embed = self.class_embed
        if self.selection != "static":
            pick = lambda head, is_shared: head if is_shared else copy.deepcopy(head)
            shares = options.two_stage_class_embed_share, options.two_stage_bbox_embed_share
            transformer.enc_out_class_embed = pick(self.class_embed[0], shares[0])
            transformer.enc_out_bbox_embed = pick(self.bbox_embed[0], shares[1])

    def make_label_embedding(self, options: DetectorOptions) -> nn.Embedding:
        """As wide as the transformer, without an indicator."""
        num_labels = options.dn_labelbook_size or options.num_labels
        label_enc = nn.Embedding(num_labels + 1, options.hidden_dim)
        return label_enc.requires_grad_(options.use_dn)

    def make_learned_queries(self, options: DetectorOptions) -> None:
        super().make_learned_queries(options)
        xavier_matrices(self.tgt_embed)
        xavier_matrices(self.refpoint_embed)

    def token_heads(self) -> tuple[nn.Module, nn.Module]:
        return self.transformer.enc_out_class_embed, self.transformer.enc_out_bbox_embed

    def token_score(self, logits: Tensor) -> Tensor:
        """The logit of the best class."""
        return logits.amax(-1)

    def token_outputs(self, selected: Selection) -> dict[str, LayerOutputs]:
        """Only the selected tokens are trained, like the queries of a decoder layer."""
        outputs: LayerOutputs = {
            "pred_logits": selected.logits,
            "pred_boxes": selected.boxes.sigmoid(),
        }
        return {"interm_outputs": outputs}


class DINOOfDNDETR(DNDeformableDETR):
    """DINO as in DN-DETR's code: DN-Deformable-DETR with query selection, look forward twice and
    that code's contrastive denoising."""

    def make_denoising(self, options: DetectorOptions) -> Callable:
        if not options.contrastive:
            return super().make_denoising(options)
        number, noise = options.dn_number, self.noise(options)
        return partial(prepare_for_cdn_of_dn_detr, num_denoising=number, **noise)
