"""The deformable-attention operator: `ops`, which the installed package has inside itself."""

from importlib.util import find_spec

if find_spec(f"{__package__}.ops"):
    from .ops import MSDeformAttn, ms_deform_attn_by_gathers
else:
    from ops import MSDeformAttn, ms_deform_attn_by_gathers

__all__ = ["MSDeformAttn", "ms_deform_attn_by_gathers"]
