"""The blocks of mobile networks, with OpenMMLab's key names: inverted (Sandler et al., arXiv:1801.04381), fused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from service.backbones.norms import BATCH_NORM, NormSpec
from service.backbones.openmmlab import ActivationSpec, ConvModule, SqueezeExcite

NO_ACTIVATION = ActivationSpec("none")


@dataclass(frozen=True)
class ConvSpec:
    """What all convolutions of a network have in common."""

    norm: NormSpec = BATCH_NORM
    activation: ActivationSpec = ActivationSpec()  # noqa: RUF009 - frozen
    same_pad: bool = False


def conv(
    spec: ConvSpec,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: ActivationSpec | None = None,
) -> ConvModule:
    """A convolution with the network's norm, and its activation unless another is given."""
    return ConvModule(
        inputs,
        outputs,
        kernel,
        stride=stride,
        groups=groups,
        norm=spec.norm,
        activation=activation or spec.activation,
        same_pad=spec.same_pad,
    )


@dataclass(frozen=True)
class SqueezeSpec:
    """A squeeze-and-excite layer: its inner channels and its two activations."""

    hidden: int
    first: ActivationSpec
    gate: ActivationSpec

    def make(self, channels: int) -> SqueezeExcite:
        """The layer."""
        return SqueezeExcite(channels, self.hidden, first=self.first, gate=self.gate)


@dataclass(frozen=True)
class BlockSpec:
    """One block: `hidden` are its inner channels, `activation` None is the network's."""

    inputs: int
    outputs: int
    hidden: int
    kernel: int
    stride: int
    squeeze: SqueezeSpec | None = None
    activation: ActivationSpec | None = None

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


class InvertedResidual(nn.Module):
    """Expand, filter each channel, weigh, project; keys `expand_conv`, `depthwise_conv`, `se`, `linear_conv`."""

    def __init__(self, spec: ConvSpec, block: BlockSpec) -> None:
        super().__init__()
        self.block = block
        hidden, kernel, stride, act = block.hidden, block.kernel, block.stride, block.activation
        expands = hidden != block.inputs
        self.expand_conv = conv(spec, block.inputs, hidden, 1, activation=act) if expands else None
        self.depthwise_conv = conv(spec, hidden, hidden, kernel, stride=stride, groups=hidden, activation=act)
        self.se = block.squeeze.make(hidden) if block.squeeze else None
        self.linear_conv = conv(spec, hidden, block.outputs, 1, activation=NO_ACTIVATION)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        wide = self.expand_conv(maps) if self.expand_conv is not None else maps
        wide = self.depthwise_conv(wide)
        wide = self.se(wide) if self.se is not None else wide
        projected: Tensor = self.linear_conv(wide)
        return maps + projected if self.block.has_shortcut else projected


class NestedInvertedResidual(nn.Module):
    """The same without weighing, as mmpretrain's MobileNetV2 names it: keys `conv.0`, `conv.1`, `conv.2`."""

    def __init__(self, spec: ConvSpec, block: BlockSpec) -> None:
        super().__init__()
        self.block = block
        hidden = block.hidden
        steps = [conv(spec, block.inputs, hidden, 1)] if hidden != block.inputs else []
        steps.append(conv(spec, hidden, hidden, block.kernel, stride=block.stride, groups=hidden))
        steps.append(conv(spec, hidden, block.outputs, 1, activation=NO_ACTIVATION))
        self.conv = nn.Sequential(*steps)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        projected: Tensor = self.conv(maps)
        return maps + projected if self.block.has_shortcut else projected


class EdgeResidual(nn.Module):
    """Expands and filters in one convolution (Gupta and Tan, EfficientNet-EdgeTPU); keys `conv1`, `se`, `conv2`."""

    def __init__(self, spec: ConvSpec, block: BlockSpec) -> None:
        super().__init__()
        self.block = block
        self.conv1 = conv(spec, block.inputs, block.hidden, block.kernel, stride=block.stride)
        self.se = block.squeeze.make(block.hidden) if block.squeeze else None
        self.conv2 = conv(spec, block.hidden, block.outputs, 1, activation=NO_ACTIVATION)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        wide = self.conv1(maps)
        wide = self.se(wide) if self.se is not None else wide
        projected: Tensor = self.conv2(wide)
        return maps + projected if self.block.has_shortcut else projected


class SkipConv(ConvModule):
    """A convolution whose input is added where the shapes allow it, as EfficientNetV2 begins."""

    def __init__(self, spec: ConvSpec, block: BlockSpec) -> None:
        super().__init__(
            block.inputs,
            block.outputs,
            block.kernel,
            stride=block.stride,
            norm=spec.norm,
            activation=spec.activation,
            same_pad=spec.same_pad,
        )
        self.block = block

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        filtered = super().forward(maps)
        return maps + filtered if self.block.has_shortcut else filtered
