"""VAN, the visual attention network (Guo et al., arXiv:2202.09741), with mmpretrain's key names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    OpenMMLabConfig,
    Scale,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    named_arch,
)
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

# channels, blocks and factors of the feed-forward networks of the stages
Plan = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
SMALL, WIDE, FACTORS = (32, 64, 160, 256), (64, 128, 320, 512), (8.0, 8.0, 4.0, 4.0)
ARCHS: dict[str, Plan] = {
    name: plan
    for names, plan in (
        # b0 to b6 are the names of mmcls 0.x
        (("t", "tiny", "b0"), (SMALL, (3, 3, 5, 2), FACTORS)),
        (("s", "small", "b1"), (WIDE, (2, 2, 4, 2), FACTORS)),
        (("b", "base", "b2"), (WIDE, (3, 3, 12, 3), FACTORS)),
        (("l", "large", "b3"), (WIDE, (3, 5, 27, 3), FACTORS)),
        (("b4",), (WIDE, (3, 6, 40, 3), FACTORS)),
        (("b5",), ((96, 192, 480, 768), (3, 3, 24, 3), FACTORS)),
        (("b6",), ((96, 192, 384, 768), (6, 6, 90, 6), FACTORS)),
    )
    for name in names
}


@dataclass(frozen=True)
class VANSpec:
    """What decides the numbers and the names of the weights."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    factors: tuple[float, ...]
    patches: tuple[int, ...] = (7, 3, 3, 3)
    in_channels: int = 3
    eps: float = 1e-5

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        return map_features(self.widths, tuple(itertools.accumulate(self.steps(), lambda a, b: a * b)))

    def steps(self) -> tuple[int, ...]:
        """What each stage strides by: patches overlap by half."""
        return tuple(size // 2 + 1 for size in self.patches[: len(self.widths)])


def _depthwise(width: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, width, kernel, padding=kernel // 2 * dilation, dilation=dilation, groups=width)


class LargeKernelAttention(nn.Module):
    """A gate from a 21x21 neighbourhood, in three cheap steps; keys `DW_conv`, `DW_D_conv`, `conv1`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.DW_conv = _depthwise(width, 5)
        self.DW_D_conv = _depthwise(width, 7, 3)
        self.conv1 = nn.Conv2d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        gate: Tensor = self.conv1(self.DW_D_conv(self.DW_conv(maps)))
        return maps * gate


class Attention(nn.Module):
    """The gate between two projections; keys `proj_1`, `spatial_gating_unit`, `proj_2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LargeKernelAttention(width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(maps))))
        return maps + mixed


class FeedForward(nn.Module):
    """Two 1x1 convolutions around a depthwise one; keys `fc1`, `dwconv`, `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = _depthwise(hidden, 3)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.fc2(self.act(self.dwconv(self.fc1(maps))))
        return mixed


class Block(Scale):
    """Attention and feed-forward, each with a scaled residual; keys `layer_scale_1`, `norm1`, `attn`, …."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.empty(width))
        self.layer_scale_2 = nn.Parameter(torch.empty(width))
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = Attention(width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = FeedForward(width, int(width * factor))

    def start(self) -> None:
        """The residual branches begin small."""
        nn.init.constant_(self.layer_scale_1, 1e-2)
        nn.init.constant_(self.layer_scale_2, 1e-2)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = maps + self.layer_scale_1[:, None, None] * self.attn(self.norm1(maps))
        mixed: Tensor = maps + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(maps))
        return mixed


class PatchEmbed(nn.Module):
    """A strided convolution and its norm; keys `projection`, `norm`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        normed: Tensor = self.norm(self.projection(maps))
        return normed


class VAN(Backbone):
    """Stages `patch_embed{k}`, `blocks{k}`, `norm{k}`, counted from 1."""

    def __init__(self, spec: VANSpec) -> None:
        super().__init__()
        self.features = spec.features()
        inputs = spec.in_channels
        for stage, width in enumerate(spec.widths):
            number = stage + 1
            embed = PatchEmbed(inputs, width, spec.patches[stage], spec.steps()[stage])
            self.add_module(f"patch_embed{number}", embed)
            blocks = (Block(width, spec.factors[stage]) for _ in range(spec.blocks[stage]))
            self.add_module(f"blocks{number}", nn.ModuleList(blocks))
            self.add_module(f"norm{number}", nn.LayerNorm(width, eps=spec.eps))
            inputs = width

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for stage in range(deepest(nodes) + 1):
            maps = getattr(self, f"patch_embed{stage + 1}")(maps)
            for block in getattr(self, f"blocks{stage + 1}"):
                maps = block(maps)
            normed = getattr(self, f"norm{stage + 1}")(maps.permute(0, 2, 3, 1))
            maps = normed.permute(0, 3, 1, 2).contiguous()
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the stages of index 0 to k. `norm_cfg` is of the norms behind stages only."""
        parts = ("patch_embed", "blocks", "norm")
        return frozen_by_stage(
            self,
            freeze,
            lambda k: [f"{part}{number}" for number in range(1, k + 2) for part in parts],
            configured=[f"norm{number}" for number in range(1, len(self.features) + 1)],
        )


# --- mmpretrain.VAN = mmcls.VAN -------------------------------------------------------------------

Width = Annotated[int, Field(strict=True, ge=1, le=2048)]
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Factor = Annotated[float, Field(ge=0.5, le=16)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: tuple[Width, ...] = Field(min_length=1, max_length=4)
    depths: tuple[Count, ...] = Field(min_length=1, max_length=4)
    ffn_ratios: tuple[Factor, ...] = Field(min_length=1, max_length=4)


class NothingConfig(BaseModel):
    """A key of which only the empty object is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VANConfig(OpenMMLabConfig):
    """`mmpretrain.VAN`, which is also `mmcls.VAN`."""

    NETWORK: ClassVar[str] = "VAN"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    patch_sizes: tuple[Annotated[int, Field(strict=True, ge=1, le=31)], ...] = Field(
        (7, 3, 3, 3),
        min_length=1,
        max_length=4,
        description="Kernels of the strided convolutions, which stride by half of it and 1.",
    )
    in_channels: InputChannels = 3
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=3)] = Field(
        -1, description="-1 nothing, k the stages 0 to k."
    )
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    block_cfgs: NothingConfig = NothingConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        stages = len(spec.widths)
        for key, given in (("depths", spec.blocks), ("ffn_ratios", spec.factors)):
            if len(given) != stages:
                yield f"arch/{key}", f"has {len(given)} entries for {stages} stages"
        if len(self.patch_sizes) < stages:
            yield "patch_sizes", f"has {len(self.patch_sizes)} entries for {stages} stages"
        if self.frozen_stages >= stages:
            yield "frozen_stages", f"{self.frozen_stages} is not a stage of 0 to {stages - 1}"

    def spec(self) -> VANSpec:
        """The neutral spelling."""
        arch = self.arch
        plan = ARCHS[arch] if isinstance(arch, str) else (arch.embed_dims, arch.depths, arch.ffn_ratios)
        return VANSpec(*plan, self.patch_sizes, self.in_channels, self.norm_cfg.eps)


VAN_NAMES = Naming(
    "VAN",
    own=("mmpretrain",),
    marks=("patch_embed1.projection.weight", "blocks1.0.attn.spatial_gating_unit.DW_D_conv.weight"),
    layouts=(
        KeyLayout(
            "official",
            rules(
                {
                    "patch_embed{s}.projection.{leaf}": "patch_embed{s}.proj.{leaf}",
                    "patch_embed{s}.norm.{leaf}": "patch_embed{s}.norm.{leaf}",
                    **below(
                        "blocks{s}.{b}.",
                        "block{s}.{b}.",
                        {
                            "attn.spatial_gating_unit.DW_conv.{leaf}": "attn.spatial_gating_unit.conv0.{leaf}",
                            "attn.spatial_gating_unit.DW_D_conv.{leaf}": "attn.spatial_gating_unit.conv_spatial.{leaf}",
                            "mlp.dwconv.{leaf}": "mlp.dwconv.dwconv.{leaf}",
                            "{rest}": "{rest}",
                        },
                    ),
                    "norm{s}.{leaf}": "norm{s}.{leaf}",
                }
            ),
        ),
    ),
)


VAN_FAMILY = make_family(
    VANConfig,
    VAN,
    example={"arch": "tiny", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    naming=VAN_NAMES,
)
