"""Layers that necks share and backbones have no use for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from service.backbones.norms import NormSpec, make_norm
from service.backbones.openmmlab import ActivationSpec, make_activation

Step = Literal["conv", "norm", "act"]
Order = tuple[Step, Step, Step]
ACTIVATED_FIRST: Order = ("act", "conv", "norm")


class OrderedConv(nn.Module):
    """mmcv's convolution, norm and activation in any order; keys `conv` and the norm's kind (`bn`).

    A norm before the convolution is over what goes in. The convolution has a bias where there is no norm, unless
    `bias` says otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        order: Order,
        stride: int = 1,
        padding: int | None = None,
        bias: bool | None = None,
        norm: NormSpec | None,
        activation: ActivationSpec,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=(kernel - 1) // 2 if padding is None else padding,
            bias=norm is None if bias is None else bias,
        )
        names: dict[str, str] = {"conv": "conv", "act": "activate"}
        if norm is not None:
            names["norm"] = norm.kind
            normed_first = order.index("norm") < order.index("conv")
            self.add_module(norm.kind, make_norm(norm, inputs if normed_first else outputs))
        self.activate = make_activation(activation)
        self.steps = tuple(names[step] for step in order if step in names)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        for step in self.steps:
            maps = getattr(self, step)(maps)
        return maps


def deformed(conv: nn.Conv2d, maps: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """A convolution with its places moved and weighed (Zhu et al., arXiv:1811.11168).

    `offset` is [n, 2 * groups * places, h, w], rows before columns, and `mask` half of that, of the size that
    comes out.
    """
    from torchvision.ops import deform_conv2d

    rows, columns = conv.kernel_size
    stride = (conv.stride[0], conv.stride[1])
    padding = (rows // 2, columns // 2)
    found: Tensor = deform_conv2d(
        maps, offset, conv.weight, conv.bias, stride=stride, padding=padding, mask=mask
    )
    return found


class DeformableConv(nn.Conv2d):
    """mmcv's `DCNv2`, a deformable convolution with offsets of its own; key `conv_offset` besides a convolution's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.conv_offset = nn.Conv2d(inputs, 3 * groups * kernel * kernel, kernel, padding=kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        found = self.conv_offset(input)
        masks = found.shape[1] // 3
        return deformed(self, input, found[:, : 2 * masks], found[:, 2 * masks :].sigmoid())
