"""CSPDarkNet, CSPResNet and CSPResNeXt (Wang et al., arXiv:1911.11929) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels
from service.backbones.inverted_residual import NO_ACTIVATION, ConvSpec, conv
from service.backbones.norms import NormConfig, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ConvConfig,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_activation,
    make_family,
    map_features,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

Kind = Literal["darknet", "resnet", "resnext"]
GROUPS = 32


@dataclass(frozen=True)
class StageSpec:
    """One stage: `expanded` channels are split in two halves, of which one goes through the blocks.

    `hidden` are the channels inside a block. `down` are those of the strided convolution before, if any.
    """

    inputs: int
    outputs: int
    down: int | None
    expanded: int
    hidden: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """The stages of a kind, by its paper."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    blocks: tuple[int, ...]
    expand: tuple[int, ...]
    bottle: tuple[int, ...]
    strided: tuple[bool, ...]
    down_grows: bool

    def stages(self) -> tuple[StageSpec, ...]:
        """The stages, spelled out."""
        found = []
        for i, (inputs, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            width = outputs if self.down_grows else inputs
            expanded = width * self.expand[i]
            down = width if self.strided[i] else None
            hidden = expanded // 2 // self.bottle[i]
            found.append(StageSpec(inputs, outputs, down, expanded, hidden, self.blocks[i]))
        return tuple(found)


PLANS: dict[Kind, Plan] = {
    "darknet": Plan(
        inputs=(32, 64, 128, 256, 512),
        outputs=(64, 128, 256, 512, 1024),
        blocks=(1, 2, 8, 8, 4),
        expand=(2, 1, 1, 1, 1),
        bottle=(2, 1, 1, 1, 1),
        strided=(True,) * 5,
        down_grows=True,
    ),
    "resnet": Plan(
        inputs=(64, 128, 256, 512),
        outputs=(128, 256, 512, 1024),
        blocks=(3, 3, 5, 2),
        expand=(4, 4, 4, 4),
        bottle=(2, 2, 2, 2),
        strided=(False, True, True, True),
        down_grows=False,
    ),
    # 32 groups of 4 channels for every 32 of a bottleneck make its inner width that of its half.
    "resnext": Plan(
        inputs=(64, 256, 512, 1024),
        outputs=(256, 512, 1024, 2048),
        blocks=(3, 3, 5, 2),
        expand=(4, 2, 2, 2),
        bottle=(1, 1, 1, 1),
        strided=(False, True, True, True),
        down_grows=False,
    ),
}


@dataclass(frozen=True)
class CSPSpec:
    """What decides the numbers and the names of the weights.

    `same_pad`: the convolutions of the stem pad like TensorFlow. Those of the blocks would pad the same number
    of pixels either way, and no others follow `conv_cfg`.
    """

    kind: Kind
    conv: ConvSpec
    in_channels: int = 3
    deep_stem: bool = False
    same_pad: bool = False

    @property
    def groups(self) -> int:
        """Groups of the 3x3 convolutions."""
        return GROUPS if self.kind == "resnext" else 1

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        widths = PLANS[self.kind].outputs
        first = 2 if self.kind == "darknet" or self.deep_stem else 4
        return map_features(widths, tuple(first * 2**stage for stage in range(len(widths))))


class DarknetBlock(nn.Module):
    """A 1x1 and a 3x3 convolution around a shortcut; keys `conv1`, `conv2`."""

    def __init__(self, spec: CSPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = conv(spec.conv, width, hidden, 1)
        self.conv2 = conv(spec.conv, hidden, width, 3)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        residual: Tensor = maps + self.conv2(self.conv1(maps))
        return residual


class Bottleneck(nn.Module):
    """ResNet's bottleneck without a change of size; keys `conv1`, `bn1`, `conv2`, …."""

    def __init__(self, spec: CSPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.act = make_activation(spec.conv.activation)
        self.norm_kind = spec.conv.norm.kind
        shapes = ((width, hidden, 1, 1), (hidden, hidden, 3, spec.groups), (hidden, width, 1, 1))
        for i, (inputs, outputs, kernel, groups) in enumerate(shapes, start=1):
            layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
            self.add_module(f"conv{i}", layer)
            self.add_module(f"{self.norm_kind}{i}", make_norm(spec.conv.norm, outputs))

    def _step(self, position: int, maps: Tensor) -> Tensor:
        normed: Tensor = getattr(self, f"{self.norm_kind}{position}")(getattr(self, f"conv{position}")(maps))
        return normed

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed = self._step(3, self.act(self._step(2, self.act(self._step(1, maps)))))
        residual: Tensor = self.act(mixed + maps)
        return residual


BLOCKS: dict[Kind, Callable[[CSPSpec, int, int], nn.Module]] = {
    "darknet": DarknetBlock,
    "resnet": Bottleneck,
    "resnext": Bottleneck,
}


class Stage(nn.Module):
    """Half of the channels goes through the blocks, half around them."""

    def __init__(self, spec: CSPSpec, stage: StageSpec) -> None:
        super().__init__()
        half = stage.expanded // 2
        width = stage.down or stage.inputs
        self.downsample_conv = (
            conv(spec.conv, stage.inputs, stage.down, 3, stride=2, groups=spec.groups)
            if stage.down is not None
            else None
        )
        # Only Darknet has an activation before the split.
        linear = None if spec.kind == "darknet" else NO_ACTIVATION
        self.expand_conv = conv(spec.conv, width, stage.expanded, 1, activation=linear)
        self.blocks = nn.Sequential(
            *(BLOCKS[spec.kind](spec, half, stage.hidden) for _ in range(stage.blocks))
        )
        # The library spells it so, and its checkpoints with it.
        self.atfer_blocks_conv = conv(spec.conv, half, half, 1)
        self.final_conv = conv(spec.conv, stage.expanded, stage.outputs, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / 2, w / 2], or the same size where nothing strides."""
        if self.downsample_conv is not None:
            maps = self.downsample_conv(maps)
        around, through = self.expand_conv(maps).chunk(2, dim=1)
        mixed = self.atfer_blocks_conv(self.blocks(through))
        joined: Tensor = self.final_conv(torch.cat((around, mixed), dim=1))
        return joined


def _stem(spec: CSPSpec) -> nn.Module:
    width = PLANS[spec.kind].inputs[0]
    if spec.kind == "darknet":
        return conv(spec.conv, spec.in_channels, width, 3)
    layers = replace(spec.conv, same_pad=spec.same_pad)
    if not spec.deep_stem:
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        return nn.Sequential(conv(layers, spec.in_channels, width, 7, stride=2), pool)
    # The library has no max-pool behind a deep stem.
    half = width // 2
    return nn.Sequential(
        conv(layers, spec.in_channels, half, 3, stride=2),
        conv(layers, half, half, 3),
        conv(layers, half, width, 3),
    )


class CSPNet(Backbone):
    """A stem and cross-stage partial stages; keys `stem`, `stages`."""

    def __init__(self, spec: CSPSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = _stem(spec)
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in PLANS[spec.kind].stages())

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for index in range(deepest(nodes) + 1):
            maps = self.stages[index](maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the stem and `stages.0` to `stages.{k}`."""
        return frozen_by_stage(self, freeze, lambda k: ["stem", *(f"stages.{i}" for i in range(k + 1))])


# --- mmpretrain.CSPDarkNet, CSPResNet, CSPResNeXt -------------------------------------------------


class CSPConfig(OpenMMLabConfig):
    """The keys of all three types."""

    NETWORK: ClassVar[str] = "CSPNet"
    KIND: ClassVar[Kind]

    in_channels: InputChannels = 3
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="-1 nothing, k the stem and stages 0 to k."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="LeakyReLU")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        plan = PLANS[self.KIND]
        if self.frozen_stages >= len(plan.outputs):
            yield (
                "frozen_stages",
                f"{self.frozen_stages} is more than the last stage, {len(plan.outputs) - 1}",
            )
        inner = (width for stage in plan.stages() for width in (stage.expanded, stage.hidden, stage.outputs))
        if (fault := norm_fault(self.norm_cfg, (*plan.inputs, *inner))) is not None:
            yield fault

    def spec(self) -> CSPSpec:
        """The neutral spelling."""
        layers = ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec())
        return CSPSpec(self.KIND, layers, self.in_channels)


class CSPDarkNetConfig(CSPConfig):
    """`mmpretrain.CSPDarkNet`, which is also `mmcls.CSPDarkNet`."""

    KIND: ClassVar[Kind] = "darknet"

    depth: Literal[53] = Field(description="Number of layers.")
    out_indices: Indices = Field((4,), description="Stages 0 to 4, at strides 2 to 32.")


class CSPResNetConfig(CSPConfig):
    """`mmpretrain.CSPResNet`, which is also `mmcls.CSPResNet`."""

    KIND: ClassVar[Kind] = "resnet"

    depth: Literal[50] = Field(description="Number of layers.")
    out_indices: Indices = Field((3,), description="Stages 0 to 3, at strides 4 to 32.")
    deep_stem: bool = Field(
        False,
        description="Three 3x3 convolutions in place of the 7x7 and its max-pool: stages at strides 2 to 16.",
    )

    def spec(self) -> CSPSpec:
        """The neutral spelling."""
        return replace(super().spec(), deep_stem=self.deep_stem, same_pad=pads_same(self.conv_cfg))


class CSPResNeXtConfig(CSPResNetConfig):
    """`mmpretrain.CSPResNeXt`, which is also `mmcls.CSPResNeXt`."""

    KIND: ClassVar[Kind] = "resnext"


_TIMM_PARTS = {
    "downsample_conv": "conv_down",
    "expand_conv": "conv_exp",
    "atfer_blocks_conv": "conv_transition_b",
    "final_conv": "conv_transition",
}
CSP_NAMES = Naming(
    "CSPNet",
    own=("mmpretrain",),
    marks=("stages.1.atfer_blocks_conv.conv.weight", "stages.1.final_conv.conv.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    # One convolution in Darknet, a sequence in the others.
                    "stem.0.{part}.{leaf}": "stem.conv1.{part}.{leaf}",
                    **{
                        f"stages.{{s}}.{ours}.{{rest}}": f"stages.{{s}}.{theirs}.{{rest}}"
                        for ours, theirs in _TIMM_PARTS.items()
                    },
                    "stages.{s}.blocks.{b}.conv{k}.weight": "stages.{s}.blocks.{b}.conv{k}.conv.weight",
                    "stages.{s}.blocks.{b}.bn{k}.{leaf}": "stages.{s}.blocks.{b}.conv{k}.bn.{leaf}",
                }
            ),
        ),
    ),
)
CSP_DARKNET_NAMES = Naming(
    "CSPDarkNet",
    own=("mmpretrain",),
    marks=("stem.conv.weight", *CSP_NAMES.marks, "stages.1.blocks.0.conv1.conv.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "stem.{part}.{leaf}": "stem.conv1.{part}.{leaf}",
                    **{
                        f"stages.{{s}}.{ours}.{{rest}}": f"stages.{{s}}.{theirs}.{{rest}}"
                        for ours, theirs in _TIMM_PARTS.items()
                    },
                    "stages.{s}.blocks.{rest}": "stages.{s}.blocks.{rest}",
                }
            ),
        ),
    ),
)


CSP_DARKNET = make_family(
    CSPDarkNetConfig,
    CSPNet,
    example={"depth": 53, "out_indices": [2, 3, 4]},
    architectures=("53",),
    naming=CSP_DARKNET_NAMES,
)
CSP_RESNET = make_family(
    CSPResNetConfig,
    CSPNet,
    example={"depth": 50, "out_indices": [1, 2, 3]},
    architectures=("50",),
    naming=CSP_NAMES,
)
CSP_RESNEXT = make_family(
    CSPResNeXtConfig,
    CSPNet,
    example={"depth": 50, "out_indices": [1, 2, 3]},
    architectures=("50",),
    naming=CSP_NAMES,
)
