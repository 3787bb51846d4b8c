"""Layers that mmcv's transformers are made of, with mmcv's key names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.backbones.openmmlab import ActivationSpec, Scale, make_activation


class FeedForward(nn.Module):
    """Linear layers with activations between; keys `layers.0.0`, `layers.1.0`, …, and for the last `layers.1` or on."""

    def __init__(self, width: int, hidden: int, activation: ActivationSpec, *, linears: int = 2) -> None:
        super().__init__()
        widths = [width, *[hidden] * (linears - 1)]
        # mmcv nests all but the last with their activation and dropout.
        inner = [
            nn.Sequential(nn.Linear(inputs, hidden), make_activation(activation)) for inputs in widths[:-1]
        ]
        self.layers = nn.Sequential(*inner, nn.Linear(widths[-1], width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.layers(tokens)
        return projected


class PackedAttention(Scale):
    """Multi-head attention with torch's key names: `in_proj_weight`, `in_proj_bias`, `out_proj`.

    The weights of query, key and value are one behind the other.
    """

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def __init__(self, width: int, heads: int, *, bias: bool = True, out_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * width)) if bias else None)
        self.out_proj = nn.Linear(width, width, bias=out_bias)

    def start(self) -> None:
        """Glorot's uniform distribution, as torch begins."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        """[n, l, c] that attend to [n, m, c], to [n, l, c]."""
        width = tokens.shape[-1]
        query = F.linear(tokens, self.in_proj_weight[:width], self._bias(0, width))
        both = F.linear(others, self.in_proj_weight[width:], self._bias(width, 3 * width))
        parts = (query, *both.chunk(2, dim=-1))
        query, key, value = (by_head(part, self.heads) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _bias(self, start: int, end: int) -> Tensor | None:
        return None if self.in_proj_bias is None else self.in_proj_bias[start:end]


def by_head(tokens: Tensor, heads: int) -> Tensor:
    """[n, l, c] to [n, heads, l, c / heads]."""
    n, length, _ = tokens.shape
    return tokens.reshape(n, length, heads, -1).transpose(1, 2)


class MultiheadAttention(nn.Module):
    """mmcv's wrapping of torch's attention; key `attn`."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.attn = PackedAttention(width, heads, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        mixed: Tensor = self.attn(tokens, tokens)
        return mixed
