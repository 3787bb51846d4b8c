"""ResNet (He et al., arXiv:1512.03385) with OpenMMLab's key names: depths 18 to 152.

`ResNet` takes a neutral `ResNetSpec`; each spelling of it is a config class of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import (
    Backbone,
    BackboneConfig,
    DropRate,
    Family,
    Indices,
    InputChannels,
    Stride,
    levels_by_index,
    levels_by_stride,
)
from service.backbones.freezing import freeze_report
from service.backbones.norms import BATCH_NORM, NORMS, NormConfig, NormSpec, make_norm
from service.checkpoints.load import load_strict
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, LoadedKeys, WeightsRef

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

BlockKind = Literal["basic", "bottleneck"]
DEPTHS: dict[int, tuple[BlockKind, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
EXPANSIONS: dict[BlockKind, int] = {"basic": 1, "bottleneck": 4}
STEM_STRIDE = 4
STAGE_STRIDES = (1, 2, 2, 2)


@dataclass(frozen=True)
class ResNetSpec:
    """What decides a ResNet's numbers and the names of its weights.

    `widths` are the output channels of the stages. `stride_on_1x1` is OpenMMLab's `style="caffe"`: a
    bottleneck strides on its first 1x1 convolution instead of its 3x3.
    """

    block: BlockKind
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    expansion: int
    in_channels: int = 3
    stem_channels: int = 64
    deep_stem: bool = False
    avg_down: bool = False
    stride_on_1x1: bool = False
    norm: NormSpec = BATCH_NORM

    def features(self) -> tuple[FeatureInfo, ...]:
        """One feature a stage, node and index counted from 0 at `layer1`."""
        strides = [STEM_STRIDE * math.prod(self.strides[: stage + 1]) for stage in range(len(self.strides))]
        return tuple(
            FeatureInfo(stage, str(stage), width, stride, "NCHW")
            for stage, (width, stride) in enumerate(zip(self.widths, strides, strict=True))
        )

    def norm_widths(self) -> tuple[int, ...]:
        """Every channel count that a norm layer is put on."""
        stem = (self.stem_channels, self.stem_channels // 2) if self.deep_stem else (self.stem_channels,)
        return (*stem, *(width // self.expansion for width in self.widths), *self.widths)


def _conv3x3(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _conv1x1(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class ResidualBlock(nn.Module):
    """Convolutions and norms `conv1, bn1, conv2, …` around a shortcut; a norm's key starts with its kind."""

    def __init__(
        self, convolutions: Sequence[nn.Conv2d], norm: NormSpec, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self._steps: list[tuple[str, str]] = []
        for position, convolution in enumerate(convolutions, start=1):
            names = (f"conv{position}", f"{norm.kind}{position}")
            self.add_module(names[0], convolution)
            self.add_module(names[1], make_norm(norm, convolution.out_channels))
            self._steps.append(names)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        for conv_name, norm_name in self._steps[:-1]:
            maps = torch.relu_(getattr(self, norm_name)(getattr(self, conv_name)(maps)))
        conv_name, norm_name = self._steps[-1]
        maps = getattr(self, norm_name)(getattr(self, conv_name)(maps))
        return torch.relu_(maps + shortcut)


def _basic(spec: ResNetSpec, inputs: int, outputs: int, stride: int, dilation: int) -> list[nn.Conv2d]:
    width = outputs // spec.expansion
    # OpenMMLab dilates only the first convolution of a basic block.
    return [_conv3x3(inputs, width, stride=stride, dilation=dilation), _conv3x3(width, outputs)]


def _bottleneck(spec: ResNetSpec, inputs: int, outputs: int, stride: int, dilation: int) -> list[nn.Conv2d]:
    width = outputs // spec.expansion
    first, second = (stride, 1) if spec.stride_on_1x1 else (1, stride)
    return [
        _conv1x1(inputs, width, stride=first),
        _conv3x3(width, width, stride=second, dilation=dilation),
        _conv1x1(width, outputs),
    ]


CONVOLUTIONS = {"basic": _basic, "bottleneck": _bottleneck}


def _downsample(spec: ResNetSpec, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """The projection of a stage's first shortcut; `avg_down` pools before it instead of striding in it."""
    if stride == 1 and inputs == outputs:
        return None
    pool = spec.avg_down and stride != 1
    steps: list[nn.Module] = [_shortcut_pool(stride)] if pool else []
    steps += [_conv1x1(inputs, outputs, stride=1 if pool else stride), make_norm(spec.norm, outputs)]
    return nn.Sequential(*steps)


def _shortcut_pool(stride: int) -> nn.Module:
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)


def _stage(spec: ResNetSpec, stage: int, inputs: int) -> nn.Sequential:
    outputs, dilation = spec.widths[stage], spec.dilations[stage]
    blocks = []
    for position in range(spec.blocks[stage]):
        stride = spec.strides[stage] if position == 0 else 1
        convolutions = CONVOLUTIONS[spec.block](spec, inputs, outputs, stride, dilation)
        downsample = _downsample(spec, inputs, outputs, stride) if position == 0 else None
        blocks.append(ResidualBlock(convolutions, spec.norm, downsample))
        inputs = outputs
    return nn.Sequential(*blocks)


def _deep_stem(spec: ResNetSpec) -> nn.Sequential:
    """Three 3x3 convolutions in place of the 7x7; keys `stem.{0,1,2}.{conv,bn}`."""
    half = spec.stem_channels // 2
    steps = ((spec.in_channels, half, 2), (half, half, 1), (half, spec.stem_channels, 1))
    return nn.Sequential(*(_stem_step(spec.norm, *step) for step in steps))


def _stem_step(norm: NormSpec, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = _conv3x3(inputs, outputs, stride=stride)
    layers = {"conv": convolution, norm.kind: make_norm(norm, outputs), "activate": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(layers))


class ResNet(Backbone):
    """A ResNet whose state dict has OpenMMLab's keys."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.stem_names = self._add_stem()
        inputs = spec.stem_channels
        for stage, width in enumerate(spec.widths):
            self.add_module(f"layer{stage + 1}", _stage(spec, stage, inputs))
            inputs = width

    def _add_stem(self) -> tuple[str, ...]:
        """Add the stem; returns the names of its modules, in order."""
        spec, norm_name = self.spec, f"{self.spec.norm.kind}1"
        if spec.deep_stem:
            self.stem = _deep_stem(spec)
            return ("stem",)
        self.conv1 = nn.Conv2d(spec.in_channels, spec.stem_channels, 7, stride=2, padding=3, bias=False)
        self.add_module(norm_name, make_norm(spec.norm, spec.stem_channels))
        return ("conv1", norm_name)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps = images
        for name in self.stem_names:
            maps = getattr(self, name)(maps)
        maps = nn.functional.max_pool2d(torch.relu_(maps), 3, stride=2, padding=1)
        found = {}
        for stage in range(max(int(node) for node in nodes) + 1):
            maps = getattr(self, f"layer{stage + 1}")(maps)
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """OpenMMLab's rule: 0 is the stem, k the stem and `layer1` to `layer{k}`; their norms are in eval."""
        if freeze.stages is None or freeze.stages < 0:
            return freeze_report(self, freeze, ())
        layers = (f"layer{stage}" for stage in range(1, freeze.stages + 1))
        return freeze_report(self, freeze, (*self.stem_names, *layers))


def initialise(network: nn.Module) -> None:
    """Kaiming normal (fan out) for convolutions, 1 and 0 for norms, as OpenMMLab starts training.

    The last norm of a block is not zeroed (`zero_init_residual`): that would make every block an identity.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, NORMS):
            module.reset_parameters()


# --- mmpretrain.ResNet = mmcls.ResNet -------------------------------------------------------------

Channels = Annotated[int, Field(strict=True, ge=1, le=512)]
Dilation = Annotated[int, Field(strict=True, ge=1, le=16)]


class ConvConfig(BaseModel):
    """OpenMMLab's `conv_cfg`; only the plain convolution is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv"]


class ResNetConfig(BackboneConfig):
    """`mmpretrain.ResNet`, which is also `mmcls.ResNet`."""

    TYPE: ClassVar[str] = "mmpretrain.ResNet"

    depth: Literal[18, 34, 50, 101, 152] = Field(description="Number of layers.")
    in_channels: InputChannels = 3
    stem_channels: Channels = 64
    base_channels: Channels = Field(64, description="Channels of the first stage before expansion.")
    expansion: Annotated[int, Field(strict=True, ge=1, le=8)] | None = Field(
        None, description="Output channels of a block over its inner ones; null is 1 (18, 34) or 4."
    )
    num_stages: Annotated[int, Field(strict=True, ge=1, le=4)] = 4
    strides: tuple[Stride, ...] | None = Field(
        STAGE_STRIDES,
        min_length=1,
        max_length=4,
        description="Strides of the stages (1 or 2 each, as many as stages); "
        "or, 4 and above, ask for maps by stride instead of by index: [8, 16, 32].",
    )
    dilations: tuple[Dilation, ...] = Field((1, 1, 1, 1), min_length=1, max_length=4)
    out_indices: Indices = Field((3,), description="Stages, 0 is layer1 at stride 4.")
    style: Literal["pytorch", "caffe"] = Field(
        "pytorch", description="pytorch strides on a bottleneck's 3x3, caffe on its first 1x1."
    )
    deep_stem: bool = False
    avg_down: bool = False
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = NormConfig(type="BN")
    norm_eval: bool = False
    with_cp: bool = Field(False, description="Saves memory in training; changes nothing here.")
    zero_init_residual: bool = Field(True, description="Start of training; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        stages = self.num_stages
        if self._strides_are_levels() is None:
            yield (
                "strides",
                "must be 1 or 2 (strides of the stages), or all 4 and above (strides of the levels)",
            )
        for key, given in (("strides", self._stage_strides()), ("dilations", self._stage_dilations())):
            if len(given) != stages:
                yield key, f"has {len(given)} entries for {stages} stages"
        if self.frozen_stages > stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {stages} stages"
        if self.deep_stem and self.stem_channels < 2:
            yield "stem_channels", "a deep stem needs at least 2"
        if (fault := self.norm_cfg.fault()) is not None:
            yield "norm_cfg/num_groups", fault
        groups = self.norm_cfg.num_groups or 1
        uneven = [width for width in self.spec().norm_widths() if width % groups]
        if uneven:
            yield "norm_cfg/num_groups", f"{groups} groups do not divide {uneven[0]} channels"

    def _strides_are_levels(self) -> bool | None:
        """Whether `strides` asks for levels (4 and above) or spells the stages (1 or 2); None for neither.

        OpenMMLab's own `strides` and the service's share the name but no value: no stage strides by 4, and no
        level is finer than 4.
        """
        strides = self.strides or ()
        if all(stride <= 2 for stride in strides):
            return False
        return True if min(strides) >= STEM_STRIDE else None

    def _stage_strides(self) -> tuple[int, ...]:
        if self.strides is None or self._strides_are_levels() or "strides" not in self.model_fields_set:
            return STAGE_STRIDES[: self.num_stages]
        return self.strides

    def _stage_dilations(self) -> tuple[int, ...]:
        given = "dilations" in self.model_fields_set
        return self.dilations if given else self.dilations[: self.num_stages]

    def spec(self) -> ResNetSpec:
        """The neutral spelling."""
        block, blocks = DEPTHS[self.depth]
        expansion = self.expansion or EXPANSIONS[block]
        return ResNetSpec(
            block=block,
            blocks=blocks[: self.num_stages],
            widths=tuple(self.base_channels * expansion * 2**stage for stage in range(self.num_stages)),
            strides=self._stage_strides(),
            dilations=self._stage_dilations(),
            expansion=expansion,
            in_channels=self.in_channels,
            stem_channels=self.stem_channels,
            deep_stem=self.deep_stem,
            avg_down=self.avg_down,
            stride_on_1x1=self.style == "caffe" and block == "bottleneck",
            norm=self.norm_cfg.spec(),
        )

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training reads makes no second model."""
        return {"type": self.TYPE, **asdict(self.spec())}

    def freeze(self) -> Freeze:
        """OpenMMLab's `frozen_stages`, `norm_eval` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages, norm_eval=self.norm_eval, all_norms=not self.norm_cfg.requires_grad)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self._strides_are_levels() and self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def _describe(config: ResNetConfig) -> Description:
    spec = config.spec()
    return building.describe(lambda: ResNet(spec), in_channels=spec.in_channels)


def _build(config: ResNetConfig) -> ResNet:
    spec = config.spec()
    network = building.unset(lambda: ResNet(spec))
    initialise(network)
    return network


def _load(config: ResNetConfig, state: StateDict, ref: WeightsRef) -> tuple[ResNet, LoadedKeys]:
    spec = config.spec()
    network = building.unset(lambda: ResNet(spec))
    return network, load_strict(network, state, ref)


def _example(type_name: str) -> Mapping[str, Any]:
    return {"type": type_name, "depth": 50, "out_indices": [0, 1, 2, 3]}


def _depths(type_name: str) -> Sequence[str]:  # noqa: ARG001 - the same for every spelling
    return [str(depth) for depth in DEPTHS]


RESNET = Family(
    config=ResNetConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=_example,
    architectures=_depths,
)
