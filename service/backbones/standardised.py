"""Convolutions that standardise their weights (Qiao et al., arXiv:1903.10520)."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

DEVIATION_EPS = 1e-5
C = TypeVar("C", bound=nn.Conv2d)


def like(kind: type[C], plain: nn.Conv2d) -> C:
    """A convolution of another kind with the sizes of a plain one."""
    return kind(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size[0],
        stride=plain.stride[0],
        padding=int(plain.padding[0]),
        dilation=plain.dilation[0],
        groups=plain.groups,
        bias=plain.bias is not None,
    )


class WeightStandardisedConv2d(nn.Conv2d):
    """mmcv's `ConvWS`: the weights of each output with mean 0 and deviation 1."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        flat = self.weight.flatten(1)
        centred = flat - flat.mean(dim=1, keepdim=True)
        weight = (centred / (flat.std(dim=1, keepdim=True) + DEVIATION_EPS)).view_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardise_weights(module: nn.Module, *, but: tuple[type[nn.Module], ...] = ()) -> None:
    """Put standardised convolutions in place of the plain ones inside `module`, except inside modules of `but`."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d:
            setattr(module, name, like(WeightStandardisedConv2d, child))
        elif not isinstance(child, but):
            standardise_weights(child, but=but)
