"""`python -m ops` lists the available backends and the default ones."""

import torch

from . import native
from .ms_deform_attn import choose_backend

print("reference  PyTorch, always available")
for backend in ("cpp", "cuda"):
    try:
        variants = f" ({', '.join(native.cpu_variants())})" if backend == "cpp" else ""
        print(f"{backend:<9}  {native.load(backend)._name}{variants}")
    except native.Unavailable as problem:
        print(f"{backend:<9}  unavailable: {problem}")
for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
    print(f"tensors on {device} use: {choose_backend(torch.device(device))}")
