"""The heads of a decoder layer, and learned anchors."""

import math

import torch
from torch import nn

from .attention import MLP
from .dn_components import inverse_sigmoid
from .options import DetectorOptions


def class_head(options: DetectorOptions) -> nn.Linear:
    """A linear classifier; for the focal loss it initially gives every class a probability of 0.01.
    For the softmax it has one more output, for no object, and PyTorch's initial values."""
    if options.class_loss == "softmax":
        return nn.Linear(options.hidden_dim, options.num_labels + 1)
    head = nn.Linear(options.hidden_dim, options.num_labels)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(options: DetectorOptions) -> MLP:
    """Predicts the refinement (..., 4) of an anchor, initially 0."""
    head = MLP(options.hidden_dim, options.hidden_dim, 4, 3)
    for parameter in head.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def spread_centres(anchors: nn.Embedding) -> None:
    """Initialise the centres of learned anchors (Q, 4), stored before the sigmoid, uniformly over
    the image. They train: the released option means to freeze them, but does not."""
    anchors.weight[:, :2] = inverse_sigmoid(torch.rand(anchors.num_embeddings, 2))
