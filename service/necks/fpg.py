"""FPG, feature pyramid grids (Chen et al., arXiv:2004.03580), as mmdet has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec
from service.necks.base import Neck
from service.necks.fpn import ALIGNED, PyramidConfig
from service.necks.layers import Order, OrderedConv
from service.necks.openmmlab import (
    MAX_LEVELS,
    PlainConvConfig,
    Width,
    activation_spec,
    make_neck_family,
    norm_spec,
)

Direction = Literal["bu", "td"]

# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransitionSpec:
    """A convolution between two places of the grid; `scale` enlarges the level before, None leaves its size."""

    kernel: int
    stride: int
    padding: int | None
    bias: bool | None
    norm: NormSpec | None
    activation: ActivationSpec
    order: Order
    scale: float | None = None
    mode: str = "nearest"
    align_corners: bool | None = None

    def conv(self, inputs: int, outputs: int) -> OrderedConv:
        """The convolution."""
        return OrderedConv(
            inputs,
            outputs,
            self.kernel,
            order=self.order,
            stride=self.stride,
            padding=self.padding,
            bias=self.bias,
            norm=self.norm,
            activation=self.activation,
        )

    def make(self, inputs: int, outputs: int) -> nn.Module:
        """The convolution, and what comes before it."""
        return self.conv(inputs, outputs) if self.scale is None else Enlarging(self, inputs, outputs)


class Enlarging(nn.Module):
    """A level enlarged before its convolution; key `conv`."""

    def __init__(self, spec: TransitionSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spec = spec
        self.conv = spec.conv(inputs, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h * scale, w * scale]."""
        spec = self.spec
        enlarged = F.interpolate(
            maps, scale_factor=spec.scale, mode=spec.mode, align_corners=spec.align_corners
        )
        found: Tensor = self.conv(enlarged)
        return found


class Output(nn.Module):
    """What comes out of a level; key `conv_out`."""

    def __init__(self, spec: TransitionSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_out = spec.conv(inputs, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        found: Tensor = self.conv_out(maps)
        return found


@dataclass(frozen=True)
class Transitions:
    """What leads to a place of the grid: within its stage from the level below (`same_up`) or above (`same_down`),
    from the stage before, and from the first one (`across_skip`).
    """

    same_up: TransitionSpec | None
    same_down: TransitionSpec | None
    across_lateral: TransitionSpec
    across_down: TransitionSpec | None
    across_up: TransitionSpec | None
    across_skip: TransitionSpec | None


@dataclass(frozen=True)
class FPGSpec:
    """What decides the numbers and the names of the weights.

    `widths` are of the grid's levels; `skips` says of each level which stages leave it as it is.
    """

    used: tuple[int, ...]
    start: int
    widths: tuple[int, ...]
    outputs: int
    paths: tuple[Direction, ...]
    skips: tuple[tuple[int, ...], ...]
    transitions: Transitions
    output: TransitionSpec
    convolved_extra: bool


class Place(nn.Module):
    """A place of the grid: what leads to it, by the keys of `Transitions`."""

    def __init__(self, spec: FPGSpec, level: int) -> None:
        super().__init__()
        steps, own = spec.transitions, spec.widths[level]
        below = spec.widths[level - 1]  # of the first level mmdet takes the last
        is_first, is_last = level == 0, level == len(spec.widths) - 1
        above = own if is_last else spec.widths[level + 1]
        leading = {
            "same_up": (None if is_first else steps.same_up, below),
            "same_down": (None if is_last else steps.same_down, above),
            "across_lateral": (steps.across_lateral, own),
            "across_down": (None if is_last else steps.across_down, above),
            "across_up": (None if is_first else steps.across_up, below),
            "across_skip": (steps.across_skip, below),
        }
        for name, (step, inputs) in leading.items():
            self.add_module(name, None if step is None else step.make(inputs, own))

    def forward(self, sources: dict[str, Tensor]) -> Tensor:
        """The sum of what leads here; of `sources` that no transition takes nothing is used."""
        found: Tensor | None = None
        for name, maps in sources.items():
            transition = getattr(self, name)
            if transition is not None:
                taken = transition(maps)
                found = taken if found is None else found + taken
        if found is None:
            raise ValueError("nothing leads to a place of the grid")
        return found


class FPG(Neck):
    """Keys `lateral_convs.{i}`, `extra_downsamples.{i}`, `fpn_transitions.{stage}.{level}`, `output_transition.{i}`."""

    def __init__(self, spec: FPGSpec) -> None:
        super().__init__()
        self.spec = spec
        widths, used = spec.widths, len(spec.used)
        self.lateral_convs = nn.ModuleList(
            nn.Conv2d(inputs, width, 1) for inputs, width in zip(spec.used, widths, strict=False)
        )
        self.extra_downsamples = nn.ModuleList(self._extra(level) for level in range(used, len(widths)))
        self.fpn_transitions = nn.ModuleList(
            nn.ModuleList(self._place(stage, level) for level in range(len(widths)))
            for stage in range(len(spec.paths))
        )
        self.output_transition = nn.ModuleList(Output(spec.output, width, spec.outputs) for width in widths)

    def _extra(self, level: int) -> nn.Module:
        if not self.spec.convolved_extra:
            return nn.MaxPool2d(1, stride=2)
        below, width = self.spec.widths[level - 1 : level + 1]
        return nn.Conv2d(below, width, 3, stride=2, padding=1)

    def _place(self, stage: int, level: int) -> nn.Module:
        return nn.Identity() if stage in self.spec.skips[level] else Place(self.spec, level)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, outputs, h_i, w_i] for the levels used and the extra ones."""
        used = features[self.spec.start : self.spec.start + len(self.lateral_convs)]
        first = [conv(maps) for conv, maps in zip(self.lateral_convs, used, strict=True)]
        for downsample in self.extra_downsamples:
            first.append(downsample(first[-1]))
        levels = first
        for stage, direction in enumerate(self.spec.paths):
            levels = self._stage(stage, direction, levels, first)
        return [out(maps) for out, maps in zip(self.output_transition, levels, strict=True)]

    def _stage(
        self, stage: int, direction: Direction, before: list[Tensor], first: list[Tensor]
    ) -> list[Tensor]:
        places, same = list(self.fpn_transitions[stage].children()), "same_down"
        if direction == "bu":
            same = "same_up"
        last = len(before) - 1
        made: list[Tensor] = []
        for step in range(last + 1):
            level = step if direction == "bu" else last - step
            if stage in self.spec.skips[step]:  # on the way down too mmdet counts steps here, not levels
                made.append(before[step])
                continue
            sources = {same: made[-1]} if made else {}
            sources["across_lateral"] = before[level]
            if level > 0:
                sources["across_up"] = before[level - 1]
            if level < last:
                sources["across_down"] = before[level + 1]
            sources["across_skip"] = first[level]
            made.append(places[level](sources))
        return made if direction == "bu" else made[::-1]


# --- spellings ------------------------------------------------------------------------------------

Kernel = Annotated[int, Field(strict=True, ge=1, le=11)]
Steps = tuple[Literal["conv", "norm", "act"], Literal["conv", "norm", "act"], Literal["conv", "norm", "act"]]
RELU = ActivationConfig(type="ReLU")


class _TransitionConfig(BaseModel):
    """What all transitions take: keys of mmcv's `ConvModule`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conv_cfg: PlainConvConfig | None = None
    norm_cfg: NormConfig | None = None
    act_cfg: ActivationConfig | None = RELU
    bias: bool | Literal["auto"] = Field("auto", description="auto: where there is no norm.")
    inplace: bool = Field(True, description="Saves memory; changes nothing here.")
    order: Steps = Field(
        ("conv", "norm", "act"), description="Convolution, norm and activation in this order."
    )

    def made(self, kernel: int, stride: int, padding: int | None) -> TransitionSpec:
        """The neutral spelling of a convolution of this size."""
        return TransitionSpec(
            kernel,
            stride,
            padding,
            None if self.bias == "auto" else self.bias,
            norm_spec(self.norm_cfg),
            activation_spec(self.act_cfg),
            self.order,
        )


class ConvTransitionConfig(_TransitionConfig):
    """`dict(type='conv', kernel_size=…)`."""

    type: Literal["conv"]
    kernel_size: Kernel
    stride: Annotated[int, Field(strict=True, ge=1, le=4)] = 1
    padding: Annotated[int, Field(strict=True, ge=0, le=8)] = 0

    def spec(self) -> TransitionSpec:
        """The neutral spelling."""
        return self.made(self.kernel_size, self.stride, self.padding)


class EnlargingTransitionConfig(_TransitionConfig):
    """`dict(type='interpolation_conv')`."""

    type: Literal["interpolation_conv"]
    kernel_size: Kernel = 3
    scale_factor: Annotated[float, Field(ge=1, le=4)] = 2
    mode: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"] = "nearest"
    align_corners: bool | None = None

    def spec(self) -> TransitionSpec:
        """The neutral spelling."""
        made = self.made(self.kernel_size, 1, None)
        return replace(made, scale=self.scale_factor, mode=self.mode, align_corners=self.align_corners)


class OutputTransitionConfig(_TransitionConfig):
    """`dict(type='last_conv')`."""

    type: Literal["last_conv"]
    kernel_size: Kernel = 3

    def spec(self) -> TransitionSpec:
        """The neutral spelling."""
        return self.made(self.kernel_size, 1, None)


TransitionConfig = Annotated[ConvTransitionConfig | EnlargingTransitionConfig, Field(discriminator="type")]
Stages = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0, lt=MAX_LEVELS)], ...], Field(max_length=MAX_LEVELS)
]
TRANSITIONS = (
    "same_up_trans",
    "same_down_trans",
    "across_lateral_trans",
    "across_down_trans",
    "across_up_trans",
    "across_skip_trans",
)


class FPGConfig(PyramidConfig):
    """`mmdet.FPG`."""

    NETWORK: ClassVar[str] = "FPG"
    VIEW: ClassVar[frozenset[str]] = PyramidConfig.VIEW | {"norm_cfg"}

    conv_cfg: None = None
    norm_cfg: NormConfig | None = Field(
        None, description="mmdet does not use it: transitions have their own."
    )
    stack_times: Annotated[int, Field(strict=True, ge=1, le=MAX_LEVELS)] = Field(
        description="Stages behind each other."
    )
    paths: Annotated[tuple[Direction, ...], Field(max_length=MAX_LEVELS)] = Field(
        description="The way of each stage: bu from below up, td down."
    )
    inter_channels: Width | Annotated[tuple[Width, ...], Field(max_length=MAX_LEVELS)] | None = Field(
        None, description="Channels of the grid's levels; null is out_channels."
    )
    same_down_trans: TransitionConfig | None = Field(None, description="From the level above in a stage.")
    same_up_trans: TransitionConfig | None = Field(
        ConvTransitionConfig(type="conv", kernel_size=3, stride=2, padding=1),
        description="From the level below in a stage.",
    )
    across_lateral_trans: TransitionConfig = Field(
        ConvTransitionConfig(type="conv", kernel_size=1), description="From the level in the stage before."
    )
    across_down_trans: TransitionConfig | None = Field(
        ConvTransitionConfig(type="conv", kernel_size=3),
        description="From the level above in the stage before.",
    )
    across_up_trans: TransitionConfig | None = Field(
        None, description="From the level below in the stage before."
    )
    across_skip_trans: TransitionConfig | None = Field(
        description="From the level as it is before the stages; mmdet's default (identity) is not one it builds."
    )
    output_trans: OutputTransitionConfig = OutputTransitionConfig(type="last_conv")
    add_extra_convs: bool = Field(False, description="Extra levels by convolutions, not by pools.")
    skip_inds: Annotated[tuple[Stages, ...], Field(min_length=1, max_length=MAX_LEVELS)] = Field(
        description="Of each level, the stages that leave it as it is."
    )

    def widths(self) -> tuple[int, ...]:
        """Channels of the grid's levels."""
        if isinstance(self.inter_channels, tuple):
            return self.inter_channels
        return (self.inter_channels or self.out_channels,) * self.num_outs

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        if len(self.paths) != self.stack_times:
            yield "paths", f"has {len(self.paths)} entries for {self.stack_times} stages"
        if len(self.widths()) != self.num_outs:
            yield "inter_channels", f"has {len(self.widths())} entries for {self.num_outs} levels"
        if len(self.skip_inds) < self.num_outs:
            yield "skip_inds", f"has {len(self.skip_inds)} entries for {self.num_outs} levels"
        elif len(self.skip_inds[0]) > self.stack_times:
            yield "skip_inds/0", f"has more entries than the {self.stack_times} stages"
        else:
            yield from self._way_faults()
        for key in (*TRANSITIONS, "output_trans"):
            yield from self._transition_faults(key)

    def _way_faults(self) -> Iterator[tuple[str, str]]:
        """A stage on the way down counts its skips by steps, and may lead to a level that it leaves out."""
        for stage, direction in enumerate(self.paths):
            skipped = [stage in self.skip_inds[level] for level in range(self.num_outs)]
            reversed_ways = zip(skipped, reversed(skipped), strict=True)
            if direction == "td" and any(not step and level for step, level in reversed_ways):
                yield "skip_inds", f"stage {stage} goes down through levels that it skips"

    def _transition_faults(self, key: str) -> Iterator[tuple[str, str]]:
        given = getattr(self, key)
        if given is None:
            return
        if len(set(given.order)) < len(given.order):
            yield f"{key}/order", "names a step twice"
        for name, detail in self.norm_faults(given.norm_cfg, [*self.widths(), self.out_channels]):
            yield f"{key}/{name}", detail
        enlarging = isinstance(given, EnlargingTransitionConfig)
        if enlarging and given.align_corners is not None and given.mode not in ALIGNED:
            yield f"{key}/align_corners", f"is not for {given.mode}"

    def spec(self) -> FPGSpec:
        """The neutral spelling."""
        return FPGSpec(
            self.in_channels[self.start_level : self.end()],
            self.start_level,
            self.widths(),
            self.out_channels,
            self.paths,
            self.skip_inds[: self.num_outs],
            Transitions(
                same_up=_optional(self.same_up_trans),
                same_down=_optional(self.same_down_trans),
                across_lateral=self.across_lateral_trans.spec(),
                across_down=_optional(self.across_down_trans),
                across_up=_optional(self.across_up_trans),
                across_skip=_optional(self.across_skip_trans),
            ),
            self.output_trans.spec(),
            self.add_extra_convs,
        )


def _optional(given: ConvTransitionConfig | EnlargingTransitionConfig | None) -> TransitionSpec | None:
    return None if given is None else given.spec()


CONV: dict[str, Any] = {"kernel_size": 1, "norm_cfg": {"type": "BN"}, "order": ["act", "conv", "norm"]}
FPG_FAMILY = make_neck_family(
    FPGConfig,
    FPG,
    example={
        "in_channels": [256, 512, 1024, 2048],
        "out_channels": 256,
        "num_outs": 5,
        "stack_times": 2,
        "paths": ["bu", "bu"],
        "across_lateral_trans": {**CONV, "type": "conv"},
        "across_down_trans": {**CONV, "type": "interpolation_conv", "kernel_size": 3},
        "across_skip_trans": {**CONV, "type": "conv"},
        "skip_inds": [[0], [0], [0], [], []],
    },
)
