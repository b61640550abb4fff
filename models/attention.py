"""Multi-head attention through `scaled_dot_product_attention`, the MLP, the feed-forward block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deformable_attention import MSDeformAttn
from .options import ModelOptions

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "prelu": nn.PReLU}


class MLP(nn.Module):
    """Linear layers with ReLU between them; `hidden_dim` is the width of the hidden layers."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def additive_mask(blocked: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask, bool, True where a query must not see a key, as `scaled_dot_product_attention` adds
    it: made once for all layers, which would each keep a converted copy for the backward pass."""
    if blocked is None:
        return None
    return torch.zeros_like(blocked, dtype=like.dtype).masked_fill_(blocked, -torch.inf)


class Attention(nn.Module):
    """Attention over already projected queries, keys and values, and the output projection."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.num_heads, self.dropout = options.nheads, nn.Dropout(options.dropout)
        out_proj = nn.Linear(options.hidden_dim, options.hidden_dim)
        nn.init.zeros_(out_proj.bias)
        self.out_proj: nn.Module = out_proj

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, Q, E), key (B, K, E), value (B, K, D) -> (B, Q, D).

        `mask`: from `additive_mask`, broadcasts to (B, heads, Q, K).
        """
        out = F.scaled_dot_product_attention(
            self.split_heads(query),
            self.split_heads(key),
            self.split_heads(value),
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MultiheadAttention(Attention):
    """Attention with its input projections; parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, options: ModelOptions, num_inputs: int = 3):
        super().__init__(options)
        dim = options.hidden_dim
        self.in_proj_weight = nn.Parameter(torch.empty(num_inputs * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(num_inputs * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.forward`, all inputs (B, N, D). If query and key are the same tensor, they
        are projected in one product."""
        dim = value.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:
            query, key = F.linear(query, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, dim=-1)
        else:
            query = F.linear(query, weight[:dim], bias[:dim])
            key = F.linear(key, weight[dim : 2 * dim], bias[dim : 2 * dim])
        value = F.linear(value, weight[2 * dim :], bias[2 * dim :])
        return super().forward(query, key, value, mask)


class FeedForward(nn.Module):
    """Base of transformer layers: the feed-forward block. The norm after it belongs to the
    subclass, as in the released models."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.linear1 = nn.Linear(options.hidden_dim, options.dim_feedforward)
        self.linear2 = nn.Linear(options.dim_feedforward, options.hidden_dim)
        self.activation = ACTIVATIONS[options.transformer_activation]()
        self.dropout = nn.Dropout(options.dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


def xavier_matrices(module: nn.Module) -> None:
    """Xavier initialisation of every matrix inside `module`, embeddings included."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def init_transformer(module: nn.Module) -> None:
    """Xavier initialisation of every matrix inside `module`, except that deformable attention keeps
    its own initial values."""
    xavier_matrices(module)
    for part in module.modules():
        if isinstance(part, MSDeformAttn):
            part.reset_parameters()
