"""HorNet (Rao et al., arXiv:2207.14284) with mmpretrain's key names: gates upon gates from large neighbourhoods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.convnext import first_stages
from service.backbones.efficientformer import MapScale
from service.backbones.openmmlab import (
    Computed,
    Scale,
    SpecConfig,
    deepest,
    frozen_by_stage,
    make_family,
    named_arch,
)
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.backbones.vision_transformer import LayerScale
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

STRIDES = (4, 8, 16, 32)
STAGES = len(STRIDES)
EPS = 1e-6
LAYER_SCALE = 1e-5

Side = Annotated[int, Field(strict=True, ge=1, le=256)]


class DepthwiseConfig(BaseModel):
    """A neighbourhood of `kernel_size`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["DW"]
    kernel_size: Annotated[int, Field(strict=True, ge=1, le=63)]
    bias: bool = True


class GlobalConfig(BaseModel):
    """Half of the channels see the whole map, by a filter of its frequencies that is learnt as `h` times `w`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["GF"]
    h: Side = 14
    w: Side = 8


Filter = Annotated[DepthwiseConfig | GlobalConfig, Field(discriminator="type")]
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Order = Annotated[int, Field(strict=True, ge=1, le=8)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_dim: Annotated[int, Field(strict=True, ge=1, le=512)]
    depths: tuple[Count, Count, Count, Count]
    orders: tuple[Order, Order, Order, Order]
    dw_cfg: tuple[Filter, Filter, Filter, Filter]


LOCAL = DepthwiseConfig(type="DW", kernel_size=7)
FILTERS: dict[str, tuple[Filter, Filter, Filter, Filter]] = {
    "": (LOCAL, LOCAL, LOCAL, LOCAL),
    "-gf": (LOCAL, LOCAL, GlobalConfig(type="GF", h=14, w=8), GlobalConfig(type="GF", h=7, w=4)),
    "-gf384": (LOCAL, LOCAL, GlobalConfig(type="GF", h=24, w=12), GlobalConfig(type="GF", h=13, w=7)),
}
ARCHS: dict[str, ArchConfig] = {
    f"{name}{suffix}": ArchConfig(
        base_dim=width, depths=(2, 3, 18, 2), orders=(2, 3, 4, 5), dw_cfg=FILTERS[suffix]
    )
    for names, width, suffixes in (
        (("t", "tiny"), 64, ("", "-gf")),
        (("s", "small"), 96, ("", "-gf")),
        (("b", "base"), 128, ("", "-gf", "-gf384")),
        (("l", "large"), 192, ("", "-gf", "-gf384")),
    )
    for suffix in suffixes
    for name in names
}


@dataclass(frozen=True)
class FilterSpec:
    """A depthwise convolution of `kernel`; where that is 0, a filter of `size` frequencies."""

    kernel: int = 0
    bias: bool = True
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class HorNetSpec:
    """What decides the numbers and the names of the weights.

    `outputs` are the stages with an output norm. `pooled` outputs are means over the map, normed after. `scale` is what
    gates are multiplied with.
    """

    width: int
    depths: tuple[int, ...]
    orders: tuple[int, ...]
    filters: tuple[FilterSpec, ...]
    outputs: tuple[int, ...]
    pooled: bool
    scale: float = 1 / 3
    layer_scale: bool = True
    in_channels: int = 3

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(self.width * 2**stage for stage in range(STAGES))

    def features(self) -> tuple[FeatureInfo, ...]:
        """One feature a stage."""
        return tuple(
            FeatureInfo(stage, str(stage), width, None, "NC")
            if self.pooled
            else FeatureInfo(stage, str(stage), width, STRIDES[stage], "NCHW")
            for stage, width in enumerate(self.widths())
        )


class MapNorm(Scale, Computed):
    """Layer norm over the channels of a map; keys `weight`, `bias`.

    The library's is none of torch's norms either, so that what it freezes lists no norms in eval mode.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def start(self) -> None:
        """1 and 0 at first."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def compute(self) -> None:
        """The same where a file lacks an output's norm."""
        self.start()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return self.norm_last(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def norm_last(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        return F.layer_norm(maps, self.weight.shape, self.weight, self.bias, EPS)


class GlobalFilter(Scale):
    """Half of the channels see their neighbours, half the whole map; keys `complex_weight`, `dw`, `pre_norm`, …."""

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        half = width // 2
        self.complex_weight = nn.Parameter(torch.empty(half, *size, 2))
        self.dw = nn.Conv2d(half, half, 3, padding=1, bias=False, groups=half)
        self.pre_norm = MapNorm(width)
        self.post_norm = MapNorm(width)

    def start(self) -> None:
        """Frequencies hardly pass at first."""
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        near, far = self.pre_norm(maps).chunk(2, dim=1)
        both = torch.stack((self.dw(near), self._filtered(far)), dim=2)
        normed: Tensor = self.post_norm(both.flatten(1, 2))
        return normed

    def _filtered(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape, by way of its frequencies, which need full precision."""
        frequencies = torch.fft.rfft2(maps.float(), norm="ortho")
        weight = self.complex_weight.float()
        if weight.shape[1:3] != frequencies.shape[2:]:
            parts = weight.permute(3, 0, 1, 2)
            size = frequencies.shape[2:]
            resized = F.interpolate(parts, size=size, mode="bilinear", align_corners=True)
            weight = resized.permute(1, 2, 3, 0)
        filtered = frequencies * torch.view_as_complex(weight.contiguous())
        back: Tensor = torch.fft.irfft2(filtered, s=maps.shape[2:], norm="ortho")
        return back.to(maps.dtype)


def make_filter(spec: FilterSpec, width: int) -> nn.Module:
    """What gates are made of."""
    if spec.kernel:
        return nn.Conv2d(width, width, spec.kernel, padding=spec.kernel // 2, groups=width, bias=spec.bias)
    return GlobalFilter(width, spec.size)


class GatedConvolution(nn.Module):
    """Few channels gated, widened, gated again; keys `proj_in`, `dwconv`, `proj_out`, `projs`."""

    def __init__(self, spec: HorNetSpec, stage: int) -> None:
        super().__init__()
        width, self.scale = spec.widths()[stage], spec.scale
        self.widths = [width // 2**order for order in reversed(range(spec.orders[stage]))]
        self.proj_in = nn.Conv2d(width, 2 * width, 1)
        self.dwconv = make_filter(spec.filters[stage], sum(self.widths))
        self.proj_out = nn.Conv2d(width, width, 1)
        self.projs = nn.ModuleList(nn.Conv2d(inputs, 2 * inputs, 1) for inputs in self.widths[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        projected, first = self.proj_in(maps), self.widths[0]
        gates = self.dwconv(projected[:, first:]) * self.scale
        mixed = projected[:, :first] * gates[:, :first]
        start = first
        for widen in self.projs:
            wide = widen(mixed)
            mixed = wide * gates[:, start : start + wide.shape[1]]
            start += wide.shape[1]
        output: Tensor = self.proj_out(mixed)
        return output


class Block(nn.Module):
    """A gated convolution and feed-forward, each with a scaled residual; keys `norm1`, `gnconv`, …, `gamma2`."""

    def __init__(self, spec: HorNetSpec, stage: int) -> None:
        super().__init__()
        width = spec.widths()[stage]
        self.norm1 = MapNorm(width)
        self.gnconv = GatedConvolution(spec, stage)
        self.norm2 = MapNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma1 = MapScale(width, LAYER_SCALE) if spec.layer_scale else nn.Identity()
        self.gamma2 = LayerScale(width, LAYER_SCALE) if spec.layer_scale else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = maps + self.gamma1(self.gnconv(self.norm1(maps)))
        normed = self.norm2.norm_last(maps.permute(0, 2, 3, 1))
        mixed = self.gamma2(self.pwconv2(F.gelu(self.pwconv1(normed))))
        residual: Tensor = maps + mixed.permute(0, 3, 1, 2)
        return residual


def _downsample(spec: HorNetSpec, stage: int) -> nn.Sequential:
    width = spec.widths()[stage]
    if stage == 0:
        return nn.Sequential(nn.Conv2d(spec.in_channels, width, 4, stride=4), MapNorm(width))
    return nn.Sequential(MapNorm(width // 2), nn.Conv2d(width // 2, width, 2, stride=2))


class HorNet(Backbone):
    """Keys `downsample_layers`, `stages`, and `norm0` … of the outputs."""

    def __init__(self, spec: HorNetSpec) -> None:
        super().__init__()
        self.pooled = spec.pooled
        self.features = spec.features()
        stages = range(STAGES)
        self.downsample_layers = nn.ModuleList(_downsample(spec, stage) for stage in stages)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(spec, stage) for _ in range(spec.depths[stage]))) for stage in stages
        )
        for stage in spec.outputs:
            self.add_module(f"norm{stage}", MapNorm(spec.widths()[stage]))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Features of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for stage in range(deepest(nodes) + 1):
            maps = self.stages[stage](self.downsample_layers[stage](maps))
            if str(stage) in nodes:
                output = maps.mean((2, 3), keepdim=True) if self.pooled else maps
                normed = self.get_submodule(f"norm{stage}")(output)
                found[str(stage)] = normed.flatten(1) if self.pooled else normed.contiguous()
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is stages 0 to k with their downsampling, and the norm after that of each output."""
        kept = {
            int(name.removeprefix("norm")) for name, _ in self.named_children() if name.startswith("norm")
        }
        return frozen_by_stage(
            self,
            freeze,
            lambda k: [
                *first_stages(k + 1),
                *(f"norm{stage + 1}" for stage in range(k + 1) if stage in kept),
            ],
        )


# --- mmpretrain.HorNet = mmcls.HorNet -------------------------------------------------------------


class HorNetConfig(SpecConfig):
    """`mmpretrain.HorNet`, which is also `mmcls.HorNet`."""

    NETWORK: ClassVar[str] = "HorNet"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    in_channels: InputChannels = 3
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    scale: Annotated[float, Field(ge=-100, le=100)] = Field(
        1 / 3, description="What gates are multiplied with."
    )
    use_layer_scale: bool = True
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4; each has a norm of its own.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=STAGES - 1)] = Field(
        -1,
        description="-1 nothing, k stages 0 to k with their downsampling. Of an output among them the library freezes "
        "the norm of the next stage, and fails where that is no output.",
    )
    with_cp: bool = Field(False, description="Saves memory in training; changes nothing here.")
    gap_before_final_norm: bool = Field(
        True, description="True returns vectors: means over the map, normed. False returns normed maps."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        for stage, (width, order, filtering) in enumerate(
            zip(spec.widths(), spec.orders, spec.filters, strict=True)
        ):
            smallest = width // 2 ** (order - 1)
            if smallest * 2 ** (order - 1) != width:
                yield f"arch/orders/{stage}", f"{width} channels cannot be halved {order - 1} times"
            if filtering.kernel and filtering.kernel % 2 == 0:
                yield f"arch/dw_cfg/{stage}/kernel_size", f"{filtering.kernel} is even"
            if not filtering.kernel and smallest % 2:
                yield f"arch/dw_cfg/{stage}", f"{2 * width - smallest} channels have no half"
        for stage in spec.outputs:
            if stage <= self.frozen_stages and stage + 1 not in spec.outputs:
                yield "frozen_stages", f"freezing output {stage} needs output {stage + 1}, as in the library"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def spec(self) -> HorNetSpec:
        """The neutral spelling."""
        arch = self.plan()
        return HorNetSpec(
            arch.base_dim,
            arch.depths,
            arch.orders,
            tuple(_filter(config) for config in arch.dw_cfg),
            outputs=asked_stages(self.out_indices, self.strides, STRIDES),
            pooled=self._is_pooled(),
            scale=self.scale,
            layer_scale=self.use_layer_scale,
            in_channels=self.in_channels,
        )

    def _is_pooled(self) -> bool:
        # Who asks for maps by their stride wants maps, unless something else is said.
        unsaid = "gap_before_final_norm" not in self.model_fields_set
        return self.gap_before_final_norm and not (self.strides is not None and unsaid)

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages`."""
        return Freeze(stages=self.frozen_stages if self.frozen_stages >= 0 else None)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def _filter(config: DepthwiseConfig | GlobalConfig) -> FilterSpec:
    if isinstance(config, DepthwiseConfig):
        return FilterSpec(config.kernel_size, config.bias)
    return FilterSpec(size=(config.h, config.w))


def _optional(config: HorNetConfig, state: StateDict) -> Callable[[str], bool]:  # noqa: ARG001 - four stages
    return may_lack_output_norms(state, last=STAGES - 1)


EXAMPLE: dict[str, Any] = {"arch": "tiny", "out_indices": [0, 1, 2, 3], "gap_before_final_norm": False}
HORNET_NAMES = Naming(
    "HorNet",
    own=("mmpretrain",),
    marks=(
        "downsample_layers.0.0.weight",
        "stages.0.0.gnconv.proj_in.weight",
        "stages.0.0.gnconv.projs.0.weight",
    ),
    layouts=(
        KeyLayout(
            "official",
            rules(
                {
                    "downsample_layers.{rest}": "downsample_layers.{rest}",
                    "stages.{s}.{b}.gamma{k}.weight": "stages.{s}.{b}.gamma{k}",
                    "stages.{s}.{b}.gnconv.projs.{rest}": "stages.{s}.{b}.gnconv.pws.{rest}",
                    "stages.{rest}": "stages.{rest}",
                    "norm3.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


HORNET = make_family(
    HorNetConfig, HorNet, example=EXAMPLE, architectures=tuple(ARCHS), optional=_optional, naming=HORNET_NAMES
)
