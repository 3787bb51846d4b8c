"""ResNet with detectron2's key names, which are also detrex's: `stem.conv1.norm.weight`, `res2.0.conv1.weight`.

The network takes a neutral `ResNetSpec`, block by block; `detectron2_configs` has the spellings of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Backbone
from service.backbones.caffe2_names import is_caffe2, renamed, with_statistics
from service.backbones.freezing import is_under, norm_names
from service.backbones.norms import BATCH_NORMS, GroupNorm
from service.checkpoints.load import load_strict
from service.config.spec import FeatureInfo, Freeze, FreezeReport, LoadedKeys, WeightsRef

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NormKind = Literal["frozen", "bn", "gn", "ln", "none"]
BlockKind = Literal["basic", "bottleneck", "deform"]
GROUPS_OF_NORM = 32
STEM_STRIDE = 4


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose weight, bias and statistics are all constants: buffers, no parameters."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        self.weight.fill_(1)
        self.bias.zero_()
        self.running_mean.zero_()
        self.running_var.fill_(1 - self.eps)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return nn.functional.batch_norm(
            maps, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORM_MAKERS: dict[NormKind, Callable[[int], nn.Module | None]] = {
    "frozen": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "gn": lambda channels: GroupNorm(GROUPS_OF_NORM, channels),
    "ln": lambda channels: ChannelNorm(channels, eps=1e-6),
    "none": lambda _: None,
}
INITIALISED_NORMS = (*BATCH_NORMS, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class StemSpec:
    """A 7x7 convolution of stride 2, a norm, and a max pool of stride 2."""

    inputs: int
    outputs: int
    norm: NormKind


@dataclass(frozen=True)
class BlockSpec:
    """One residual block. `width` is the channels of a bottleneck's 3x3; a basic block has none of its own."""

    kind: BlockKind
    inputs: int
    outputs: int
    width: int
    norm: NormKind
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    stride_in_1x1: bool = False
    modulated: bool = False
    deform_groups: int = 1


@dataclass(frozen=True)
class ResNetSpec:
    """What decides the network's numbers and the names of its weights: only the stages that are built."""

    stem: StemSpec
    stages: tuple[tuple[BlockSpec, ...], ...]
    classes: int | None = None

    def features(self) -> tuple[FeatureInfo, ...]:
        """`stem`, `res2` and on, `linear`; indices in that order."""
        stride, found = STEM_STRIDE, [FeatureInfo(0, "stem", self.stem.outputs, STEM_STRIDE, "NCHW")]
        for position, blocks in enumerate(self.stages, start=1):
            stride *= math.prod(block.stride for block in blocks)
            found.append(FeatureInfo(position, stage_name(position), blocks[-1].outputs, stride, "NCHW"))
        if self.classes is not None:
            found.append(FeatureInfo(len(found), "linear", self.classes, None, "NC"))
        return tuple(found)


def stage_name(position: int) -> str:
    """What the libraries call the stage of a position that counts the stem as 0: 1 is `res2`."""
    return f"res{position + 1}"


# --- the network ----------------------------------------------------------------------------------


class NormedConv(nn.Conv2d):
    """A convolution and the norm behind it, whose keys are below the convolution's."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int,
        norm: NormKind,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        padding = side // 2 * dilation
        super().__init__(inputs, outputs, side, stride, padding, dilation, groups, bias)
        self.norm = NORM_MAKERS[norm](outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        return self.normed(super().forward(maps))

    def normed(self, maps: Tensor) -> Tensor:
        """Behind the norm, where there is one."""
        return maps if self.norm is None else cast("Tensor", self.norm(maps))


class DeformableConv(NormedConv):
    """A convolution that samples where offsets say: deformable, with a mask modulated deformable."""

    def deformed(self, maps: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Offsets are [n, 2 * groups * places, h, w], the mask half of that."""
        from torchvision.ops import deform_conv2d

        found: Tensor = deform_conv2d(
            maps,
            offset,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )
        return self.normed(found)


class Stem(nn.Module):
    """`BasicStem`."""

    def __init__(self, spec: StemSpec) -> None:
        super().__init__()
        self.conv1 = NormedConv(spec.inputs, spec.outputs, 7, spec.norm, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / 4, w / 4]."""
        return nn.functional.max_pool2d(torch.relu_(self.conv1(images)), 3, stride=2, padding=1)


class _Block(nn.Module):
    """The shortcut that all blocks have: a projection where the channels change, else the input itself."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        projected = spec.inputs != spec.outputs
        self.shortcut = (
            NormedConv(spec.inputs, spec.outputs, 1, spec.norm, stride=spec.stride) if projected else None
        )

    def _added(self, maps: Tensor, inputs: Tensor) -> Tensor:
        return torch.relu_(maps + (inputs if self.shortcut is None else self.shortcut(inputs)))


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.conv1 = NormedConv(spec.inputs, spec.outputs, 3, spec.norm, stride=spec.stride)
        self.conv2 = NormedConv(spec.outputs, spec.outputs, 3, spec.norm)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        return self._added(self.conv2(torch.relu_(self.conv1(maps))), maps)


class BottleneckBlock(_Block):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 may be deformable, with offsets of a convolution of its own."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        first, second = (spec.stride, 1) if spec.stride_in_1x1 else (1, spec.stride)
        kind = DeformableConv if spec.kind == "deform" else NormedConv
        self.modulated = spec.modulated
        self.conv1 = NormedConv(spec.inputs, spec.width, 1, spec.norm, stride=first)
        self.conv2_offset = _offsets(spec, second) if spec.kind == "deform" else None
        self.conv2 = kind(
            spec.width,
            spec.width,
            3,
            spec.norm,
            stride=second,
            dilation=spec.dilation,
            groups=spec.groups,
        )
        self.conv3 = NormedConv(spec.width, spec.outputs, 1, spec.norm)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        inner = torch.relu_(self._middle(torch.relu_(self.conv1(maps))))
        return self._added(self.conv3(inner), maps)

    def _middle(self, maps: Tensor) -> Tensor:
        if self.conv2_offset is None:
            return cast("Tensor", self.conv2(maps))
        offset, mask = self.conv2_offset(maps), None
        if self.modulated:
            first, second, mask = torch.chunk(offset, 3, dim=1)
            offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        return cast("DeformableConv", self.conv2).deformed(maps, offset, mask)


def _offsets(spec: BlockSpec, stride: int) -> NormedConv:
    """Two numbers for each of nine places, a third to modulate it."""
    outputs = (27 if spec.modulated else 18) * spec.deform_groups
    return NormedConv(spec.width, outputs, 3, "none", stride=stride, dilation=spec.dilation, bias=True)


BLOCKS: dict[BlockKind, Callable[[BlockSpec], nn.Module]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
    "deform": BottleneckBlock,
}


class ResNet(Backbone):
    """A ResNet whose state dict has detectron2's keys."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = Stem(spec.stem)
        self.stages = [stage_name(position) for position in range(1, len(spec.stages) + 1)]
        for name, blocks in zip(self.stages, spec.stages, strict=True):
            self.add_module(name, nn.Sequential(*(BLOCKS[block.kind](block) for block in blocks)))
        channels = spec.stages[-1][-1].outputs if spec.stages else spec.stem.outputs
        self.linear = None if spec.classes is None else nn.Linear(channels, spec.classes)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The features in `nodes`; stops after the deepest of them."""
        wanted = set(nodes)
        maps = self.stem(images)
        found = {"stem": maps}
        for name in self.stages:
            if wanted <= found.keys():
                break
            maps = getattr(self, name)(maps)
            found[name] = maps
        if self.linear is not None and "linear" in wanted:
            found["linear"] = self.linear(maps.mean(dim=(2, 3)))
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """detectron2's rule: 1 is the stem, k the stem and `res2` to `res{k}`.

        Batch norms of what is frozen become frozen ones, whose weight and bias are no parameters any more; those
        of `norm="FrozenBN"` are from the start. Other norms stay norms, without gradient.
        """
        stages = freeze.stages or 0
        roots = ["stem"] * (stages >= 1) + [f"res{number}" for number in range(2, stages + 1)]
        return with_frozen_norms(self, freeze, roots)


def with_frozen_norms(network: nn.Module, freeze: Freeze, roots: Sequence[str]) -> FreezeReport:
    """The report for a network whose modules `roots` are frozen, their batch norms made constants."""
    turned = [name for name in norm_names(network, BATCH_NORMS) if is_under(name, roots)]
    norms = {*turned, *norm_names(network, (FrozenBatchNorm2d,))}
    left = [name for name, _ in network.named_parameters() if name.rpartition(".")[0] not in norms]
    return FreezeReport(
        stages=freeze.stages,
        parameters=tuple(name for name in left if is_under(name, roots)),
        norms=tuple(name for name, _ in network.named_modules() if name in norms),
        of=len(left),
    )


def initialise(network: nn.Module) -> None:
    """Kaiming normal (fan out) for convolutions, 0 for offsets, 1 and 0 for norms."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            _initialise_convolution(module, is_offset=name.endswith("_offset"))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, INITIALISED_NORMS):
            cast("Any", module).reset_parameters()


def _initialise_convolution(module: nn.Conv2d, *, is_offset: bool) -> None:
    if is_offset:
        nn.init.zeros_(module.weight)
    else:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def build(spec: ResNetSpec) -> ResNet:
    """The network with random weights."""
    network = building.unset(lambda: ResNet(spec))
    initialise(network)
    return network


def load(spec: ResNetSpec, state: StateDict, ref: WeightsRef) -> tuple[ResNet, LoadedKeys]:
    """The network with the tensors of a checkpoint that has detectron2's names, or Caffe2's."""
    network = building.unset(lambda: ResNet(spec))
    if is_caffe2(state):
        named = renamed(state, network.state_dict(), pointer=ref.pointer)
        state = with_statistics(named, norm_names(network, (FrozenBatchNorm2d,)))
    return network, load_strict(network, state, ref)
