"""DenseNet (Huang et al., arXiv:1608.06993) with mmpretrain's key names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels
from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_activation,
    make_family,
    map_features,
    named_arch,
    norm_fault,
)
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

# channels that a layer adds, layers of the stages, channels of the stem
ARCHS: dict[str, tuple[int, tuple[int, ...], int]] = {
    "121": (32, (6, 12, 24, 16), 64),
    "169": (32, (6, 12, 32, 32), 64),
    "201": (32, (6, 12, 48, 32), 64),
    "161": (48, (6, 12, 36, 24), 96),
}


@dataclass(frozen=True)
class DenseNetSpec:
    """What decides the numbers and the names of the weights.

    A layer's inner convolution has `bottleneck * growth` channels; a transition keeps `compression` of them.
    """

    growth: int
    depths: tuple[int, ...]
    stem: int
    norm: NormSpec
    activation: ActivationSpec
    in_channels: int = 3
    bottleneck: int = 4
    compression: float = 0.5

    def stages(self) -> tuple[tuple[int, int], ...]:
        """Channels into and out of the layers of each stage."""
        found, inputs = [], self.stem
        for depth in self.depths:
            found.append((inputs, inputs + depth * self.growth))
            inputs = int(found[-1][1] * self.compression)
        return tuple(found)

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage, after its transition: the last stage has no pooling."""
        last = len(self.depths) - 1
        ends = [end for _, end in self.stages()]
        channels = [end if stage == last else int(end * self.compression) for stage, end in enumerate(ends)]
        return map_features(
            channels, [8 * 2 ** min(stage, last - 1) if last else 4 for stage in range(last + 1)]
        )


class DenseLayer(nn.Module):
    """Adds `growth` channels to all before; keys `norm1`, `conv1`, `norm2`, `conv2`."""

    def __init__(self, spec: DenseNetSpec, inputs: int) -> None:
        super().__init__()
        hidden = spec.bottleneck * spec.growth
        self.norm1 = make_norm(spec.norm, inputs)
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.norm2 = make_norm(spec.norm, hidden)
        self.conv2 = nn.Conv2d(hidden, spec.growth, 3, padding=1, bias=False)
        self.act = make_activation(spec.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, inputs + growth, h, w]."""
        added = self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(maps))))))
        return torch.cat((maps, added), dim=1)


class DenseBlock(nn.Module):
    """The layers of a stage; key `block`."""

    def __init__(self, spec: DenseNetSpec, inputs: int, count: int) -> None:
        super().__init__()
        self.block = nn.Sequential(*(DenseLayer(spec, inputs + i * spec.growth) for i in range(count)))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        dense: Tensor = self.block(maps)
        return dense


def _transition(spec: DenseNetSpec, inputs: int, *, last: bool) -> nn.Sequential:
    layers = {"norm": make_norm(spec.norm, inputs), "act": make_activation(spec.activation)}
    if last:
        # The library names the layers of the last one by number.
        return nn.Sequential(*layers.values())
    convolution = nn.Conv2d(inputs, int(inputs * spec.compression), 1, bias=False)
    return nn.Sequential(OrderedDict(**layers, conv=convolution, pool=nn.AvgPool2d(2, stride=2)))


class DenseNet(Backbone):
    """A stem, stages and transitions; keys `stem`, `stages`, `transitions`."""

    def __init__(self, spec: DenseNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = nn.Sequential(
            nn.Conv2d(spec.in_channels, spec.stem, 7, stride=2, padding=3, bias=False),
            make_norm(spec.norm, spec.stem),
            make_activation(spec.activation),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        plan = list(zip(spec.stages(), spec.depths, strict=True))
        self.stages = nn.ModuleList(DenseBlock(spec, inputs, depth) for (inputs, _), depth in plan)
        self.transitions = nn.ModuleList(
            _transition(spec, outputs, last=stage == len(plan) - 1)
            for stage, ((_, outputs), _) in enumerate(plan)
        )

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`, after their transitions; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for stage in range(deepest(nodes) + 1):
            maps = self.transitions[stage](self.stages[stage](maps))
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the first k stages with their transitions; never the stem."""
        return frozen_by_stage(
            self, freeze, lambda k: [f"{part}.{i}" for part in ("stages", "transitions") for i in range(k)]
        )


# --- mmpretrain.DenseNet = mmcls.DenseNet ---------------------------------------------------------


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    growth_rate: Annotated[int, Field(strict=True, ge=1, le=256)]
    depths: tuple[Annotated[int, Field(strict=True, ge=1, le=96)], ...] = Field(min_length=1, max_length=6)
    init_channels: Annotated[int, Field(strict=True, ge=1, le=512)]


class DenseNetConfig(OpenMMLabConfig):
    """`mmpretrain.DenseNet`, which is also `mmcls.DenseNet`."""

    NETWORK: ClassVar[str] = "DenseNet"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "121"
    in_channels: InputChannels = 3
    bn_size: Annotated[int, Field(strict=True, ge=1, le=16)] = 4
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="Training only; changes nothing here."
    )
    compression_factor: Annotated[float, Field(ge=0.1, le=1)] = 0.5
    memory_efficient: bool = Field(False, description="Saves memory in training; changes nothing here.")
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")
    out_indices: Indices = Field(
        (-1,), description="Stages, each after its transition: 0, 1, 2, 3 are at strides 8, 16, 32, 32."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=6)] = Field(
        0, description="k freezes the first k stages with their transitions, never the stem."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        if self.frozen_stages > len(spec.depths):
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(spec.depths)} stages"
        widths = [spec.stem, spec.growth, *(width for pair in spec.stages() for width in pair)]
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def spec(self) -> DenseNetSpec:
        """The neutral spelling."""
        arch = self.arch
        growth, depths, stem = (
            ARCHS[arch] if isinstance(arch, str) else (arch.growth_rate, arch.depths, arch.init_channels)
        )
        return DenseNetSpec(
            growth,
            depths,
            stem,
            self.norm_cfg.spec(),
            self.act_cfg.spec(),
            self.in_channels,
            self.bn_size,
            self.compression_factor,
        )


_TORCHVISION = {
    "stem.0.{leaf}": "features.conv0.{leaf}",
    "stem.1.{leaf}": "features.norm0.{leaf}",
    "transitions.3.0.{leaf}": "features.norm5.{leaf}",
    "transitions.{s}.{rest}": "features.transition{s+1}.{rest}",
}
_LAYER = "features.denseblock{s+1}.denselayer{b+1}."
DENSENET_NAMES = Naming(
    "DenseNet",
    own=("mmpretrain",),
    marks=("stem.0.weight", "stages.0.block.0.conv1.weight", "transitions.0.conv.weight"),
    layouts=tuple(
        KeyLayout(
            library,
            (
                *rules({**_TORCHVISION, "stages.{s}.block.{b}.{rest}": _LAYER + "{rest}"}),
                # torchvision's own files, which are older than what loads them
                *rules({"stages.{s}.block.{b}.norm{k}.{leaf}": _LAYER + "norm.{k}.{leaf}"}),
                *rules({"stages.{s}.block.{b}.conv{k}.{leaf}": _LAYER + "conv.{k}.{leaf}"}),
            ),
        )
        for library in ("torchvision", "timm")
    ),
)


DENSENET = make_family(
    DenseNetConfig,
    DenseNet,
    example={"arch": "121", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    naming=DENSENET_NAMES,
)
