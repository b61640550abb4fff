"""Multi-scale deformable attention: one Python entry, three backends. See README.md."""

from .ms_deform_attn import BACKENDS, MSDeformAttn, choose_backend, ms_deform_attn
from .reference import ms_deform_attn_by_gathers, ms_deform_attn_reference

__all__ = [
    "BACKENDS",
    "MSDeformAttn",
    "choose_backend",
    "ms_deform_attn",
    "ms_deform_attn_by_gathers",
    "ms_deform_attn_reference",
]
