"""PoolFormer (Yu et al., arXiv:2111.11418) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices
from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    OpenMMLabConfig,
    Scale,
    deepest,
    frozen_by_stage,
    make_activation,
    make_family,
    map_features,
    named_arch,
    norm_fault,
)
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NARROW, WIDE, RATIOS = (64, 128, 320, 512), (96, 192, 384, 768), (4.0, 4.0, 4.0, 4.0)
# blocks, channels, factors of the feed-forward networks, initial scale of the residual branches
ARCHS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], float]] = {
    "s12": ((2, 2, 6, 2), NARROW, RATIOS, 1e-5),
    "s24": ((4, 4, 12, 4), NARROW, RATIOS, 1e-5),
    "s36": ((6, 6, 18, 6), NARROW, RATIOS, 1e-6),
    "m36": ((6, 6, 18, 6), WIDE, RATIOS, 1e-6),
    "m48": ((8, 8, 24, 8), WIDE, RATIOS, 1e-6),
}


@dataclass(frozen=True)
class PatchSpec:
    """A strided convolution."""

    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class PoolFormerSpec:
    """What decides the numbers and the names of the weights. `outputs` are the layers with an output norm."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    layer_scale: float
    outputs: tuple[int, ...]
    norm: NormSpec
    activation: ActivationSpec
    pool: int = 3
    stem: PatchSpec = PatchSpec(7, 4, 2)
    down: PatchSpec = PatchSpec(3, 2, 1)
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a layer: even ones are stages, odd ones the convolutions between."""
        layers = range(2 * len(self.widths) - 1)
        stages = [(layer + 1) // 2 for layer in layers]
        strides = [self.stem.stride * self.down.stride**stage for stage in stages]
        return map_features([self.widths[stage] for stage in stages], strides)


class PatchEmbed(nn.Module):
    """A strided convolution; key `proj`."""

    def __init__(self, inputs: int, outputs: int, spec: PatchSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, spec.kernel, stride=spec.stride, padding=spec.padding)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        projected: Tensor = self.proj(maps)
        return projected


class Pooling(nn.Module):
    """What a local mean adds to a map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(size, stride=1, padding=size // 2, count_include_pad=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        pooled: Tensor = self.pool(maps)
        return pooled - maps


class FeedForward(nn.Module):
    """Two 1x1 convolutions; keys `fc1`, `fc2`."""

    def __init__(self, width: int, hidden: int, activation: ActivationSpec) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = make_activation(activation)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.fc2(self.act(self.fc1(maps)))
        return mixed


class Block(Scale):
    """Pooling and feed-forward, each with a scaled residual; keys `layer_scale_1`, `norm1`, `norm2`, `mlp`."""

    def __init__(self, spec: PoolFormerSpec, stage: int) -> None:
        super().__init__()
        width = spec.widths[stage]
        self.initial = spec.layer_scale
        self.layer_scale_1 = nn.Parameter(torch.empty(width))
        self.layer_scale_2 = nn.Parameter(torch.empty(width))
        self.norm1 = make_norm(spec.norm, width)
        self.token_mixer = Pooling(spec.pool)
        self.norm2 = make_norm(spec.norm, width)
        self.mlp = FeedForward(width, int(width * spec.ratios[stage]), spec.activation)

    def start(self) -> None:
        """The residual branches begin at the architecture's scale."""
        nn.init.constant_(self.layer_scale_1, self.initial)
        nn.init.constant_(self.layer_scale_2, self.initial)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = maps + self.layer_scale_1[:, None, None] * self.token_mixer(self.norm1(maps))
        mixed: Tensor = maps + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(maps))
        return mixed


class PoolFormer(Backbone):
    """Stages and strided convolutions in one list, `network`; layers that are asked for have a norm."""

    def __init__(self, spec: PoolFormerSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.outputs = spec.outputs
        self.patch_embed = PatchEmbed(spec.in_channels, spec.widths[0], spec.stem)
        layers: list[nn.Module] = []
        for stage, width in enumerate(spec.widths):
            if stage:
                layers.append(PatchEmbed(spec.widths[stage - 1], width, spec.down))
            layers.append(nn.Sequential(*(self.make_block(spec, stage) for _ in range(spec.blocks[stage]))))
        self.network = nn.ModuleList(layers)
        for layer in spec.outputs:
            self.add_module(f"norm{layer}", make_norm(spec.norm, self.features[layer].channels))

    def make_block(self, spec: PoolFormerSpec, stage: int) -> nn.Module:
        """One block of a stage."""
        return Block(spec, stage)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the layers in `nodes`; stops after the deepest of them."""
        maps, found = self.patch_embed(images), {}
        for layer in range(deepest(nodes) + 1):
            maps = self.network[layer](maps)
            if str(layer) in nodes:
                found[str(layer)] = getattr(self, f"norm{layer}")(maps)
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every layer
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is `patch_embed`, k adds `network.0` to `network.{k - 1}` with their output norms."""
        return frozen_by_stage(
            self,
            freeze,
            lambda k: ["patch_embed", *(name for i in range(k) for name in (f"network.{i}", f"norm{i}"))],
        )


# --- mmpretrain.PoolFormer = mmcls.PoolFormer -----------------------------------------------------

Small = Annotated[int, Field(strict=True, ge=1, le=64)]
Padding = Annotated[int, Field(strict=True, ge=0, le=32)]
Width = Annotated[int, Field(strict=True, ge=1, le=2048)]
Ratio = Annotated[float, Field(ge=0.5, le=16)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[Small, ...] = Field(min_length=1, max_length=8)
    embed_dims: tuple[Width, ...] = Field(min_length=1, max_length=8)
    mlp_ratios: tuple[Ratio, ...] = Field(min_length=1, max_length=8)
    layer_scale_init_value: Annotated[float, Field(gt=0, le=100)] = 1e-5


class FormerConfig(OpenMMLabConfig):
    """The keys that PoolFormer and RIFormer have in common."""

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "s12"
    norm_cfg: NormConfig = NormConfig(type="GN", num_groups=1)
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    in_patch_size: Small = 7
    in_stride: Small = 4
    in_pad: Padding = 2
    down_patch_size: Small = 3
    down_stride: Annotated[int, Field(strict=True, ge=1, le=4)] = 2
    down_pad: Padding = 1
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    out_indices: Indices = Field(
        (-1,), description="Layers: 0, 2, 4, 6 are the stages, odd numbers the convolutions between them."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        blocks, widths, ratios, _ = self.plan()
        for key, given in (("layers", blocks), ("mlp_ratios", ratios)):
            if len(given) != len(widths):
                yield f"arch/{key}", f"has {len(given)} entries for {len(widths)} stages"
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def plan(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], float]:
        """Blocks, channels, factors and initial scale."""
        arch = self.arch
        if isinstance(arch, str):
            return ARCHS[arch]
        return arch.layers, arch.embed_dims, arch.mlp_ratios, arch.layer_scale_init_value

    def spec(self) -> PoolFormerSpec:
        """The neutral spelling."""
        blocks, widths, ratios, layer_scale = self.plan()
        stem = PatchSpec(self.in_patch_size, self.in_stride, self.in_pad)
        down = PatchSpec(self.down_patch_size, self.down_stride, self.down_pad)
        norm, act = self.norm_cfg.spec(), self.act_cfg.spec()
        spec = PoolFormerSpec(blocks, widths, ratios, layer_scale, (), norm, act, stem=stem, down=down)
        return replace(spec, outputs=self._outputs([feature.stride or 0 for feature in spec.features()]))

    def _outputs(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Layers with an output norm; of several layers of a stride the deepest is the one that it names."""
        deepest_of = {stride: layer for layer, stride in enumerate(strides)}
        if self.strides is not None:
            return tuple(layer for stride, layer in deepest_of.items() if stride in self.strides)
        return asked_stages(self.out_indices, None, strides)


class PoolFormerConfig(FormerConfig):
    """`mmpretrain.PoolFormer`, which is also `mmcls.PoolFormer`."""

    NETWORK: ClassVar[str] = "PoolFormer"

    pool_size: Annotated[int, Field(strict=True, ge=1, le=31, multiple_of=1)] = 3
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=15)] = Field(
        0, description="-1 nothing, 0 the patch embedding, k adds layers 0 to k-1 with their output norms."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        layers = 2 * len(self.plan()[1]) - 1
        if self.pool_size % 2 == 0:
            yield "pool_size", "must be odd"
        if self.frozen_stages > layers:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {layers} layers"

    def spec(self) -> PoolFormerSpec:
        """The neutral spelling."""
        return replace(super().spec(), pool=self.pool_size)


def may_lack_norms(config: FormerConfig, state: StateDict) -> Callable[[str], bool]:
    """Which output norms a file may leave out."""
    return may_lack_output_norms(state, last=2 * len(config.plan()[1]) - 2)


POOLFORMER_NAMES = Naming(
    "PoolFormer",
    own=("mmpretrain",),
    marks=("patch_embed.proj.weight", "network.0.0.layer_scale_1", "network.6.0.mlp.fc1.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "patch_embed.proj.{leaf}": "stem.conv.{leaf}",
                    "norm6.{leaf}": "head.norm.{leaf}",
                    **{
                        f"network.{2 * s - 1}.proj.{{leaf}}": f"stages.{s}.downsample.conv.{{leaf}}"
                        for s in (1, 2, 3)
                    },
                    **{
                        f"network.{2 * s}.{{b}}.layer_scale_{k}": f"stages.{s}.blocks.{{b}}.layer_scale{k}.scale"
                        for s in range(4)
                        for k in (1, 2)
                    },
                    **{
                        f"network.{2 * s}.{{b}}.{part}.{{leaf}}": f"stages.{s}.blocks.{{b}}.{part}.{{leaf}}"
                        for s in range(4)
                        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
                    },
                }
            ),
        ),
    ),
)


POOLFORMER = make_family(
    PoolFormerConfig,
    PoolFormer,
    example={"arch": "s12", "out_indices": [0, 2, 4, 6]},
    architectures=tuple(ARCHS),
    optional=may_lack_norms,
    naming=POOLFORMER_NAMES,
)
