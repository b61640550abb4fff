"""The deformable-attention operator: `ops`, which the installed package has inside itself."""

from importlib.util import find_spec

if find_spec(f"{__package__}.ops"):
    from .ops import MSDeformAttn
else:
    from ops import MSDeformAttn

__all__ = ["MSDeformAttn"]
