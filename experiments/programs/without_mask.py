"""main.py without the mask between denoising groups and matching queries: in training every query
sees every other one, and thereby the answers."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import main as program
from models import dn_components


def no_mask(num_groups: int, group_size: int, num_matching: int, device: torch.device) -> Tensor:
    size = num_groups * group_size + num_matching
    return torch.zeros(size, size, dtype=torch.bool, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    dn_components.group_mask = no_mask
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
