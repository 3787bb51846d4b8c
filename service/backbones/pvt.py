"""PyramidVisionTransformer and version 2 (Wang et al., arXiv:2102.12122, arXiv:2106.13797) with mmdet's key names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import (
    Backbone,
    CheckpointName,
    DropRate,
    Indices,
    InputChannels,
    levels_by_index,
    levels_by_stride,
)
from service.backbones.freezing import freeze_report
from service.backbones.mobilenet_v2 import weights_or_pretrained
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Scale,
    SpecConfig,
    deepest,
    make_activation,
    make_family,
    map_features,
)
from service.backbones.transformer_layers import PackedAttention
from service.backbones.vision_transformer import MAX_PATCHES, Pixels
from service.checkpoints.layouts import Change, KeyLayout, Naming, Regrouping, below, rules
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import TooLarge

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

MAX_PAIRS = MAX_PATCHES**2  # of queries and keys
STAGE_STRIDES = (4, 2, 2, 2)
LEVEL_STRIDES = frozenset(itertools.accumulate(STAGE_STRIDES, lambda a, b: a * b))


@dataclass(frozen=True)
class StageSpec:
    """One stage: `patch`, `stride` and `padding` of the convolution that begins it, then `layers`.

    Keys and values come from a map reduced by `reduction`. `grid` is [rows, columns] of the stage's positions, None
    without them.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    reduction: int
    patch: int
    stride: int
    padding: int
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class PVTSpec:
    """What decides the numbers and the names of the weights.

    `ends_in_norm` is of the stages, `convolves` of the feed-forward networks.
    """

    stages: tuple[StageSpec, ...]
    activation: ActivationSpec
    qkv_bias: bool = True
    eps: float = 1e-6
    ends_in_norm: bool = False
    convolves: bool = False
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        strides = itertools.accumulate((stage.stride for stage in self.stages), lambda a, b: a * b)
        return map_features([stage.width for stage in self.stages], list(strides))


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, rows * columns, c] to [n, c, rows, columns]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


class PatchEmbed(nn.Module):
    """A strided convolution and a norm; keys `projection`, `norm`."""

    def __init__(self, inputs: int, spec: StageSpec, eps: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(inputs, spec.width, spec.patch, stride=spec.stride, padding=spec.padding)
        self.norm = nn.LayerNorm(spec.width, eps=eps)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[n, c, h, w] to tokens [n, rows * columns, width] and (rows, columns)."""
        projected = self.projection(maps)
        tokens: Tensor = self.norm(projected.flatten(2).transpose(1, 2))
        return tokens, (projected.shape[2], projected.shape[3])


class Positions(Scale):
    """Learnt positions, interpolated to the map; key `pos_embed`."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))

    def start(self) -> None:
        """Small positions."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to the same shape."""
        resized = F.interpolate(as_map(self.pos_embed, self.grid), size=grid, mode="bilinear")
        return tokens + resized.flatten(2).transpose(1, 2)


class ReducedAttention(nn.Module):
    """Attention to a map that a strided convolution made smaller; keys `attn`, `sr`, `norm`."""

    def __init__(self, spec: PVTSpec, stage: StageSpec) -> None:
        super().__init__()
        width, bias = stage.width, spec.qkv_bias
        self.attn = PackedAttention(width, stage.heads, bias=bias, out_bias=bias)
        self.is_reduced = stage.reduction > 1
        if self.is_reduced:
            self.sr = nn.Conv2d(width, width, stage.reduction, stride=stage.reduction)
            self.norm = nn.LayerNorm(width, eps=spec.eps)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to the same shape.

        Raises:
            TooLarge: too many pairs of a query and a key.
        """
        others = tokens
        if self.is_reduced:
            others = self.norm(self.sr(as_map(tokens, grid)).flatten(2).transpose(1, 2))
        pairs = tokens.shape[1] * others.shape[1]
        if pairs > MAX_PAIRS:
            raise TooLarge(
                f"{tokens.shape[1]} patches attend to {others.shape[1]}; the limit is {MAX_PAIRS} pairs"
            )
        mixed: Tensor = self.attn(tokens, others)
        return mixed


class MixFeedForward(nn.Module):
    """Two 1x1 convolutions, in the second version a depthwise 3x3 behind the first; keys `layers.0`, …"""

    def __init__(self, spec: PVTSpec, stage: StageSpec) -> None:
        super().__init__()
        width, hidden = stage.width, stage.hidden
        between = [nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)] if spec.convolves else []
        # Dropout, which is what the library has before the last, keeps the number in its key.
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            *between,
            make_activation(spec.activation),
            nn.Identity(),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to the same shape."""
        maps: Tensor = self.layers(as_map(tokens, grid))
        return maps.flatten(2).transpose(1, 2)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual; keys `norm1`, `attn`, `norm2`, `ffn`."""

    def __init__(self, spec: PVTSpec, stage: StageSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.width, eps=spec.eps)
        self.attn = ReducedAttention(spec, stage)
        self.norm2 = nn.LayerNorm(stage.width, eps=spec.eps)
        self.ffn = MixFeedForward(spec, stage)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens), grid)
        mixed: Tensor = tokens + self.ffn(self.norm2(tokens), grid)
        return mixed


class Stage(nn.ModuleList):
    """The patches at `0`, positions and layers in `1`, the norm at `2`."""

    def __init__(self, spec: PVTSpec, index: int) -> None:
        stage = spec.stages[index]
        inputs = spec.stages[index - 1].width if index else spec.in_channels
        positions = [Positions(stage.grid, stage.width)] if stage.grid else []
        layers = nn.ModuleList([*positions, *(Layer(spec, stage) for _ in range(stage.layers))])
        norm = nn.LayerNorm(stage.width, eps=spec.eps) if spec.ends_in_norm else nn.Identity()
        super().__init__([PatchEmbed(inputs, stage, spec.eps), layers, norm])

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the map of the stage."""
        embed, layers, norm = self
        tokens, grid = embed(maps)
        for layer in layers.children():
            tokens = layer(tokens, grid)
        return as_map(norm(tokens), grid)


class PyramidVisionTransformer(Backbone):
    """Key `layers`, one a stage."""

    def __init__(self, spec: PVTSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.layers = nn.ModuleList(Stage(spec, index) for index in range(len(spec.stages)))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for index in range(deepest(nodes) + 1):
            maps = self.layers[index](maps)
            if str(index) in nodes:
                found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing but what `norm_cfg` says: the library has no rule."""
        return freeze_report(self, freeze, ())


# --- checkpoints of the official code -------------------------------------------------------------

OFFICIAL = re.compile(r"(pos_embed|patch_embed|block|norm)(\d)(?:\.(.*))?")
LAYER = re.compile(r"(\d+)\.(.*)")
# What a layer's keys begin with in the official code, and here.
RENAMED = (
    ("attn.proj.", "attn.attn.out_proj."),
    ("mlp.fc1.", "ffn.layers.0."),
    ("mlp.dwconv.dwconv.", "ffn.layers.1."),
)
TOKENS_WITH_CLASS = 50  # of the last stage of images of 224 px


def from_official(state: StateDict, *, has_positions: bool, last: int) -> StateDict:
    """`state` by mmdet's names, where it has those of the official code; the rest as it is.

    `last` is the number of the last convolution of a feed-forward network.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = OFFICIAL.fullmatch(name)
        if match is None or ".attn.kv." in name:
            # The keys and values go where the query goes.
            found |= {} if match is not None else {name: tensor}
            continue
        found |= dict(_of_official(match, tensor, state, shift=int(has_positions), last=last))
    return found


def _of_official(
    match: re.Match[str], tensor: Tensor, state: StateDict, *, shift: int, last: int
) -> Iterator[tuple[str, Tensor]]:
    kind, stage, rest = match[1], int(match[2]) - 1, match[3] or ""
    if kind == "pos_embed":
        has_class = stage == 3 and tensor.shape[1:2] == (TOKENS_WITH_CLASS,)
        yield f"layers.{stage}.1.0.pos_embed", tensor[:, 1:] if has_class else tensor
    elif kind == "patch_embed":
        yield f"layers.{stage}.0.{rest.replace('proj.', 'projection.')}", tensor
    elif kind == "norm":
        yield f"layers.{stage}.2.{rest}", tensor
    elif layer := LAYER.fullmatch(rest):
        place = f"layers.{stage}.1.{int(layer[1]) + shift}."
        yield _of_layer(place, layer[2], tensor, state.get(match[0].replace(".attn.q.", ".attn.kv.")), last)


def _of_layer(place: str, rest: str, tensor: Tensor, both: Tensor | None, last: int) -> tuple[str, Tensor]:
    """A tensor of a layer by mmdet's name; `both` are the keys and values beside a query."""
    if rest.startswith("attn.q.") and both is not None:
        return f"{place}attn.attn.in_proj_{rest.removeprefix('attn.q.')}", torch.cat((tensor, both))
    for theirs, ours in (*RENAMED, ("mlp.fc2.", f"ffn.layers.{last}.")):
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    is_linear = rest.startswith("ffn.") and tensor.ndim == 2
    return place + rest, tensor[:, :, None, None] if is_linear else tensor


# --- mmdet.PyramidVisionTransformer, mmdet.PyramidVisionTransformerV2 -----------------------------


Counts = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=64)], ...], Field(min_length=1, max_length=8)
]
Paddings = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0, le=32)], ...], Field(min_length=1, max_length=8)
]


class PVTConfig(SpecConfig):
    """The keys that both versions have in common."""

    PATCHES: ClassVar[tuple[int, ...]]
    PADDINGS: ClassVar[tuple[int, ...]]

    pretrain_img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that positions are for; images of any size are taken."
    )
    in_channels: InputChannels = 3
    embed_dims: Annotated[int, Field(strict=True, ge=1, le=1024)] = Field(
        64, description="Channels of a head: a stage has this many for each of its heads."
    )
    num_stages: Annotated[int, Field(strict=True, ge=1, le=8)] = 4
    num_layers: Counts = (3, 4, 6, 3)
    num_heads: Counts = (1, 2, 5, 8)
    sr_ratios: Counts = Field((8, 4, 2, 1), description="By what keys and values are made fewer, each way.")
    strides: Counts | None = Field(
        None,
        description="Of the convolutions that begin the stages, [4, 2, 2, 2] by default; or strides of levels, as in "
        "[8, 16, 32], to be returned instead of out_indices.",
    )
    mlp_ratios: Counts = (8, 8, 4, 4)
    out_indices: Indices = Field((0, 1, 2, 3), description="Stages, 0 at stride 4.")
    qkv_bias: bool = Field(True, description="Of the projections of attention, the last included.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    pretrained: CheckpointName | None = Field(
        None, description="Deprecated spelling of init_cfg with this checkpoint."
    )
    convert_weights: bool = Field(
        True, description="Whether a checkpoint may have the official code's names."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        stages = self.num_stages
        for key in ("num_layers", "num_heads", "sr_ratios"):
            count = len(getattr(self, key))
            if count != stages:
                yield key, f"has {count} entries for {stages} stages"
        for key, given in (("patch_sizes", self.patches()), ("strides", self.stage_strides())):
            if len(given) != stages:
                yield key, f"has {len(given)} entries for {stages} stages"
        for key, given in (("paddings", self.stage_paddings()), ("mlp_ratios", self.mlp_ratios)):
            if len(given) < stages:
                yield key, f"has {len(given)} entries for {stages} stages"
        if self.pretrained is not None and (self.init_cfg or self.checkpoint) is not None:
            yield "pretrained", "give pretrained or init_cfg, not both"
        for padding, patch in zip(self.stage_paddings(), self.patches(), strict=False):
            if padding > patch:
                yield "paddings", f"{padding} is more than its patch of {patch}"

    def patches(self) -> tuple[int, ...]:
        """Kernels of the convolutions that begin the stages."""
        return self.PATCHES

    def stage_paddings(self) -> tuple[int, ...]:
        """Paddings of the convolutions that begin the stages."""
        return self.PADDINGS

    def strides_are_levels(self) -> bool:
        """Whether `strides` asks for levels: different ones, each a stride that a level has by default."""
        strides = self.strides or ()
        if strides == STAGE_STRIDES[: self.num_stages]:
            return False
        return bool(strides) and len(set(strides)) == len(strides) and set(strides) <= LEVEL_STRIDES

    def stage_strides(self) -> tuple[int, ...]:
        """Strides of the convolutions that begin the stages."""
        return STAGE_STRIDES if self.strides is None or self.strides_are_levels() else self.strides

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self.strides is not None and self.strides_are_levels():
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)

    def has_positions(self) -> bool:
        """Whether every stage has learnt positions."""
        return False

    def _stage(self, index: int) -> StageSpec:
        size = self.pretrain_img_size
        width = self.embed_dims * self.num_heads[index]
        factor = math.prod(self.patches()[: index + 1])
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return StageSpec(
            width=width,
            layers=self.num_layers[index],
            heads=self.num_heads[index],
            hidden=width * self.mlp_ratios[index],
            reduction=self.sr_ratios[index],
            patch=self.patches()[index],
            stride=self.stage_strides()[index],
            padding=self.stage_paddings()[index],
            grid=(rows // factor, columns // factor) if self.has_positions() else None,
        )

    def spec(self) -> PVTSpec:
        """The neutral spelling."""
        return PVTSpec(
            stages=tuple(self._stage(index) for index in range(self.num_stages)),
            activation=self.act_cfg.spec(),
            qkv_bias=self.qkv_bias,
            eps=self.norm_cfg.eps,
            in_channels=self.in_channels,
            **self.of_version(),
        )

    def of_version(self) -> dict[str, bool]:
        """What the versions differ in."""
        return {"ends_in_norm": True, "convolves": True}

    def freeze(self) -> Freeze:
        """mmdet's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling; a file may go in one way or the other."""
        return {**super().architecture(), "convert_weights": self.convert_weights}

    def weights(self) -> WeightsRef | None:
        """Where the weights come from."""
        return weights_or_pretrained(super().weights(), self.pretrained)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the positions are made for."""
        size = self.pretrain_img_size
        return PreprocessDefaults(size=size if isinstance(size, tuple) else (size, size))


class PyramidVisionTransformerConfig(PVTConfig):
    """`mmdet.PyramidVisionTransformer`."""

    NETWORK: ClassVar[str] = "PyramidVisionTransformer"

    patch_sizes: Counts = (4, 2, 2, 2)
    paddings: Paddings = (0, 0, 0, 0)
    use_abs_pos_embed: bool = True
    norm_after_stage: bool = False
    use_conv_ffn: bool = Field(False, description="A depthwise 3x3 in the feed-forward networks.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        grids = [stage.grid for stage in self.spec().stages if stage.grid is not None]
        if any(0 in grid for grid in grids):
            yield "pretrain_img_size", "leaves a stage without a position"
        if grids and math.prod(grids[0]) > 4 * MAX_PATCHES:
            yield "pretrain_img_size", f"{math.prod(grids[0])} positions; the limit is {4 * MAX_PATCHES}"

    def patches(self) -> tuple[int, ...]:
        """Kernels of the convolutions that begin the stages."""
        return self.patch_sizes

    def stage_paddings(self) -> tuple[int, ...]:
        """Paddings of the convolutions that begin the stages."""
        return self.paddings

    def has_positions(self) -> bool:
        """Whether every stage has learnt positions."""
        return self.use_abs_pos_embed

    def of_version(self) -> dict[str, bool]:
        """What the versions differ in."""
        return {"ends_in_norm": self.norm_after_stage, "convolves": self.use_conv_ffn}


class PyramidVisionTransformerV2Config(PVTConfig):
    """`mmdet.PyramidVisionTransformerV2`: patches that overlap and no positions."""

    NETWORK: ClassVar[str] = "PyramidVisionTransformerV2"
    PATCHES: ClassVar[tuple[int, ...]] = (7, 3, 3, 3)
    PADDINGS: ClassVar[tuple[int, ...]] = (3, 1, 1, 1)


def _adapted(config: PVTConfig, state: StateDict) -> StateDict:
    if not config.convert_weights:
        return state
    last = 4 if config.of_version()["convolves"] else 3
    return from_official(state, has_positions=config.has_positions(), last=last)


PYRAMID_VISION_TRANSFORMER = make_family(
    PyramidVisionTransformerConfig,
    PyramidVisionTransformer,
    example={"num_layers": [2, 2, 2, 2], "out_indices": [0, 1, 2, 3]},
    adapt=_adapted,
)
_LINEAR = Change(
    to_ours=lambda tensor: tensor[:, :, None, None] if tensor.ndim == 2 else tensor,
    to_theirs=lambda tensor: tensor.flatten(1) if tensor.ndim == 4 else tensor,
)


def _v2_layout(
    library: str, embeddings: Mapping[str, str], stage: str, depthwise: str, norm: str
) -> KeyLayout:
    """Linear layers are 1x1 convolutions here, and the query goes with the keys and values.

    Args:
        library: whose names they are.
        embeddings: where the patches are embedded: ours and theirs.
        stage, depthwise, norm: what a stage's layers begin with, its 3x3 convolution and its last norm are called.
    """
    mine, theirs = "layers.{s}.1.{b}.", stage + "{b}."
    names = {
        **{f"{ours}.projection.{{leaf}}": f"{other}.proj.{{leaf}}" for ours, other in embeddings.items()},
        **{f"{ours}.norm.{{leaf}}": f"{other}.norm.{{leaf}}" for ours, other in embeddings.items()},
        **below(
            mine,
            theirs,
            {
                "norm{k}.{leaf}": "norm{k}.{leaf}",
                "attn.attn.out_proj.{leaf}": "attn.proj.{leaf}",
                "attn.sr.{leaf}": "attn.sr.{leaf}",
                "attn.norm.{leaf}": "attn.norm.{leaf}",
                "ffn.layers.1.{leaf}": f"mlp.{depthwise}.{{leaf}}",
            },
        ),
        "layers.{s}.2.{leaf}": norm + "{leaf}",
    }
    linear = {"ffn.layers.0.{leaf}": "mlp.fc1.{leaf}", "ffn.layers.4.{leaf}": "mlp.fc2.{leaf}"}
    attention = Regrouping(
        (f"{mine}attn.attn.in_proj_{{leaf}}",),
        (f"{theirs}attn.q.{{leaf}}", f"{theirs}attn.kv.{{leaf}}"),
        (1, 2),
    )
    return KeyLayout(
        library, (*rules(names), *rules(below(mine, theirs, linear), _LINEAR)), regroupings=(attention,)
    )


PVT_V2_NAMES = Naming(
    "PyramidVisionTransformerV2",
    own=("mmdet",),
    marks=(
        "layers.0.0.projection.weight",
        "layers.0.1.0.attn.attn.out_proj.weight",
        "layers.0.1.0.ffn.layers.1.weight",
    ),
    layouts=(
        _v2_layout(
            "timm",
            {"layers.0.0": "patch_embed", "layers.{s}.0": "stages.{s}.downsample"},
            "stages.{s}.blocks.",
            "dwconv",
            "stages.{s}.norm.",
        ),
        _v2_layout(
            "official", {"layers.{s}.0": "patch_embed{s+1}"}, "block{s+1}.", "dwconv.dwconv", "norm{s+1}."
        ),
    ),
)


PYRAMID_VISION_TRANSFORMER_V2 = make_family(
    PyramidVisionTransformerV2Config,
    PyramidVisionTransformer,
    example={"embed_dims": 32, "num_layers": [2, 2, 2, 2], "out_indices": [0, 1, 2, 3]},
    adapt=_adapted,
    naming=PVT_V2_NAMES,
)
