"""Twins-PCPVT and Twins-SVT (Chu et al., arXiv:2104.13840) with mmpretrain's key names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationSpec,
    SpecConfig,
    deepest,
    make_family,
    map_features,
    named_arch,
)
from service.backbones.swin import cut_windows, join_windows
from service.backbones.tracing import at_least_zero, ceil_div, is_tracing
from service.backbones.transformer_layers import FeedForward, by_head
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import TooLarge

GELU = ActivationSpec("gelu")
HIDDEN = -1000.0  # added to the attention between what is and what is not padding
MAX_PAIRS = 2**30  # of positions that attend to each other: 2048 px in the named architectures


@dataclass(frozen=True)
class Plan:
    """What the stages are made of, one entry a stage; `windows` is empty in PCPVT."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    patches: tuple[int, ...] = (4, 2, 2, 2)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    ratios: tuple[int, ...] = (4, 4, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    windows: tuple[int, ...] = ()


def _pcpvt(*depths: int) -> Plan:
    return Plan((64, 128, 320, 512), depths, (1, 2, 5, 8), ratios=(8, 8, 4, 4))


def _svt(width: int, heads: int, *depths: int) -> Plan:
    factors = (1, 2, 4, 8)
    widths, all_heads = tuple(width * i for i in factors), tuple(heads * i for i in factors)
    return Plan(widths, depths, all_heads, windows=(7, 7, 7, 7))


PCPVT_ARCHS: dict[str, Plan] = {
    name: plan
    for names, plan in (
        (("s", "small"), _pcpvt(3, 4, 6, 3)),
        (("b", "base"), _pcpvt(3, 4, 18, 3)),
        (("l", "large"), _pcpvt(3, 8, 27, 3)),
    )
    for name in names
}
SVT_ARCHS: dict[str, Plan] = {
    name: plan
    for names, plan in (
        (("s", "small"), _svt(64, 2, 2, 2, 10, 4)),
        (("b", "base"), _svt(96, 3, 2, 2, 18, 2)),
        (("l", "large"), _svt(128, 4, 2, 2, 18, 2)),
    )
    for name in names
}


@dataclass(frozen=True)
class TwinsSpec:
    """What decides the numbers and the names of the weights; `normed` says which stages end in a norm."""

    plan: Plan
    normed: tuple[bool, ...]
    in_channels: int = 3
    qkv_bias: bool = False
    eps: float = 1e-5

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        strides = self.plan.strides
        return map_features(self.plan.widths, [math.prod(strides[: i + 1]) for i in range(len(strides))])


class PatchEmbed(nn.Module):
    """A strided convolution and a norm; pads right and bottom to whole patches. Keys `projection`, `norm`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.projection = nn.Conv2d(inputs, outputs, kernel, stride=stride)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, ceil(h / stride), ceil(w / stride), outputs]."""
        bottom, right = (self._missing(side) for side in maps.shape[-2:])
        projected = self.projection(F.pad(maps, (0, right, 0, bottom)))
        normed: Tensor = self.norm(projected.permute(0, 2, 3, 1))
        return normed

    def _missing(self, side: int) -> int:
        return at_least_zero((ceil_div(side, self.stride) - 1) * self.stride + self.kernel - side)


class GlobalAttention(nn.Module):
    """Every position attends to a map that is smaller by `reduction`; keys `proj`, `q`, `kv`, `sr`, `norm`."""

    def __init__(self, spec: TwinsSpec, stage: int) -> None:
        super().__init__()
        width, reduction = spec.plan.widths[stage], spec.plan.reductions[stage]
        self.heads, self.reduction = spec.plan.heads[stage], reduction
        self.proj = nn.Linear(width, width)
        self.q = nn.Linear(width, width, bias=spec.qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=spec.qkv_bias)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width, eps=spec.eps)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape.

        Raises:
            TooLarge: more than 2^30 pairs of positions.
        """
        query, others = maps.flatten(1, 2), self._reduced(maps).flatten(1, 2)
        pairs = query.shape[1] * others.shape[1]
        if pairs > MAX_PAIRS:
            raise TooLarge(f"{pairs} pairs of positions attend to each other; the limit is {MAX_PAIRS}")
        key, value = self.kv(others).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(
            by_head(self.q(query), self.heads), by_head(key, self.heads), by_head(value, self.heads)
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(maps.shape))
        return projected

    def _reduced(self, maps: Tensor) -> Tensor:
        if self.reduction == 1:
            return maps
        reduced: Tensor = self.norm(self.sr(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return reduced


class WindowAttention(nn.Module):
    """Attention in windows; pads right and bottom to whole windows. Keys `qkv`, `proj`."""

    def __init__(self, spec: TwinsSpec, stage: int) -> None:
        super().__init__()
        width = spec.plan.widths[stage]
        self.heads, self.window = spec.plan.heads[stage], spec.plan.windows[stage]
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        n, height, width, channels = maps.shape
        bottom, right = -height % self.window, -width % self.window
        padded = F.pad(maps, (0, 0, 0, right, 0, bottom))
        rows, columns = padded.shape[1:3]
        is_whole = not is_tracing() and not (bottom and right)
        mask = None if is_whole else padding_mask(rows, columns, bottom, right, self.window, maps)
        windows = cut_windows(padded, self.window)
        qkv = self.qkv(windows).reshape(n, -1, self.window**2, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joined = join_windows(mixed.transpose(2, 3).reshape(windows.shape), self.window, rows, columns)
        projected: Tensor = self.proj(joined[:, :height, :width])
        return projected


def padding_mask(rows: int, columns: int, bottom: int, right: int, window: int, like: Tensor) -> Tensor:
    """[windows, 1, window², window²]: what is added to the attention between padding and what is not."""
    below = torch.arange(rows, device=like.device) >= rows - bottom
    beside = torch.arange(columns, device=like.device) >= columns - right
    # mmpretrain hides the padding only where there is some on both sides.
    is_padding = (below[:, None] | beside) & ((bottom > 0) & (right > 0))
    kinds = cut_windows(is_padding.int()[None, :, :, None], window)
    return ((kinds != kinds.transpose(1, 2)) * HIDDEN).to(like.dtype)[:, None]


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual; keys `norm1`, `attn`, `norm2`, `ffn`."""

    def __init__(self, spec: TwinsSpec, stage: int, *, windowed: bool) -> None:
        super().__init__()
        width = spec.plan.widths[stage]
        self.norm1 = nn.LayerNorm(width, eps=spec.eps)
        self.attn = WindowAttention(spec, stage) if windowed else GlobalAttention(spec, stage)
        self.norm2 = nn.LayerNorm(width, eps=spec.eps)
        self.ffn = FeedForward(width, spec.plan.ratios[stage] * width, GELU)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self.attn(self.norm1(maps))
        mixed: Tensor = maps + self.ffn(self.norm2(maps))
        return mixed


class PositionEncoding(nn.Module):
    """What a depthwise convolution adds to a map (Chu et al., arXiv:2102.10882); key `proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        added: Tensor = self.proj(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return added + maps


class Stage(nn.ModuleList):
    """Layers; in SVT every second one attends in windows, and the first does."""

    def __init__(self, spec: TwinsSpec, stage: int) -> None:
        windows, depth = spec.plan.windows, spec.plan.depths[stage]
        super().__init__(
            Layer(spec, stage, windowed=bool(windows) and index % 2 == 0) for index in range(depth)
        )

    def forward(self, maps: Tensor, positions: nn.Module) -> Tensor:
        """[n, h, w, c] to the same shape; positions are told once, by the zeros around the map."""
        for index, layer in enumerate(self):
            maps = layer(maps)
            maps = positions(maps) if index == 0 else maps
        return maps


class Twins(Backbone):
    """Keys `patch_embeds`, `stages`, `position_encodings`, `norm_after_stage0`, …."""

    def __init__(self, spec: TwinsSpec) -> None:
        super().__init__()
        self.features = spec.features()
        plan = spec.plan
        inputs = (spec.in_channels, *plan.widths)
        shapes = zip(inputs, plan.widths, plan.patches, plan.strides, strict=False)
        self.patch_embeds = nn.ModuleList(PatchEmbed(*shape) for shape in shapes)
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in range(len(plan.depths)))
        self.position_encodings = nn.ModuleList(PositionEncoding(width) for width in plan.widths)
        for stage, width in enumerate(plan.widths):
            norm = nn.LayerNorm(width, eps=spec.eps) if spec.normed[stage] else nn.Identity()
            self.add_module(f"norm_after_stage{stage}", norm)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for stage in range(deepest(nodes) + 1):
            tokens = self.patch_embeds[stage](maps)
            tokens = self.stages[stage](tokens, self.position_encodings[stage])
            tokens = getattr(self, f"norm_after_stage{stage}")(tokens)
            # The layers work on NHWC; the wire promises NCHW.
            maps = tokens.permute(0, 3, 1, 2).contiguous()
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Twins has no `frozen_stages`; `norm_cfg.requires_grad` holds for all norms but those of the patches."""
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)]
        reached = [name for name in norms if not name.startswith("patch_embeds.")]
        return freeze_report(self, Freeze(), reached if freeze.all_norms else (), norms_follow=False)


# --- mmpretrain.PCPVT, mmpretrain.SVT -------------------------------------------------------------

MAX_STAGES = 6
Stages = Field(min_length=1, max_length=MAX_STAGES)
Small = Annotated[int, Field(strict=True, ge=1, le=64)]
Width = Annotated[int, Field(strict=True, ge=1, le=4096)]


class PCPVTArchConfig(BaseModel):
    """An `arch` spelled out, one entry a stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[tuple[Width, ...], Stages]
    depths: Annotated[tuple[Small, ...], Stages]
    num_heads: Annotated[tuple[Width, ...], Stages]
    patch_sizes: Annotated[tuple[Small, ...], Stages]
    strides: Annotated[tuple[Small, ...], Stages]
    mlp_ratios: Annotated[tuple[Small, ...], Stages]
    sr_ratios: Annotated[tuple[Small, ...], Stages]

    def plan(self) -> Plan:
        """The neutral spelling: the same, in the same order."""
        return Plan(*self.model_dump().values())


class SVTArchConfig(PCPVTArchConfig):
    """The same with windows."""

    window_sizes: Annotated[tuple[Small, ...], Stages]


# the key of `arch` that an entry of a plan is from
KEYS = dict(
    zip(
        (field.name for field in fields(Plan)),
        SVTArchConfig.model_fields,
        strict=True,
    )
)


class TwinsConfig(SpecConfig):
    """The keys that both types have."""

    ARCHS: ClassVar[dict[str, Plan]]

    arch: str | PCPVTArchConfig
    in_channels: InputChannels = 3
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4.")
    qkv_bias: bool = False
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    norm_after_stage: bool | Annotated[tuple[bool, ...], Stages] = Field(
        False, description="A norm at the end of every stage, or of those that are true."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        plan = self.plan()
        stages = len(plan.depths)
        for field, key in KEYS.items():
            given = getattr(plan, field)
            if len(given) != stages and (given or field != "windows"):
                yield f"arch/{key}", f"has {len(given)} entries for {stages} stages"
        if isinstance(self.norm_after_stage, tuple) and len(self.norm_after_stage) != stages:
            yield "norm_after_stage", f"has {len(self.norm_after_stage)} entries for {stages} stages"
        for width, heads in zip(plan.widths, plan.heads, strict=False):
            if width % heads:
                yield "arch/num_heads", f"{heads} heads do not divide {width} channels"

    def plan(self) -> Plan:
        """`arch` spelled out."""
        return self.ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()

    def spec(self) -> TwinsSpec:
        """The neutral spelling."""
        plan, after = self.plan(), self.norm_after_stage
        normed = after if isinstance(after, tuple) else (after,) * len(plan.widths)
        return TwinsSpec(plan, normed, self.in_channels, self.qkv_bias, self.norm_cfg.eps)

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


class PCPVTConfig(TwinsConfig):
    """`mmpretrain.PCPVT`, which is also `mmcls.PCPVT`."""

    NETWORK: ClassVar[str] = "PCPVT"
    ARCHS: ClassVar[dict[str, Plan]] = PCPVT_ARCHS

    arch: Annotated[
        str | PCPVTArchConfig,
        named_arch(PCPVT_ARCHS),
        Field(json_schema_extra={"examples": list(PCPVT_ARCHS)}),
    ]


class SVTConfig(TwinsConfig):
    """`mmpretrain.SVT`, which is also `mmcls.SVT`."""

    NETWORK: ClassVar[str] = "SVT"
    ARCHS: ClassVar[dict[str, Plan]] = SVT_ARCHS

    arch: Annotated[
        str | SVTArchConfig, named_arch(SVT_ARCHS), Field(json_schema_extra={"examples": list(SVT_ARCHS)})
    ]


EXAMPLE = {"arch": "small", "out_indices": [0, 1, 2, 3], "norm_after_stage": [False, False, False, True]}
TWINS_NAMES = Naming(
    "Twins",
    own=("mmpretrain",),
    marks=("patch_embeds.0.projection.weight", "position_encodings.0.proj.weight", "stages.0.0.norm1.weight"),
    layouts=(
        # which began with the official names
        KeyLayout(
            "timm",
            rules(
                {
                    "patch_embeds.{s}.projection.{leaf}": "patch_embeds.{s}.proj.{leaf}",
                    "patch_embeds.{s}.norm.{leaf}": "patch_embeds.{s}.norm.{leaf}",
                    "position_encodings.{s}.proj.{leaf}": "pos_block.{s}.proj.0.{leaf}",
                    "stages.{s}.{b}.ffn.layers.0.0.{leaf}": "blocks.{s}.{b}.mlp.fc1.{leaf}",
                    "stages.{s}.{b}.ffn.layers.1.{leaf}": "blocks.{s}.{b}.mlp.fc2.{leaf}",
                    "stages.{s}.{b}.norm{k}.{leaf}": "blocks.{s}.{b}.norm{k}.{leaf}",
                    "stages.{s}.{b}.attn.{rest}": "blocks.{s}.{b}.attn.{rest}",
                    "norm_after_stage3.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


PCPVT = make_family(PCPVTConfig, Twins, example=EXAMPLE, architectures=tuple(PCPVT_ARCHS), naming=TWINS_NAMES)
SVT = make_family(SVTConfig, Twins, example=EXAMPLE, architectures=tuple(SVT_ARCHS), naming=TWINS_NAMES)
