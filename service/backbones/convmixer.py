"""ConvMixer (Trockman and Kolter, arXiv:2201.09792) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

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
from service.checkpoints.read import StateDict
from service.config.spec import FeatureInfo, Freeze, FreezeReport


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=4096)]
    depth: Annotated[int, Field(strict=True, ge=1, le=64)]
    patch_size: Annotated[int, Field(strict=True, ge=1, le=64)]
    kernel_size: Annotated[int, Field(strict=True, ge=1, le=31)]


ARCHS = {
    "768/32": ArchConfig(embed_dims=768, depth=32, patch_size=7, kernel_size=7),
    "1024/20": ArchConfig(embed_dims=1024, depth=20, patch_size=14, kernel_size=9),
    "1536/20": ArchConfig(embed_dims=1536, depth=20, patch_size=7, kernel_size=9),
}


@dataclass(frozen=True)
class ConvMixerSpec:
    """What decides the numbers and the names of the weights."""

    width: int
    depth: int
    patch: int
    kernel: int
    norm: NormSpec
    activation: ActivationSpec
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a layer, all of one size."""
        return map_features([self.width] * self.depth, [self.patch] * self.depth)


def convolution(spec: ConvMixerSpec, layer: nn.Conv2d) -> nn.Sequential:
    """A convolution, its activation and its norm, as items `0` to `2`."""
    return nn.Sequential(layer, make_activation(spec.activation), make_norm(spec.norm, spec.width))


class Residual(nn.Module):
    """Adds its input to what `fn` gives."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.fn(maps)
        return mixed + maps


def make_layer(spec: ConvMixerSpec) -> nn.Sequential:
    """Mixes positions, then channels; keys `0.fn.0`, `0.fn.2`, `1`, `3`."""
    depthwise = nn.Conv2d(spec.width, spec.width, spec.kernel, groups=spec.width, padding="same")
    pointwise = convolution(spec, nn.Conv2d(spec.width, spec.width, 1))
    return nn.Sequential(Residual(convolution(spec, depthwise)), *pointwise)


class ConvMixer(Backbone):
    """Patches, and layers that keep their number; keys `stem`, `stages`."""

    def __init__(self, spec: ConvMixerSpec) -> None:
        super().__init__()
        self.features = spec.features()
        stem = nn.Conv2d(spec.in_channels, spec.width, spec.patch, stride=spec.patch)
        self.stem = convolution(spec, stem)
        self.stages = nn.Sequential(*(make_layer(spec) for _ in range(spec.depth)))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for layer in range(deepest(nodes) + 1):
            maps = self.stages[layer](maps)
            if str(layer) in nodes:
                found[str(layer)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k freezes the first k layers, never the stem."""
        return frozen_by_stage(self, freeze, lambda k: [f"stages.{layer}" for layer in range(k)])


# --- mmpretrain.ConvMixer = mmcls.ConvMixer -------------------------------------------------------


RELU_WIDTH = 768  # of timm's convmixer_768_32


class ConvMixerConfig(OpenMMLabConfig):
    """`mmpretrain.ConvMixer`, which is also `mmcls.ConvMixer`."""

    NETWORK: ClassVar[str] = "ConvMixer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "768/32"
    in_channels: InputChannels = 3
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    out_indices: Indices = Field((-1,), description="Layers from 0; all maps have the stride of the patches.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        0, description="k freezes the first k layers; the stem is never frozen."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch = self.plan()
        if self.frozen_stages > arch.depth:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {arch.depth} layers"
        if (fault := norm_fault(self.norm_cfg, [arch.embed_dims])) is not None:
            yield fault

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:  # noqa: ARG002 - the width tells
        """timm's smaller network has another activation than OpenMMLab's by default."""
        theirs = "ReLU" if self.plan().embed_dims == RELU_WIDTH else "GELU"
        if library != "timm" or self.act_cfg.type == theirs:
            return None
        return f"timm's ConvMixer of {self.plan().embed_dims} channels has {theirs}; set act_cfg to it"

    def spec(self) -> ConvMixerSpec:
        """The neutral spelling."""
        arch, norm, act = self.plan(), self.norm_cfg.spec(), self.act_cfg.spec()
        shape = (arch.embed_dims, arch.depth, arch.patch_size, arch.kernel_size)
        return ConvMixerSpec(*shape, norm, act, self.in_channels)


CONVMIXER_NAMES = Naming(
    "ConvMixer",
    own=("mmpretrain",),
    marks=("stem.0.weight", "stages.0.0.fn.0.weight"),
    layouts=(KeyLayout("timm", rules({"stages.{rest}": "blocks.{rest}", "stem.{rest}": "stem.{rest}"})),),
)


CONVMIXER = make_family(
    ConvMixerConfig, ConvMixer, naming=CONVMIXER_NAMES, example={"arch": "768/32"}, architectures=tuple(ARCHS)
)
