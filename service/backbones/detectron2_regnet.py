"""detectron2's RegNet (Radosavovic et al., arXiv:2003.13678), with pycls' key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, levels_by_stride
from service.backbones.detectron2_configs import NORM_KINDS, Channels, Fault, NormName
from service.backbones.detectron2_resnet import GROUPS_OF_NORM, NORM_MAKERS, NormKind, with_frozen_norms
from service.backbones.lazyconfig import short_class
from service.backbones.openmmlab import SpecConfig, make_family
from service.backbones.vitdet_layers import ACTIVATIONS, ActivationName
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import InvalidConfig

DIVISOR = 8
MAX_STAGES = 8
MAX_WIDTH = 16_384
StemName = Literal["SimpleStem", "ResStem"]
BlockName = Literal["VanillaBlock", "ResBasicBlock", "ResBottleneckBlock"]


@dataclass(frozen=True)
class StageSpec:
    """Blocks of one width. `inner` is the channels of a bottleneck's 3x3, in `groups` groups; the first one strides."""

    blocks: int
    width: int
    stride: int
    inner: int
    groups: int


@dataclass(frozen=True)
class RegNetSpec:
    """What decides the numbers and the names of the weights; `squeeze` is over the channels that go into a block."""

    stem: StemName
    stem_width: int
    block: BlockName
    stages: tuple[StageSpec, ...]
    norm: NormKind
    squeeze: float = 0.0
    activation: ActivationName = "ReLU"
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """`stem`, `s1` and on."""
        stride = STEMS[self.stem][1]
        found = [FeatureInfo(0, "stem", self.stem_width, stride, "NCHW")]
        for position, stage in enumerate(self.stages, start=1):
            stride *= stage.stride
            found.append(FeatureInfo(position, f"s{position}", stage.width, stride, "NCHW"))
        return tuple(found)


# --- layers ---------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)


class Normed(nn.Module):
    """Base of modules whose convolutions have a norm beside them, `{name}_bn`, which may be none."""

    def __init__(self, spec: RegNetSpec) -> None:
        super().__init__()
        self.norm = spec.norm
        self.activation = ACTIVATIONS[spec.activation]

    def add(self, name: str, convolution: nn.Conv2d, norm_name: str | None = None) -> None:
        """A convolution and its norm."""
        self.add_module(name, convolution)
        norm = NORM_MAKERS[self.norm](convolution.out_channels)
        if norm is not None:
            self.add_module(norm_name or f"{name}_bn", norm)

    def run(self, name: str, maps: Tensor, norm_name: str | None = None) -> Tensor:
        """Through a convolution and its norm."""
        found: Tensor = self.get_submodule(name)(maps)
        norm = getattr(self, norm_name or f"{name}_bn", None)
        return found if norm is None else norm(found)


class Stem(Normed):
    """A strided convolution, which `ResStem` follows with a max pool; keys `conv`, `bn`."""

    def __init__(self, spec: RegNetSpec) -> None:
        super().__init__(spec)
        side, stride = STEMS[spec.stem]
        self.pools = stride == 4
        self.add("conv", _conv(spec.in_channels, spec.stem_width, side, stride=2), "bn")

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, h / 2, w / 2] or a quarter."""
        maps = self.activation(self.run("conv", images, "bn"))
        return F.max_pool2d(maps, 3, stride=2, padding=1) if self.pools else maps


# The side of a stem's convolution, and its stride.
STEMS: dict[StemName, tuple[int, int]] = {"SimpleStem": (3, 2), "ResStem": (7, 4)}


class SqueezeExcite(nn.Module):
    """Channels weighed by a gate of their means; keys `f_ex.0`, `f_ex.2`."""

    def __init__(self, channels: int, hidden: int, activation: ActivationName) -> None:
        super().__init__()
        first, last = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        # The activation between the two has a place of its own.
        self.f_ex = nn.ModuleDict({"0": first, "2": last})
        self.activation = ACTIVATIONS[activation]

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        hidden = self.activation(self.f_ex["0"](F.adaptive_avg_pool2d(maps, 1)))
        gate: Tensor = self.f_ex["2"](hidden)
        return maps * gate.sigmoid()


class Basic(Normed):
    """Two 3x3 convolutions; keys `a`, `b`."""

    def __init__(self, spec: RegNetSpec, stage: StageSpec, inputs: int, stride: int) -> None:
        super().__init__(spec)
        self.add("a", _conv(inputs, stage.width, 3, stride=stride))
        self.add("b", _conv(stage.width, stage.width, 3))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h / stride, w / stride]."""
        return self.run("b", self.activation(self.run("a", maps)))


class Vanilla(Basic):
    """The same with an activation behind it, and no residual."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h / stride, w / stride]."""
        return self.activation(super().forward(maps))


class Bottleneck(Normed):
    """1x1, grouped 3x3 and 1x1 convolutions; keys `a`, `b`, `se`, `c`."""

    def __init__(self, spec: RegNetSpec, stage: StageSpec, inputs: int, stride: int) -> None:
        super().__init__(spec)
        hidden = round(inputs * spec.squeeze)
        self.add("a", _conv(inputs, stage.inner, 1))
        self.add("b", _conv(stage.inner, stage.inner, 3, stride=stride, groups=stage.groups))
        self.se = SqueezeExcite(stage.inner, hidden, spec.activation) if hidden else nn.Identity()
        self.add("c", _conv(stage.inner, stage.width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h / stride, w / stride]."""
        inner = self.activation(self.run("a", maps))
        inner = self.activation(self.run("b", inner))
        return self.run("c", self.se(inner))


class Residual(Normed):
    """A transform of the input and the input itself, projected where the shapes differ; keys `proj`, `bn`, `f`."""

    TRANSFORM: ClassVar[type[Basic | Bottleneck]]

    def __init__(self, spec: RegNetSpec, stage: StageSpec, inputs: int, stride: int) -> None:
        super().__init__(spec)
        self.projects = inputs != stage.width or stride != 1
        if self.projects:
            self.add("proj", _conv(inputs, stage.width, 1, stride=stride), "bn")
        self.f = type(self).TRANSFORM(spec, stage, inputs, stride)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h / stride, w / stride]."""
        beside = self.run("proj", maps, "bn") if self.projects else maps
        return self.activation(beside + self.f(maps))


class ResidualBasic(Residual):
    """Around two 3x3 convolutions."""

    TRANSFORM = Basic


class ResidualBottleneck(Residual):
    """Around a bottleneck."""

    TRANSFORM = Bottleneck


BLOCKS: dict[BlockName, Callable[[RegNetSpec, StageSpec, int, int], nn.Module]] = {
    "VanillaBlock": Vanilla,
    "ResBasicBlock": ResidualBasic,
    "ResBottleneckBlock": ResidualBottleneck,
}


class RegNet(Backbone):
    """Keys `stem`, `s1.b1` and on."""

    def __init__(self, spec: RegNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = Stem(spec)
        inputs = spec.stem_width
        for name, stage in zip(self.names(), spec.stages, strict=True):
            self.add_module(name, _stage(spec, stage, inputs))
            inputs = stage.width

    def names(self) -> list[str]:
        """The stages."""
        return [feature.node for feature in self.features[1:]]

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The features in `nodes`; stops after the deepest of them."""
        wanted = set(nodes)
        found = {"stem": self.stem(images)}
        maps = found["stem"]
        for name in self.names():
            if wanted <= found.keys():
                break
            found[name] = maps = self.get_submodule(name)(maps)
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """1 is the stem, k the stem and the first k - 1 stages; their batch norms become constants."""
        stages = freeze.stages or 0
        return with_frozen_norms(self, freeze, ["stem", *self.names()][:stages])


def _stage(spec: RegNetSpec, stage: StageSpec, inputs: int) -> nn.Sequential:
    blocks = nn.Sequential()
    for number in range(1, stage.blocks + 1):
        first = number == 1
        block = BLOCKS[spec.block](
            spec, stage, inputs if first else stage.width, stage.stride if first else 1
        )
        blocks.add_module(f"b{number}", block)
    return blocks


# --- configs --------------------------------------------------------------------------------------

FeatureName = Annotated[str, Field(pattern=r"^(stem|s[1-9][0-9]?)$", max_length=8)]
FeatureNames = Annotated[tuple[FeatureName, ...], Field(min_length=1, max_length=MAX_STAGES + 1)]
Blocks = Annotated[int, Field(strict=True, ge=1, le=128)]
GroupWidth = Annotated[int, Field(strict=True, ge=1, le=4096)]
StageStride = Annotated[int, Field(strict=True, ge=1, le=4)]
Ratio = Annotated[int | float, Field(gt=0, le=8)]
Activation = Annotated[ActivationName | None, BeforeValidator(short_class)]


class RegNetConfig(SpecConfig):
    """`detectron2.RegNet`: the line of widths `w_0 + w_a * i`, quantised to powers of `w_m` times `w_0`."""

    NETWORK: ClassVar[str] = "detectron2.RegNet"

    stem_class: Annotated[StemName, BeforeValidator(short_class)] = Field(
        description="SimpleStem (stride 2) or ResStem (stride 4, with a max pool)."
    )
    stem_width: Channels
    block_class: Annotated[BlockName, BeforeValidator(short_class)]
    depth: Blocks = Field(description="Number of blocks.")
    w_a: Annotated[float, Field(ge=0, le=1024)] = Field(description="What each block adds.")
    w_0: Annotated[int, Field(strict=True, ge=8, le=4096, multiple_of=DIVISOR)] = Field(
        description="Width of the first block."
    )
    w_m: Annotated[float, Field(gt=1, le=16)] = Field(description="From one stage to the next.")
    group_width: GroupWidth = Field(description="Channels of a group.")
    stride: StageStride = Field(2, description="Of every stage.")
    bottleneck_ratio: Ratio = Field(1.0, description="Inner width of a block over its width.")
    se_ratio: Annotated[float, Field(ge=0, le=4)] = Field(
        0.0, description="Channels of a squeeze over those that go into a block; 0 for none."
    )
    activation_class: Activation = Field(None, description="GELU, ReLU or SiLU; null is ReLU.")
    freeze_at: Annotated[int, Field(strict=True, ge=0, le=64)] = Field(
        0, description="0 nothing, 1 the stem, k the stem and the first k - 1 stages."
    )
    norm: NormName = "BN"
    out_features: FeatureNames | None = Field(
        None, description="stem, s1, s2, …, in this order; by default the last stage."
    )

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        found = list(self.stage_faults())
        yield from found
        if found:
            return
        if self.norm == "" and self.block_class != "VanillaBlock":
            yield "norm", f"is needed for {self.block_class}"
        spec = self.spec()
        widths = [spec.stem_width, *(stage.width for stage in spec.stages)]
        widths += [stage.inner for stage in spec.stages] if self._is_bottleneck() else []
        uneven = [width for width in widths if width % GROUPS_OF_NORM]
        if spec.norm == "gn" and uneven:
            yield "norm", f"the {GROUPS_OF_NORM} groups of GN do not divide {uneven[0]} channels"
        asked = self.out_features or ()
        if len(set(asked)) != len(asked):
            yield "out_features", f"a feature is asked for twice: {', '.join(asked)}"

    def _is_bottleneck(self) -> bool:
        return self.block_class == "ResBottleneckBlock"

    def inner_faults(self, width: int, ratio: float, group_width: int, key: str) -> Iterator[Fault]:
        """What a stage's bottleneck cannot be built from."""
        if width > MAX_WIDTH:
            yield key, f"makes a stage of {width:,} channels; the limit is {MAX_WIDTH:,}"
        elif width < 1:
            yield key, "makes a stage without channels"
        elif self._is_bottleneck():
            inner = round(width * ratio)
            groups = inner // group_width
            if not groups or inner % groups or inner > MAX_WIDTH:
                yield key, f"makes groups of {group_width} that do not divide {inner} channels"

    def stage(self, blocks: int, width: int, stride: int, ratio: float, group_width: int) -> StageSpec:
        """The neutral spelling of one stage."""
        if not self._is_bottleneck():
            return StageSpec(blocks, width, stride, 0, 1)
        inner = round(width * ratio)
        return StageSpec(blocks, width, stride, inner, inner // group_width)

    def spec(self) -> RegNetSpec:
        """The neutral spelling."""
        return RegNetSpec(
            stem=self.stem_class,
            stem_width=self.stem_width,
            block=self.block_class,
            stages=tuple(self.stages()),
            norm=NORM_KINDS[self.norm],
            squeeze=self.se_ratio if self._is_bottleneck() else 0.0,
            activation=self.activation_class or "ReLU",
        )

    def freeze(self) -> Freeze:
        """`freeze_at`, and norms that are frozen ones from the start."""
        return Freeze(self.freeze_at or None, norm_eval=self.norm == "FrozenBN")

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named as the features are."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        return tuple(Level(level.index, level.node, level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_features`, or the last one.

        Raises:
            InvalidConfig: a feature that the network has not.
        """
        known = {feature.node: feature.index for feature in description.features}
        asked = self.out_features or (description.features[-1].node,)
        for position, name in enumerate(asked):
            if name not in known:
                pointer = f"#/backbone/out_features/{position}"
                raise InvalidConfig(pointer, f"this backbone has {', '.join(known)}")
        return tuple(Level(known[name], name, name) for name in asked)

    def _line(self) -> list[tuple[int, int]]:
        """Width and blocks of the stages."""
        widths = []
        for block in range(self.depth):
            power = round(math.log((self.w_a * block + self.w_0) / self.w_0) / math.log(self.w_m))
            widths.append(round(self.w_0 * self.w_m**power / DIVISOR) * DIVISOR)
        return [(width, len(list(same))) for width, same in groupby(sorted(widths))]

    def _fitted(self, width: int) -> tuple[int, int]:
        """A width whose bottleneck divides into groups, and the channels of one."""
        ratio = self.bottleneck_ratio
        inner = int(max(1, width * ratio))
        group = min(self.group_width, inner)
        multiple = math.lcm(group, int(ratio)) if ratio > 1 else group
        return int(max(multiple, round(inner / multiple) * multiple) / ratio), group

    def stage_faults(self) -> Iterator[Fault]:
        """What the stages cannot be built from."""
        ratio = self.bottleneck_ratio
        if ratio > 1 and not isinstance(ratio, int):
            yield "bottleneck_ratio", "must be a whole number above 1"
            return
        line = self._line()
        if len(line) > MAX_STAGES:
            yield "depth", f"makes {len(line)} stages; at most {MAX_STAGES} are served"
            return
        for width, _ in line:
            fitted, group = self._fitted(width)
            if fitted * ratio % group:
                yield "group_width", f"groups of {group} do not divide {fitted * ratio:g} channels"
            yield from self.inner_faults(fitted, ratio, group, "group_width")

    def stages(self) -> Iterator[StageSpec]:
        """The stages."""
        for width, blocks in self._line():
            fitted, group = self._fitted(width)
            yield self.stage(blocks, fitted, self.stride, self.bottleneck_ratio, group)


EXAMPLE: dict[str, Any] = {
    "stem_class": "SimpleStem",
    "stem_width": 32,
    "block_class": "ResBottleneckBlock",
    "depth": 22,
    "w_a": 31.41,
    "w_0": 96,
    "w_m": 2.24,
    "group_width": 64,
    "se_ratio": 0.25,
    "norm": "SyncBN",
    "out_features": ["s1", "s2", "s3", "s4"],
}
_TIMM_BLOCK = {
    "f.a.{leaf}": "conv1.conv.{leaf}",
    "f.a_bn.{leaf}": "conv1.bn.{leaf}",
    "f.b.{leaf}": "conv2.conv.{leaf}",
    "f.b_bn.{leaf}": "conv2.bn.{leaf}",
    "f.c.{leaf}": "conv3.conv.{leaf}",
    "f.c_bn.{leaf}": "conv3.bn.{leaf}",
    "f.se.f_ex.0.{leaf}": "se.fc1.{leaf}",
    "f.se.f_ex.2.{leaf}": "se.fc2.{leaf}",
    "proj.{leaf}": "downsample.conv.{leaf}",
    "bn.{leaf}": "downsample.bn.{leaf}",
}
_TORCHVISION_BLOCK = {
    "f.a.{leaf}": "f.a.0.{leaf}",
    "f.a_bn.{leaf}": "f.a.1.{leaf}",
    "f.b.{leaf}": "f.b.0.{leaf}",
    "f.b_bn.{leaf}": "f.b.1.{leaf}",
    "f.c.{leaf}": "f.c.0.{leaf}",
    "f.c_bn.{leaf}": "f.c.1.{leaf}",
    "f.se.f_ex.0.{leaf}": "f.se.fc1.{leaf}",
    "f.se.f_ex.2.{leaf}": "f.se.fc2.{leaf}",
    "proj.{leaf}": "proj.0.{leaf}",
    "bn.{leaf}": "proj.1.{leaf}",
}
PYCLS_NAMES = Naming(
    "RegNet of pycls",
    own=("detectron2", "pycls"),
    marks=("stem.conv.weight", "s1.b1.proj.weight", "s1.b1.f.a_bn.weight", "s4.b1.f.c.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "stem.conv.{leaf}": "stem.conv.{leaf}",
                    "stem.bn.{leaf}": "stem.bn.{leaf}",
                    **below("s{s}.b{b}.", "s{s}.b{b}.", _TIMM_BLOCK),
                }
            ),
        ),
        KeyLayout(
            "torchvision",
            rules(
                {
                    "stem.conv.{leaf}": "stem.0.{leaf}",
                    "stem.bn.{leaf}": "stem.1.{leaf}",
                    **{
                        mine: theirs
                        for s in range(1, 5)
                        for mine, theirs in below(
                            f"s{s}.b{{b+1}}.", f"trunk_output.block{s}.block{s}-{{b}}.", _TORCHVISION_BLOCK
                        ).items()
                    },
                }
            ),
        ),
    ),
)


REGNET = make_family(RegNetConfig, RegNet, example=EXAMPLE, naming=PYCLS_NAMES)
