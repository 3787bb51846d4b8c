"""Modules that mmdet puts inside residual blocks, with mmcv's key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec, make_norm

Position = Literal["after_conv1", "after_conv2", "after_conv3"]
Small = Annotated[int, Field(strict=True, ge=1, le=64)]
WAVE_LENGTH = 1000.0


class BlockPlugin(nn.Module):
    """Base of what is put into blocks: maps to maps of the same shape."""

    def start(self) -> None:
        """Fill what begins otherwise than a network's convolutions and norms."""


# --- global context -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextSpec:
    """A context block: hidden channels over its own, pooled by attention or by mean, multiplied in and added."""

    ratio: float
    attends: bool
    adds: bool
    multiplies: bool


class ContextBlock(BlockPlugin):
    """GCNet's block (Cao et al., arXiv:1904.11492): one vector of the whole map changes all of its places."""

    def __init__(self, channels: int, spec: ContextSpec) -> None:
        super().__init__()
        hidden = int(channels * spec.ratio)
        self.conv_mask = nn.Conv2d(channels, 1, 1) if spec.attends else None
        self.channel_add_conv = _bottleneck(channels, hidden) if spec.adds else None
        self.channel_mul_conv = _bottleneck(channels, hidden) if spec.multiplies else None

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        context = self._context(maps)
        changed = maps
        if self.channel_mul_conv is not None:
            changed = changed * self.channel_mul_conv(context).sigmoid()
        if self.channel_add_conv is not None:
            changed = changed + self.channel_add_conv(context)
        return changed

    def _context(self, maps: Tensor) -> Tensor:
        if self.conv_mask is None:
            return maps.mean((2, 3), keepdim=True)
        weights: Tensor = self.conv_mask(maps).flatten(2).softmax(dim=2)
        return torch.matmul(maps.flatten(2), weights.transpose(1, 2)).unsqueeze(3)


def _bottleneck(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.LayerNorm([hidden, 1, 1]),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 1),
    )


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of four terms: of query and key, of query and place, of the key alone, of the place alone.

    The second is there only with the fourth.
    """

    heads: int
    position_dim: int
    position_magnitude: int
    key_stride: int
    query_stride: int
    terms: tuple[bool, bool, bool, bool]


class GeneralizedAttention(BlockPlugin):
    """Attention among all places of a map (Zhu et al., arXiv:1904.05873)."""

    def __init__(self, channels: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.width = channels // spec.heads
        inner = self.width * spec.heads
        content, place, key_only, place_only = spec.terms
        self.position_dim = spec.position_dim if spec.position_dim > 0 else channels
        if content or place:
            self.query_conv = nn.Conv2d(channels, inner, 1, bias=False)
        if content or key_only:
            self.key_conv = nn.Conv2d(channels, inner, 1, bias=False)
        self.value_conv = nn.Conv2d(channels, inner, 1, bias=False)
        if place_only:
            self.appr_geom_fc_x = nn.Linear(self.position_dim // 2, inner, bias=False)
            self.appr_geom_fc_y = nn.Linear(self.position_dim // 2, inner, bias=False)
        if key_only:
            self.appr_bias = nn.Parameter(torch.zeros(inner))
        if place_only:
            self.geom_bias = nn.Parameter(torch.zeros(inner))
        self.proj_conv = nn.Conv2d(inner, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def start(self) -> None:
        """Uniform biases as mmcv starts with; a gate of 1, since 0 would leave the block out."""
        bound = 1 / math.sqrt(2 * self.width)
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.uniform_(parameter, -bound, bound)
            elif name.startswith("appr_geom_fc"):
                nn.init.kaiming_uniform_(parameter, a=1)
        nn.init.ones_(self.gamma)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        asking, asked = _thinned(maps, self.spec.query_stride), _thinned(maps, self.spec.key_stride)
        values = self._heads(self.value_conv(asked))
        found = self._energy(asking, asked).softmax(dim=-1) @ values
        count, _, height, width = asking.shape
        joined = found.transpose(2, 3).reshape(count, -1, height, width)
        out = self.proj_conv(joined)
        if self.spec.query_stride > 1:
            out = F.interpolate(out, size=maps.shape[2:], mode="bilinear", align_corners=False)
        changed: Tensor = self.gamma * out + maps
        return changed

    def _heads(self, maps: Tensor) -> Tensor:
        """[n, heads * width, h, w] to [n, heads, h * w, width]."""
        return maps.reshape(maps.shape[0], self.spec.heads, self.width, -1).transpose(2, 3)

    def _asks(self, query: Tensor | None, bias: Tensor | None) -> Tensor:
        """What is multiplied with keys or places: a query, the same for all queries, or their sum."""
        if bias is None:
            return cast("Tensor", query)
        same = bias.view(1, self.spec.heads, 1, self.width)
        return same if query is None else query + same

    def _energy(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Scores [n, heads, queries, keys], not scaled."""
        content, place, key_only, place_only = self.spec.terms
        sides, key_sides = asking.shape[2:], asked.shape[2:]
        shape = (asking.shape[0], self.spec.heads, math.prod(sides), math.prod(key_sides))
        query = self._heads(self.query_conv(asking)) if content or place else None
        energy = asking.new_zeros(shape)
        if content or key_only:
            asks = self._asks(query if content else None, self.appr_bias if key_only else None)
            energy = energy + torch.matmul(asks, self._heads(self.key_conv(asked)).transpose(2, 3))
        if place_only:
            asks = self._asks(query if place else None, self.geom_bias).expand(*shape[:3], self.width)
            energy = energy + self._of_places(asks.reshape(*shape[:2], *sides, self.width), key_sides)
        return energy

    def _of_places(self, asks: Tensor, key_sides: torch.Size) -> Tensor:
        """Scores of [n, heads, h, w, width] with the distances to the keys, by row and by column."""
        height, width = asks.shape[2:4]
        by_row = self._distances(self.appr_geom_fc_y, height, key_sides[0], asks)
        by_column = self._distances(self.appr_geom_fc_x, width, key_sides[1], asks)
        rows = torch.einsum("nhyxd,hykd->nhyxk", asks, by_row)
        columns = torch.einsum("nhyxd,hxkd->nhyxk", asks, by_column)
        return (rows.unsqueeze(5) + columns.unsqueeze(4)).flatten(4).flatten(2, 3)

    def _distances(self, layer: nn.Module, queries: int, keys: int, like: Tensor) -> Tensor:
        """Sines and cosines of the distances along one axis, through `layer`: [heads, queries, keys, width]."""
        places = torch.arange(queries, device=like.device) * self.spec.query_stride
        others = torch.arange(keys, device=like.device) * self.spec.key_stride
        apart = (places[:, None] - others[None]).to(like.dtype) * self.spec.position_magnitude
        steps = torch.arange(self.position_dim // 4, device=like.device).to(like.dtype)
        angles = apart.unsqueeze(2) / WAVE_LENGTH ** (4.0 / self.position_dim * steps)
        found: Tensor = layer(torch.cat((angles.sin(), angles.cos()), dim=2)) / math.sqrt(2)
        return found.reshape(queries, keys, self.spec.heads, self.width).permute(2, 0, 1, 3)


def _thinned(maps: Tensor, stride: int) -> Tensor:
    """Every `stride`-th place, as an average pool over one place gives it."""
    return F.avg_pool2d(maps, 1, stride) if stride > 1 else maps


# --- non-local ------------------------------------------------------------------------------------

NonLocalMode = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]


@dataclass(frozen=True)
class NonLocalSpec:
    """A non-local block; `subsampled` keys and values are pooled by 2."""

    reduction: int
    scaled: bool
    mode: NonLocalMode
    subsampled: bool
    norm: NormSpec | None


class _Projection(nn.Module):
    """A 1x1 convolution and perhaps a norm, under mmcv's names."""

    def __init__(self, inputs: int, outputs: int, norm: NormSpec | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=bias and norm is None)
        self.norm_name = norm.kind if norm is not None else None
        if norm is not None:
            self.add_module(norm.kind, make_norm(norm, outputs))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.conv(maps)
        if self.norm_name is not None:
            maps = getattr(self, self.norm_name)(maps)
        return maps


class NonLocal2d(BlockPlugin):
    """Places weighed by all others (Wang et al., arXiv:1711.07971)."""

    def __init__(self, channels: int, spec: NonLocalSpec) -> None:
        super().__init__()
        self.spec = spec
        inner = max(channels // spec.reduction, 1)
        self.g = self._pooled(_Projection(channels, inner))
        self.conv_out = _Projection(inner, channels, spec.norm)
        if spec.mode != "gaussian":
            self.theta = _Projection(channels, inner)
            self.phi = self._pooled(_Projection(channels, inner))
        else:
            self.phi = self._pooled(nn.Identity())
        if spec.mode == "concatenation":
            self.concat_project = _Projection(2 * inner, 1, bias=False)

    def start(self) -> None:
        """Small weights; mmcv's 0 for the last would leave the block out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)

    def _pooled(self, module: nn.Module) -> nn.Module:
        return nn.Sequential(module, nn.MaxPool2d(2)) if self.spec.subsampled else module

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        values = self.g(maps).flatten(2).transpose(1, 2)
        asking = (maps if self.spec.mode == "gaussian" else self.theta(maps)).flatten(2).transpose(1, 2)
        found = self._weights(asking, self.phi(maps).flatten(2)) @ values
        added: Tensor = self.conv_out(found.transpose(1, 2).reshape(maps.shape[0], -1, *maps.shape[2:]))
        return maps + added

    def _weights(self, asking: Tensor, asked: Tensor) -> Tensor:
        """[n, queries, c] and [n, c, keys] to [n, queries, keys]."""
        if self.spec.mode == "concatenation":
            first, second = self.concat_project.conv.weight.flatten().chunk(2)
            return (asking @ first[:, None] + second @ asked.unsqueeze(1)).relu() / asked.shape[2]
        scores = asking @ asked
        if self.spec.mode == "dot_product":
            return scores / scores.shape[2]
        if self.spec.mode == "embedded_gaussian" and self.spec.scaled:
            scores = scores / math.sqrt(asking.shape[2])
        return scores.softmax(dim=2)


# --- where they are -------------------------------------------------------------------------------

BlockSpec = ContextSpec | AttentionSpec | NonLocalSpec


@dataclass(frozen=True)
class PluginSpec:
    """A module inside blocks: its name there, the convolution it comes after, and which stages have it."""

    name: str
    position: Position
    stages: tuple[bool, ...] | None
    block: BlockSpec

    def is_in(self, stage: int) -> bool:
        """Whether the blocks of a stage have it."""
        return self.stages is None or self.stages[stage]


MAKERS: dict[type, Callable[[int, Any], BlockPlugin]] = {
    ContextSpec: ContextBlock,
    AttentionSpec: GeneralizedAttention,
    NonLocalSpec: NonLocal2d,
}


def make_plugin(spec: PluginSpec, channels: int) -> BlockPlugin:
    """The module for maps of `channels`."""
    return MAKERS[type(spec.block)](channels, spec.block)


class _Options(BaseModel):
    """`cfg` of a plugin. `ABBREVIATION` is how mmcv names the module in a block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ABBREVIATION: ClassVar[str]

    postfix: Annotated[str, Field(pattern=r"^\w{0,16}$")] | Small = Field(
        "", description="Tells two of a kind apart: the end of the module's name."
    )


class ContextOptions(_Options):
    """`ContextBlock`."""

    ABBREVIATION: ClassVar[str] = "context_block"

    type: Literal["ContextBlock"]
    ratio: Annotated[float, Field(gt=0, le=4)] = Field(description="Hidden channels over the block's own.")
    pooling_type: Literal["att", "avg"] = "att"
    fusion_types: Annotated[
        tuple[Literal["channel_add", "channel_mul"], ...], Field(min_length=1, max_length=2)
    ] = ("channel_add",)

    def spec(self) -> ContextSpec:
        """The neutral spelling."""
        fusions = self.fusion_types
        return ContextSpec(
            self.ratio, self.pooling_type == "att", "channel_add" in fusions, "channel_mul" in fusions
        )

    def fault(self, channels: int) -> tuple[str, str] | None:
        """What is wrong with it for maps of `channels`, as (key, detail)."""
        return None if int(channels * self.ratio) else ("ratio", f"leaves nothing of {channels} channels")


class AttentionOptions(_Options):
    """`GeneralizedAttention`."""

    ABBREVIATION: ClassVar[str] = "gen_attention_block"

    type: Literal["GeneralizedAttention"]
    spatial_range: Annotated[int, Field(strict=True, ge=-1, le=4096)] = Field(
        -1, description="-1, no limit; another is not served."
    )
    num_heads: Small = 9
    position_embedding_dim: Annotated[int, Field(strict=True, ge=-1, le=4096)] = Field(
        -1, description="-1 is the channels."
    )
    position_magnitude: Annotated[int, Field(strict=True, ge=-1000, le=1000)] = 1
    kv_stride: Small = 2
    q_stride: Small = 1
    attention_type: Annotated[str, Field(pattern="^[01]{4}$")] = Field(
        "1111", description="Query and key; query and place; key only; place only."
    )

    def spec(self) -> AttentionSpec:
        """The neutral spelling."""
        first, second, third, fourth = (digit == "1" for digit in self.attention_type)
        return AttentionSpec(
            self.num_heads,
            self.position_embedding_dim,
            self.position_magnitude,
            self.kv_stride,
            self.q_stride,
            (first, second, third, fourth),
        )

    def fault(self, channels: int) -> tuple[str, str] | None:
        """What is wrong with it for maps of `channels`, as (key, detail)."""
        if self.spatial_range >= 0:
            return "spatial_range", "attention within a range is not served; -1 is"
        if channels < self.num_heads:
            return "num_heads", f"{self.num_heads} heads are more than {channels} channels"
        _, place, _, place_only = self.spec().terms
        if place and not place_only:
            # mmcv multiplies the rows' distances with a transposed query there
            return (
                "attention_type",
                "the second digit is served with the fourth: alone, mmcv fails on oblong maps",
            )
        dim = self.position_embedding_dim if self.position_embedding_dim > 0 else channels
        return ("position_embedding_dim", f"{dim} is no multiple of 4") if place_only and dim % 4 else None


class NonLocalOptions(_Options):
    """`NonLocal2d`."""

    ABBREVIATION: ClassVar[str] = "nonlocal_block"

    type: Literal["NonLocal2d"]
    reduction: Small = 2
    use_scale: bool = True
    norm_cfg: NormConfig | None = None
    mode: NonLocalMode = "embedded_gaussian"
    sub_sample: bool = False
    std: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="Start of training.")
    zeros_init: bool | None = Field(None, description="Start of training.")

    def spec(self) -> NonLocalSpec:
        """The neutral spelling."""
        norm = None if self.norm_cfg is None else self.norm_cfg.spec()
        return NonLocalSpec(self.reduction, self.use_scale, self.mode, self.sub_sample, norm)

    def fault(self, channels: int) -> tuple[str, str] | None:
        """What is wrong with it for maps of `channels`, as (key, detail)."""
        if self.norm_cfg is None:
            return None
        if (fault := self.norm_cfg.fault()) is not None:
            return "norm_cfg/num_groups", fault
        if not self.norm_cfg.requires_grad:
            return "norm_cfg/requires_grad", "false is not served for a plugin's own norm"
        groups = self.norm_cfg.num_groups or 1
        uneven = channels % groups != 0
        return (
            ("norm_cfg/num_groups", f"{groups} groups do not divide {channels} channels") if uneven else None
        )


PluginOptions = Annotated[ContextOptions | AttentionOptions | NonLocalOptions, Field(discriminator="type")]


class PluginConfig(BaseModel):
    """One of mmdet's `plugins`: which module, after which convolution, in which stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cfg: PluginOptions
    position: Position
    stages: Annotated[tuple[bool, ...], Field(max_length=4)] | None = Field(
        None, description="One for each stage; null is all."
    )

    def spec(self) -> PluginSpec:
        """The neutral spelling."""
        return PluginSpec(self.name(), self.position, self.stages, self.cfg.spec())

    def name(self) -> str:
        """What the module is called in a block."""
        return f"{self.cfg.ABBREVIATION}{self.cfg.postfix}"

    def is_in(self, stage: int) -> bool:
        """Whether the blocks of a stage have it."""
        return self.stages is None or self.stages[stage]


Plugins = Annotated[tuple[PluginConfig, ...], Field(max_length=8)]


def plugin_faults(
    plugins: tuple[PluginConfig, ...], inner: tuple[int, ...], outer: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """What is wrong with plugins in stages of these channels inside and behind their blocks, as (key, detail)."""
    for place, plugin in enumerate(plugins):
        key = f"plugins/{place}"
        if plugin.stages is not None and len(plugin.stages) != len(outer):
            yield f"{key}/stages", f"has {len(plugin.stages)} entries for {len(outer)} stages"
            return
        for stage, widths in enumerate(zip(inner, outer, strict=True)):
            if not plugin.is_in(stage):
                continue
            if (fault := plugin.cfg.fault(widths[plugin.position == "after_conv3"])) is not None:
                yield f"{key}/cfg/{fault[0]}", fault[1]
            if any(other.name() == plugin.name() and other.is_in(stage) for other in plugins[:place]):
                yield f"{key}/cfg/postfix", f"another {plugin.name()} is in stage {stage}; give one a postfix"
