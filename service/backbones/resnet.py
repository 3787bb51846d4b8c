"""ResNet (He et al., arXiv:1512.03385) with OpenMMLab's key names: depths 18 to 152.

`ResNet` takes a neutral `ResNetSpec`; each spelling of it is a config class of its own. The other spellings are
in `resnet_variants`; networks of other blocks, in `regnet`, `res2net` and `resnest`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

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
from service.backbones.block_plugins import BlockPlugin, PluginSpec, make_plugin
from service.backbones.deformable import DeformConv2d, DeformSpec
from service.backbones.freezing import freeze_report, is_under, norm_names
from service.backbones.norms import BATCH_NORM, NORMS, NormConfig, NormSpec, make_norm
from service.backbones.standardised import standardise_weights
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.checkpoints.load import load_strict
from service.checkpoints.published import style_of
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
    200: ("bottleneck", (3, 24, 36, 3)),
    269: ("bottleneck", (3, 30, 48, 8)),
}
EXPANSIONS: dict[BlockKind, int] = {"basic": 1, "bottleneck": 4}
RESNET_DEPTHS = (18, 34, 50, 101, 152)
BOTTLENECK_DEPTHS = (50, 101, 152)


@dataclass(frozen=True)
class Stem:
    """How a network begins: `conv1` with this kernel and stride, or three 3x3 convolutions, and a max-pool or none.

    `keys` says how a deep stem names its weights: mmpretrain's `stem.{0,1,2}.{conv,bn}` or mmdet's flat
    `stem.{0,1,3,4,6,7}`.
    """

    kernel: int = 7
    stride: int = 2
    pool: bool = True
    keys: Literal["nested", "flat"] | None = None


StemKind = Literal["plain", "nested", "flat", "cifar", "regnet"]
STEMS: Mapping[StemKind, Stem] = {
    "plain": Stem(),
    "nested": Stem(keys="nested"),
    "flat": Stem(keys="flat"),
    "cifar": Stem(kernel=3, stride=1, pool=False),
    "regnet": Stem(kernel=3, pool=False),
}


@dataclass(frozen=True)
class ResNetSpec:
    """What decides a ResNet's numbers and the names of its weights.

    `widths` are the output channels of the stages, `inner` those between a block's first and last convolution,
    `groups` those of a bottleneck's 3x3. `stride_on_1x1` is OpenMMLab's `style="caffe"`: a bottleneck strides
    on its first 1x1 convolution instead of its 3x3. `pool_at_stride_1`: with `avg_down`, a shortcut that does
    not stride has its (idle) pool too, which shifts the names after it. `stem_is_level`: feature 0 is the stem,
    before its max-pool, and the stages count from 1. `standardises_weights` is `conv_cfg=dict(type="ConvWS")`;
    `deform` and `plugins` are of bottlenecks.
    """

    block: BlockKind
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    inner: tuple[int, ...]
    groups: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    in_channels: int = 3
    stem_channels: int = 64
    stem: StemKind = "plain"
    avg_down: bool = False
    pool_at_stride_1: bool = False
    stride_on_1x1: bool = False
    stem_is_level: bool = False
    norm: NormSpec = BATCH_NORM
    standardises_weights: bool = False
    deform: DeformSpec | None = None
    plugins: tuple[PluginSpec, ...] = ()

    def features(self) -> tuple[FeatureInfo, ...]:
        """One feature a stage, and the stem where it is a level; a node is its index."""
        stem = STEMS[self.stem]
        stride = stem.stride * (2 if stem.pool else 1)
        maps = [(self.stem_channels, stem.stride)] if self.stem_is_level else []
        for width, step in zip(self.widths, self.strides, strict=True):
            stride *= step
            maps.append((width, stride))
        return tuple(
            FeatureInfo(index, str(index), width, stride, "NCHW")
            for index, (width, stride) in enumerate(maps)
        )

    def norm_widths(self) -> tuple[int, ...]:
        """Every channel count that a norm layer is put on."""
        deep = STEMS[self.stem].keys is not None
        stem = (self.stem_channels, self.stem_channels // 2) if deep else (self.stem_channels,)
        return (*stem, *self.inner, *self.widths)


@dataclass(frozen=True)
class Place:
    """Where a block is: its stage, whether it is the first there, what goes into it and by what it strides."""

    stage: int
    first: bool
    inputs: int
    stride: int


def conv3x3(
    inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of its maps, but for the stride."""
    return nn.Conv2d(
        inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=bias
    )


def conv1x1(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, groups=groups, bias=bias)


class ResidualBlock(nn.Module):
    """Convolutions and norms `conv1, bn1, conv2, …` around a shortcut; a norm's key starts with its kind."""

    def __init__(
        self,
        convolutions: Sequence[nn.Conv2d],
        norm: NormSpec,
        downsample: nn.Module | None,
        plugins: Sequence[PluginSpec] = (),
    ) -> None:
        super().__init__()
        self._steps: list[tuple[str, str]] = []
        for position, convolution in enumerate(convolutions, start=1):
            names = (f"conv{position}", f"{norm.kind}{position}")
            self.add_module(names[0], convolution)
            self.add_module(names[1], make_norm(norm, convolution.out_channels))
            self._steps.append(names)
        self.downsample = downsample
        channels = {name: getattr(self, name).out_channels for name, _ in self._steps}
        self._plugins = add_plugins(self, plugins, channels)

    def residual(self, maps: Tensor) -> Tensor:
        """What is added to the shortcut."""
        for conv_name, norm_name in self._steps[:-1]:
            maps = torch.relu_(getattr(self, norm_name)(getattr(self, conv_name)(maps)))
            maps = plugged(self, self._plugins.get(conv_name, ()), maps)
        conv_name, norm_name = self._steps[-1]
        normed: Tensor = getattr(self, norm_name)(getattr(self, conv_name)(maps))
        return plugged(self, self._plugins.get(conv_name, ()), normed)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        return torch.relu_(self.residual(maps) + shortcut)


def add_plugins(
    block: nn.Module, plugins: Sequence[PluginSpec], channels: Mapping[str, int]
) -> dict[str, list[str]]:
    """Put plugins into a block; returns their names by that of the convolution that each comes after."""
    names: dict[str, list[str]] = {}
    for plugin in plugins:
        before = plugin.position.removeprefix("after_")
        block.add_module(plugin.name, make_plugin(plugin, channels[before]))
        names.setdefault(before, []).append(plugin.name)
    return names


def plugged(block: nn.Module, names: Sequence[str], maps: Tensor) -> Tensor:
    """`maps` through these plugins of a block."""
    for name in names:
        maps = getattr(block, name)(maps)
    return maps


def _basic(spec: ResNetSpec, place: Place) -> list[nn.Conv2d]:
    width, dilation = spec.inner[place.stage], spec.dilations[place.stage]
    # OpenMMLab dilates only the first convolution of a basic block.
    return [
        conv3x3(place.inputs, width, stride=place.stride, dilation=dilation),
        conv3x3(width, spec.widths[place.stage]),
    ]


def _bottleneck(spec: ResNetSpec, place: Place) -> list[nn.Conv2d]:
    width, dilation = spec.inner[place.stage], spec.dilations[place.stage]
    first, second = bottleneck_strides(spec, place)
    return [
        conv1x1(place.inputs, width, stride=first),
        middle(spec, place, width, stride=second, dilation=dilation, groups=spec.groups[place.stage]),
        conv1x1(width, spec.widths[place.stage]),
    ]


def middle(
    spec: ResNetSpec, place: Place, width: int, *, stride: int, dilation: int, groups: int = 1
) -> nn.Conv2d:
    """A bottleneck's 3x3, deformable where the spec says so."""
    if spec.deform is not None and spec.deform.is_at(place.stage, first=place.first):
        return DeformConv2d(width, width, spec.deform, stride=stride, dilation=dilation, groups=groups)
    return conv3x3(width, width, stride=stride, dilation=dilation, groups=groups)


def bottleneck_strides(spec: ResNetSpec, place: Place) -> tuple[int, int]:
    """Strides of a bottleneck's first 1x1 and of its 3x3."""
    return (place.stride, 1) if spec.stride_on_1x1 else (1, place.stride)


CONVOLUTIONS = {"basic": _basic, "bottleneck": _bottleneck}


def downsample_of(spec: ResNetSpec, place: Place) -> nn.Module | None:
    """The projection of a stage's first shortcut; `avg_down` pools before it instead of striding in it."""
    outputs, stride = spec.widths[place.stage], place.stride
    if not place.first or (stride == 1 and place.inputs == outputs):
        return None
    pool = spec.avg_down and (stride != 1 or spec.pool_at_stride_1)
    steps: list[nn.Module] = [_shortcut_pool(stride)] if pool else []
    steps += [conv1x1(place.inputs, outputs, stride=1 if pool else stride), make_norm(spec.norm, outputs)]
    return nn.Sequential(*steps)


def _shortcut_pool(stride: int) -> nn.Module:
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)


def _deep_stem(spec: ResNetSpec, *, nested: bool) -> nn.Sequential:
    """Three 3x3 convolutions in place of the 7x7."""
    half = spec.stem_channels // 2
    steps = ((spec.in_channels, half, 2), (half, half, 1), (half, spec.stem_channels, 1))
    layers = [_stem_step(spec.norm, *step) for step in steps]
    if nested:
        return nn.Sequential(*(nn.Sequential(step) for step in layers))
    return nn.Sequential(*(layer for step in layers for layer in step.values()))


def _stem_step(norm: NormSpec, inputs: int, outputs: int, stride: int) -> OrderedDict[str, nn.Module]:
    convolution = conv3x3(inputs, outputs, stride=stride)
    layers = {"conv": convolution, norm.kind: make_norm(norm, outputs), "activate": nn.ReLU(inplace=True)}
    return OrderedDict(layers)


class ResNet(Backbone):
    """A ResNet whose state dict has OpenMMLab's keys. Families with other blocks override `block`.

    Inside `PLAIN_WEIGHTS` no convolution standardises its weights, whatever the spec says.
    """

    PLAIN_WEIGHTS: ClassVar[tuple[type[nn.Module], ...]] = (BlockPlugin,)

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.stem_names = self._add_stem()
        inputs = spec.stem_channels
        for stage, width in enumerate(spec.widths):
            self.add_module(f"layer{stage + 1}", self._stage(stage, inputs))
            inputs = width
        if spec.standardises_weights:
            standardise_weights(self, but=self.PLAIN_WEIGHTS)

    def _add_stem(self) -> tuple[str, ...]:
        """Add the stem; returns the names of its modules, in order."""
        spec, stem, norm_name = self.spec, STEMS[self.spec.stem], f"{self.spec.norm.kind}1"
        if stem.keys is not None:
            self.stem = _deep_stem(spec, nested=stem.keys == "nested")
            return ("stem",)
        self.conv1 = nn.Conv2d(
            spec.in_channels,
            spec.stem_channels,
            stem.kernel,
            stride=stem.stride,
            padding=stem.kernel // 2,
            bias=False,
        )
        self.add_module(norm_name, make_norm(spec.norm, spec.stem_channels))
        return ("conv1", norm_name)

    def _stage(self, stage: int, inputs: int) -> nn.Sequential:
        blocks = []
        for position in range(self.spec.blocks[stage]):
            first = position == 0
            place = Place(stage, first, inputs, self.spec.strides[stage] if first else 1)
            blocks.append(self.block(place, downsample_of(self.spec, place)))
            inputs = self.spec.widths[stage]
        return nn.Sequential(*blocks)

    def block(self, place: Place, downsample: nn.Module | None) -> nn.Module:
        """One residual block."""
        convolutions = CONVOLUTIONS[self.spec.block](self.spec, place)
        return ResidualBlock(convolutions, self.spec.norm, downsample, self.plugins_of(place))

    def plugins_of(self, place: Place) -> list[PluginSpec]:
        """What is inside the blocks of a stage."""
        return [plugin for plugin in self.spec.plugins if plugin.is_in(place.stage)]

    def stem_maps(self, images: Tensor) -> Tensor:
        """What the stem gives, before its max-pool."""
        for name in self.stem_names:
            images = getattr(self, name)(images)
        return torch.relu_(images)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stem and the stages in `nodes`; stops after the deepest of them."""
        maps = self.stem_maps(images)
        found = {"0": maps} if self.spec.stem_is_level else {}
        if STEMS[self.spec.stem].pool:
            maps = nn.functional.max_pool2d(maps, 3, stride=2, padding=1)
        before = len(found)
        for index in range(before, max(int(node) for node in nodes) + 1):
            maps = getattr(self, f"layer{index - before + 1}")(maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def initialise(self) -> None:
        """Kaiming normal (fan out) for convolutions, 1 and 0 for norms, as OpenMMLab starts training.

        The last norm of a block is not zeroed (`zero_init_residual`): that would make every block an identity.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if name.endswith(".conv_offset"):
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NORMS):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, BlockPlugin):
                module.start()

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """OpenMMLab's rule: 0 is the stem, k the stem and `layer1` to `layer{k}`; their norms are in eval."""
        layers: list[str] = []
        if freeze.stages is not None and freeze.stages >= 0:
            layers = [*self.stem_names, *(f"layer{stage}" for stage in range(1, freeze.stages + 1))]
        return freeze_report(
            self, freeze, layers, configured=self._configured() if self.spec.plugins else None
        )

    def _configured(self) -> list[str]:
        """Norms of blocks, which `norm_cfg` speaks of; those of plugins it does not."""
        plugins = [name for name, module in self.named_modules() if isinstance(module, BlockPlugin)]
        return [name for name in norm_names(self) if not is_under(name, plugins)]


# --- spellings -----------------------------------------------------------------------------------

Channels = Annotated[int, Field(strict=True, ge=1, le=512)]
Dilation = Annotated[int, Field(strict=True, ge=1, le=16)]
Groups = Annotated[int, Field(strict=True, ge=1, le=512)]
StageStrides = Annotated[
    Annotated[tuple[Stride, ...], Field(min_length=1, max_length=5)] | None,
    Field(
        description="Strides of the stages (1 or 2 each, as many as stages); "
        "or, where one is above 2, ask for maps by stride instead of by index: [8, 16, 32]."
    ),
]


class ConvConfig(BaseModel):
    """OpenMMLab's `conv_cfg`: the plain convolution, or ConvWS, which standardises its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv", "ConvWS"]


class ResidualConfig(BackboneConfig):
    """What all residual networks of OpenMMLab take. A type says which network its keys mean in `network`.

    `TYPE` is its canonical name, `FINEST_LEVEL` the smallest stride of its levels.
    """

    TYPE: ClassVar[str]
    FINEST_LEVEL: ClassVar[int] = 4
    STAGE_STRIDES: ClassVar[tuple[int, ...]] = (1, 2, 2, 2)
    PLAIN_STEM: ClassVar[StemKind] = "plain"
    DEEP_STEM: ClassVar[StemKind] = "nested"
    POOL_AT_STRIDE_1: ClassVar[bool] = False

    in_channels: InputChannels = 3
    stem_channels: Channels | None = 64
    base_channels: Channels = Field(64, description="Channels of the first stage before expansion.")
    strides: StageStrides = (1, 2, 2, 2)
    dilations: tuple[Dilation, ...] = Field((1, 1, 1, 1), min_length=1, max_length=4)
    out_indices: Indices = Field((3,), description="Stages, 0 is layer1.")
    style: Literal["pytorch", "caffe"] = Field(
        "pytorch", description="pytorch strides on a bottleneck's 3x3, caffe on its first 1x1."
    )
    deep_stem: bool = Field(False, description="Three 3x3 convolutions in place of the 7x7.")
    avg_down: bool = Field(False, description="Pools in a shortcut instead of striding.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = NormConfig(type="BN")
    norm_eval: bool = Field(False, description="Keeps every batch norm in eval mode.")
    with_cp: bool = Field(False, description="Saves memory in training; changes nothing here.")
    zero_init_residual: bool = Field(True, description="Start of training; changes nothing here.")

    @abstractmethod
    def stages(self) -> int:
        """How many stages there are."""

    @abstractmethod
    def spec(self) -> ResNetSpec:
        """The neutral spelling."""

    def network(self) -> ResNet:
        """The network of these keys, without its weights."""
        return ResNet(self.spec())

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        stages = self.stages()
        if self.strides_are_levels() is None:
            yield (
                "strides",
                f"must be 1 or 2 (strides of the stages), or all {self.FINEST_LEVEL} and above "
                "(strides of the levels)",
            )
        for key, given in (("strides", self.stage_strides()), ("dilations", self.stage_dilations())):
            if len(given) != stages:
                yield key, f"has {len(given)} entries for {stages} stages"
        if self.frozen_stages > stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {stages} stages"
        if self.deep_stem and self.stem_width() < 2:
            yield "stem_channels", "a deep stem needs at least 2"
        if (fault := self.norm_cfg.fault()) is not None:
            yield "norm_cfg/num_groups", fault
        groups = self.norm_cfg.num_groups or 1
        uneven = [width for width in self.spec().norm_widths() if width % groups]
        if uneven:
            yield "norm_cfg/num_groups", f"{groups} groups do not divide {uneven[0]} channels"

    def strides_are_levels(self) -> bool | None:
        """Whether `strides` asks for levels (4 and above) or spells the stages (1 or 2); None for neither.

        OpenMMLab's own `strides` and the service's share the name but no value: no stage strides by 4, and no
        level is finer than 4 (2 with the stem).
        """
        strides = self.strides or ()
        if all(stride <= 2 for stride in strides):
            return False
        return True if min(strides) >= self.FINEST_LEVEL else None

    def stage_strides(self) -> tuple[int, ...]:
        """The stride of each stage."""
        if self.strides is None or self.strides_are_levels() or "strides" not in self.model_fields_set:
            return self.STAGE_STRIDES[: self.stages()]
        return self.strides

    def stage_dilations(self) -> tuple[int, ...]:
        """The dilation of each stage."""
        given = "dilations" in self.model_fields_set
        return self.dilations if given else self.dilations[: self.stages()]

    def stem_width(self) -> int:
        """The stem's channels, where not given those of the first stage before expansion."""
        return self.base_channels if self.stem_channels is None else self.stem_channels

    def standardises_weights(self) -> bool:
        """Whether all convolutions standardise their weights."""
        return self.conv_cfg is not None and self.conv_cfg.type == "ConvWS"

    def deform(self) -> DeformSpec | None:
        """Where 3x3 convolutions are deformable: nowhere, but in mmdet."""
        return None

    def plugin_specs(self) -> tuple[PluginSpec, ...]:
        """What is inside blocks: nothing, but in mmdet."""
        return ()

    def stem(self) -> StemKind:
        """How the network begins."""
        return self.DEEP_STEM if self.deep_stem else self.PLAIN_STEM

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training reads makes no second model."""
        return {"type": self.TYPE, **asdict(self.spec())}

    def misreads(self, checkpoint: str) -> str | None:
        """Bottlenecks of the other style have the same names and shapes, and other numbers."""
        theirs, spec = style_of(checkpoint), self.spec()
        ours = "caffe" if spec.stride_on_1x1 else "pytorch"
        if theirs in (None, ours) or spec.block != "bottleneck":
            return None
        return (
            f"these weights are of a ResNet of style {theirs}, not {ours}: they have the same names and shapes "
            "but would give wrong features"
        )

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:  # noqa: ARG002 - the names tell
        """torchvision's and timm's classifiers stride in the 3x3 convolution, and nothing stands before their names."""
        spec = self.spec()
        if not spec.stride_on_1x1 or spec.block != "bottleneck" or library == "detectron2":
            return None
        if not is_classifier(state):
            return None
        return (
            "a torchvision or timm file fits a ResNet of style caffe and would give wrong features: its bottlenecks "
            "stride in the 3x3 convolution (style='pytorch')"
        )

    def freeze(self) -> Freeze:
        """OpenMMLab's `frozen_stages`, `norm_eval` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages, norm_eval=self.norm_eval, all_norms=not self.norm_cfg.requires_grad)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self.strides_are_levels() and self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


class DepthConfig(ResidualConfig):
    """Residual networks of a depth: four stages, each of twice the channels of the one before."""

    STEM_IS_LEVEL: ClassVar[bool] = False

    depth: Literal[18, 34, 50, 101, 152, 200, 269] = Field(description="Number of layers.")
    num_stages: Annotated[int, Field(strict=True, ge=1, le=4)] = 4

    def stages(self) -> int:
        """How many stages there are."""
        return self.num_stages

    def block_expansion(self) -> int:
        """Output channels of a block over its inner ones."""
        return EXPANSIONS[DEPTHS[self.depth][0]]

    def conv_groups(self) -> int:
        """Groups of a bottleneck's 3x3."""
        return 1

    def inner_width(self, width: int) -> int:
        """Channels of a bottleneck's 3x3 in a stage of `width` channels before expansion."""
        return width

    def spec(self) -> ResNetSpec:
        """The neutral spelling."""
        block, blocks = DEPTHS[self.depth]
        widths = [self.base_channels * 2**stage for stage in range(self.num_stages)]
        return ResNetSpec(
            block=block,
            blocks=blocks[: self.num_stages],
            widths=tuple(width * self.block_expansion() for width in widths),
            inner=tuple(self.inner_width(width) for width in widths),
            groups=(self.conv_groups(),) * self.num_stages,
            strides=self.stage_strides(),
            dilations=self.stage_dilations(),
            in_channels=self.in_channels,
            stem_channels=self.stem_width(),
            stem=self.stem(),
            avg_down=self.avg_down,
            pool_at_stride_1=self.avg_down and self.POOL_AT_STRIDE_1,
            stride_on_1x1=self.style == "caffe" and block == "bottleneck",
            stem_is_level=self.STEM_IS_LEVEL,
            norm=self.norm_cfg.spec(),
            standardises_weights=self.standardises_weights(),
            deform=self.deform(),
            plugins=self.plugin_specs(),
        )


class PretrainKeys(DepthConfig):
    """What mmpretrain's networks of a depth take besides."""

    stem_channels: Channels = 64
    expansion: Annotated[int, Field(strict=True, ge=1, le=8)] | None = Field(
        None, description="Output channels of a block over its inner ones; null is 1 (18, 34) or 4."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")

    def block_expansion(self) -> int:
        """`expansion`, or the block's own."""
        return self.expansion or super().block_expansion()

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and `expansion`."""
        if self.block_expansion() != 1 and DEPTHS[self.depth][0] == "basic":
            yield "expansion", f"depth {self.depth} takes 1 only"
        yield from super().faults()


C = TypeVar("C", bound=ResidualConfig)


def family(
    config: type[C],
    *,
    choice: str = "depth",
    choices: Sequence[int | str] = (),
    indices: Sequence[int] = (0, 1, 2, 3),
    naming: Naming | None = None,
    library: str = "",
) -> Family[C]:
    """The family of a residual config class.

    Args:
        config: the class.
        choice: the key that names an architecture, and for it
        choices: the names; the example has the first, or 50.
        indices: the example's `out_indices`, all there are.
        naming: the names of the weights in other libraries, and `library`: which of them the network has.
    """
    names = choices or RESNET_DEPTHS
    shown = 50 if 50 in names else names[0]
    return Family(
        config=config,
        describe=_describe,
        build=_build,
        load=_load,
        example=lambda type_name: {"type": type_name, choice: shown, "out_indices": list(indices)},
        architectures=lambda _type_name: [str(name) for name in names],
        naming=naming,
        key_library=library,
    )


def _describe(config: ResidualConfig) -> Description:
    return building.describe(config.network, in_channels=config.in_channels)


def _build(config: ResidualConfig) -> ResNet:
    network = building.unset(config.network)
    network.initialise()
    return network


def _load(config: ResidualConfig, state: StateDict, ref: WeightsRef) -> tuple[ResNet, LoadedKeys]:
    network = building.unset(config.network)
    return network, load_strict(network, state, ref)


# --- mmpretrain.ResNet = mmcls.ResNet -------------------------------------------------------------


class ResNetConfig(PretrainKeys):
    """`mmpretrain.ResNet`, which is also `mmcls.ResNet`."""

    TYPE: ClassVar[str] = "mmpretrain.ResNet"

    depth: Literal[18, 34, 50, 101, 152] = Field(description="Number of layers.")


def is_classifier(state: StateDict) -> bool:
    """Whether a file is a ResNet of torchvision or timm with its classifier: nothing stands before their names."""
    return {"conv1.weight", "fc.weight"} <= state.keys()


# timm and torchvision gave their ResNets these names first; detectron2 has its own (its tools' conversion script).
RESNET_NAMES = Naming(
    "ResNet",
    own=("mmpretrain", "mmdet", "mmselfsup", "torchvision", "timm"),
    marks=("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv2.weight"),
    stem_kernel=("conv1.weight", 7),
    layouts=(
        KeyLayout(
            "detectron2",
            rules(
                {
                    "conv1.{leaf}": "stem.conv1.{leaf}",
                    "bn1.{leaf}": "stem.conv1.norm.{leaf}",
                    "layer{s}.{b}.conv{k}.{leaf}": "res{s+1}.{b}.conv{k}.{leaf}",
                    "layer{s}.{b}.bn{k}.{leaf}": "res{s+1}.{b}.conv{k}.norm.{leaf}",
                    "layer{s}.{b}.downsample.0.{leaf}": "res{s+1}.{b}.shortcut.{leaf}",
                    "layer{s}.{b}.downsample.1.{leaf}": "res{s+1}.{b}.shortcut.norm.{leaf}",
                    "fc.{leaf}": "linear.{leaf}",
                }
            ),
        ),
    ),
)


RESNET = family(ResNetConfig, naming=RESNET_NAMES)
