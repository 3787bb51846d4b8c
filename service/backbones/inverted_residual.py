"""The blocks of mobile networks, with OpenMMLab's key names: inverted (Sandler et al., arXiv:1801.04381), fused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from service.backbones.norms import BATCH_NORM, NormSpec
from service.backbones.openmmlab import ActivationSpec, ConvModule, SqueezeExcite
from service.checkpoints.layouts import KeyRule, rules

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
    """One block: `hidden` are its inner channels, `activation` None is the network's.

    `residual`: whether it has a shortcut where the shapes allow one.
    """

    inputs: int
    outputs: int
    hidden: int
    kernel: int
    stride: int
    squeeze: SqueezeSpec | None = None
    activation: ActivationSpec | None = None
    residual: bool = True

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output."""
        return self.residual and self.stride == 1 and self.inputs == self.outputs


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


# --- the same blocks by timm's names --------------------------------------------------------------

_SE = {"se.conv1.conv.{leaf}": "se.conv_reduce.{leaf}", "se.conv2.conv.{leaf}": "se.conv_expand.{leaf}"}


def _conv_names(pairs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Our convolution with its norm by timm's convolution and timm's norm."""
    found: dict[str, str] = {}
    for ours, (conv, norm) in pairs.items():
        found |= {f"{ours}conv.{{leaf}}": f"{conv}.{{leaf}}", f"{ours}bn.{{leaf}}": f"{norm}.{{leaf}}"}
    return found


# What tells the kinds apart: a name of ours, a name of theirs. The last needs none.
BLOCK_NAMES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("conv.weight", "conv.weight", _conv_names({"": ("conv", "bn1")})),
    (
        "conv1.conv.weight",
        "conv_exp.weight",
        {**_SE, **_conv_names({"conv1.": ("conv_exp", "bn1"), "conv2.": ("conv_pwl", "bn2")})},
    ),
    (
        "expand_conv.conv.weight",
        "conv_pwl.weight",
        {
            **_SE,
            **_conv_names(
                {
                    "expand_conv.": ("conv_pw", "bn1"),
                    "depthwise_conv.": ("conv_dw", "bn2"),
                    "linear_conv.": ("conv_pwl", "bn3"),
                }
            ),
        },
    ),
    (
        "",
        "",
        {**_SE, **_conv_names({"depthwise_conv.": ("conv_dw", "bn1"), "linear_conv.": ("conv_pw", "bn2")})},
    ),
)


def timm_block_rules(
    blocks: Iterable[tuple[str, str]], names: Collection[str], *, ours: bool
) -> Iterator[KeyRule]:
    """The rules of inverted residuals, each given by its prefix here and in timm; `names` are of ours, or theirs."""
    for mine, theirs in blocks:
        for own_mark, their_mark, table in BLOCK_NAMES:
            prefix, mark = (mine, own_mark) if ours else (theirs, their_mark)
            if not mark or prefix + mark in names:
                yield from rules({mine + name: theirs + other for name, other in table.items()})
                break


def stage_lengths(names: Iterable[str], pattern: str) -> list[int]:
    """How many blocks each stage has, by the names; `pattern` matches a stage's number and a block's."""
    lengths: dict[int, int] = {}
    for name in names:
        found = re.match(pattern, name)
        if found is not None:
            stage, block = int(found.group(1)), int(found.group(2))
            lengths[stage] = max(lengths.get(stage, 0), block + 1)
    return [lengths[stage] for stage in sorted(lengths)]


def counted_through(lengths: Sequence[int], first_stage: int, prefix: str) -> list[str]:
    """The prefixes of all blocks in the order of the network."""
    return [
        f"{prefix}{first_stage + stage}.{block}."
        for stage, length in enumerate(lengths)
        for block in range(length)
    ]


def not_tensorflows(checkpoint: str) -> str | None:
    """Why weights of this name are not of TensorFlow's EfficientNets, which OpenMMLab's are; None if they may be."""
    name = checkpoint.rpartition("/")[2]
    if "efficientnet" not in name or "tf_efficientnet" in name:
        return None
    return (
        "timm's efficientnet_* pad evenly and have batch norms of epsilon 1e-5; only its tf_efficientnet_* are this "
        "network"
    )
