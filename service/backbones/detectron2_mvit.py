"""detectron2's MViTv2 (Li et al., arXiv:2112.01526): attention over pooled queries, keys and values, in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels, levels_by_stride
from service.backbones.detectron2_configs import Fault
from service.backbones.detrex import (
    LayerNormPartial,
    LayerNormPath,
    MlpRatio,
    Width,
    epsilon_of,
)
from service.backbones.mvit import MVIT_NAMES
from service.backbones.openmmlab import Scale, SpecConfig, make_family
from service.backbones.vitdet_layers import (
    ActivationLayer,
    FeedForward,
    PatchEmbed,
    PositionTable,
    RelativePositions,
    Size,
    attend,
    merge_windows,
    split_windows,
)
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    PreprocessDefaults,
)
from service.errors import InvalidConfig

FIRST_STAGE = 2
MAX_DEPTH = 128
MAX_STAGES = 8
MAX_WIDTH = 16_384


@dataclass(frozen=True)
class BlockSpec:
    """One block.

    `window` is in places before the pooling, 0 for attention of the whole map; queries are pooled by `stride`, keys and
    values by `key_stride`. `table` is the length of the tables of relative positions, 0 for none. `ends` is the number
    of the stage that the block ends, None inside one.
    """

    inputs: int
    outputs: int
    heads: int
    stride: int
    key_stride: int
    window: int
    table: int
    ends: int | None


@dataclass(frozen=True)
class MViTSpec:
    """What decides the numbers and the names of the weights; `outputs` are the stages with an output norm."""

    blocks: tuple[BlockSpec, ...]
    outputs: tuple[int, ...]
    positions: int
    with_cls_token: bool
    side: int
    in_channels: int = 3
    kernel: Size = (7, 7)
    patch: Size = (4, 4)
    padding: Size = (3, 3)
    pool_kernel: Size = (3, 3)
    residual_pooling: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    eps: float = 1e-5

    @property
    def width(self) -> int:
        """Channels of the patches."""
        return self.blocks[0].inputs

    def features(self) -> tuple[FeatureInfo, ...]:
        """`scale2` and on: the end of each stage."""
        ends = [(block.ends, block.outputs) for block in self.blocks if block.ends is not None]
        return tuple(
            FeatureInfo(index, name_of(stage), width, self.patch[0] * 2**index, "NCHW")
            for index, (stage, width) in enumerate(ends)
        )


def name_of(stage: int) -> str:
    """What the library calls the map that a stage ends in."""
    return f"scale{stage}"


# --- layers ---------------------------------------------------------------------------------------


def _pooled(maps: Tensor, pool: nn.Module, norm: nn.Module) -> Tensor:
    """[n, h, w, c] to [n, h / stride, w / stride, c], normed."""
    smaller: Tensor = norm(pool(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return smaller


class PoolingAttention(RelativePositions):
    """Attention over pooled maps, each head by itself; keys `pool_q`, `norm_q` and so on, `qkv`, `proj`."""

    def __init__(self, spec: MViTSpec, block: BlockSpec) -> None:
        super().__init__()
        self.block, self.residual = block, spec.residual_pooling
        channels = block.outputs // block.heads
        self.qkv = nn.Linear(block.inputs, 3 * block.outputs, bias=spec.qkv_bias)
        self.proj = nn.Linear(block.outputs, block.outputs)
        padding = (spec.pool_kernel[0] // 2, spec.pool_kernel[1] // 2)
        for name, stride in (("q", block.stride), ("k", block.key_stride), ("v", block.key_stride)):
            pool = nn.Conv2d(
                channels, channels, spec.pool_kernel, stride, padding, groups=channels, bias=False
            )
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", nn.LayerNorm(channels, eps=spec.eps))
        self.add_tables((block.table, block.table) if block.table else None, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, inputs] to [n, h / stride, w / stride, outputs]."""
        n, height, width, _ = maps.shape
        heads, channels = self.block.heads, self.block.outputs // self.block.heads
        qkv = self.qkv(maps).reshape(n, height, width, 3, heads, channels).permute(3, 0, 4, 1, 2, 5)
        query, key, value = (
            _pooled(part.flatten(0, 1), getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}"))
            for name, part in zip("qkv", qkv.unbind(0), strict=True)
        )
        mixed = self._attended(query, key, value)
        mixed = mixed + query if self.residual else mixed
        rows, columns = mixed.shape[1:3]
        joined = mixed.reshape(n, heads, rows, columns, channels).permute(0, 2, 3, 1, 4).flatten(3)
        projected: Tensor = self.proj(joined)
        return projected

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads by themselves, [n * heads, h, w, c] each, to the shape of the query; in windows or not."""
        block, size = self.block, (query.shape[1], query.shape[2])
        if not block.window:
            return self._mixed(query, key, value)
        query, padded = split_windows(query, block.window // block.stride)
        key, value = (split_windows(maps, block.window // block.key_stride)[0] for maps in (key, value))
        return merge_windows(self._mixed(query, key, value), padded, size)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size, key_size = (query.shape[1], query.shape[2]), (key.shape[1], key.shape[2])
        query_tokens, key_tokens, value_tokens = (maps.flatten(1, 2)[:, None] for maps in (query, key, value))
        mixed = attend(query_tokens, key_tokens, value_tokens, self.tables(), size, key_size)
        return mixed.reshape(query.shape)


class Block(nn.Module):
    """Pooling attention and feed-forward; keys `norm1`, `attn`, `norm2`, `mlp`, and `proj` where channels change."""

    def __init__(self, spec: MViTSpec, block: BlockSpec) -> None:
        super().__init__()
        self.stride = block.stride
        self.norm1 = nn.LayerNorm(block.inputs, eps=spec.eps)
        self.attn = PoolingAttention(spec, block)
        self.norm2 = nn.LayerNorm(block.outputs, eps=spec.eps)
        self.mlp = FeedForward(block.outputs, int(block.outputs * spec.mlp_ratio))
        changes = block.inputs != block.outputs
        self.proj = nn.Linear(block.inputs, block.outputs) if changes else None

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, inputs] to [n, h / stride, w / stride, outputs]."""
        normed = self.norm1(maps)
        beside = maps if self.proj is None else self.proj(normed)
        if self.stride > 1:
            channels_first = beside.permute(0, 3, 1, 2)
            side = self.stride + 1
            beside = F.max_pool2d(channels_first, side, self.stride, side // 2).permute(0, 2, 3, 1)
        maps = beside + self.attn(normed)
        mixed: Tensor = maps + self.mlp(self.norm2(maps))
        return mixed


class MViT(Backbone, Scale):
    """Keys `pos_embed`, `patch_embed`, `blocks`, `scale2_norm`, …"""

    def __init__(self, spec: MViTSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.ends = [block.ends for block in spec.blocks]
        self.positions = PositionTable(spec.positions, spec.with_cls_token)
        self.pos_embed = self.positions.made(spec.width)
        self.patch_embed = PatchEmbed(spec.in_channels, spec.width, spec.kernel, spec.patch, spec.padding)
        self.blocks = nn.ModuleList(Block(spec, block) for block in spec.blocks)
        widths = {block.ends: block.outputs for block in spec.blocks}
        for stage in spec.outputs:
            self.add_module(f"{name_of(stage)}_norm", nn.LayerNorm(widths[stage], eps=spec.eps))

    def start(self) -> None:
        """Small positions at first."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        wanted = set(nodes)
        found: dict[str, Tensor] = {}
        maps = self.positions.added(self.patch_embed(images), self.pos_embed)
        for block, stage in zip(self.blocks, self.ends, strict=True):
            if wanted <= found.keys():
                break
            maps = block(maps)
            if stage is not None and (name := name_of(stage)) in wanted:
                found[name] = self.get_submodule(f"{name}_norm")(maps).permute(0, 3, 1, 2)
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library freezes none of it."""
        return FreezeReport(freeze.stages, (), (), len(list(self.parameters())))


# --- the config -----------------------------------------------------------------------------------

Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Side = Annotated[int, Field(strict=True, ge=1, le=32)]
Padding = Annotated[int, Field(strict=True, ge=0, le=16)]
BlockIndex = Annotated[int, Field(strict=True, ge=0, lt=MAX_DEPTH)]
ScaleName = Annotated[str, Field(pattern=r"^scale[1-9][0-9]?$", max_length=8)]


class MViTConfig(SpecConfig):
    """`detectron2.MViT`."""

    NETWORK: ClassVar[str] = "detectron2.MViT"

    img_size: Pixels = Field(224, description="Side of the images that relative positions are made for.")
    patch_kernel: tuple[Side, Side] = (7, 7)
    patch_stride: tuple[Side, Side] = (4, 4)
    patch_padding: tuple[Padding, Padding] = (3, 3)
    in_chans: InputChannels = 3
    embed_dim: Width = Field(96, description="Channels of the first stage; they double in each.")
    depth: Annotated[int, Field(strict=True, ge=1, le=MAX_DEPTH)] = Field(16, description="Blocks in all.")
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        1, description="Of the first stage; they double in each."
    )
    last_block_indexes: Annotated[tuple[BlockIndex, ...], Field(min_length=3, max_length=MAX_STAGES)] = Field(
        (0, 2, 11, 15), description="The last block of each stage; those beyond depth end nothing."
    )
    qkv_pool_kernel: tuple[Side, Side] = (3, 3)
    adaptive_kv_stride: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        4,
        description="Of keys and values in the first stage; halved in each, and doubled in the last blocks of two.",
    )
    adaptive_window_size: Annotated[int, Field(strict=True, ge=0, le=1024)] = Field(
        56, description="Of the first stage, in patches; halved in each. 0 for no windows."
    )
    residual_pooling: StrictBool = True
    mlp_ratio: MlpRatio = 4.0
    qkv_bias: StrictBool = True
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_layer: LayerNormPath | LayerNormPartial = Field(
        "LayerNorm", description="LayerNorm, or a partial of it with its eps."
    )
    act_layer: ActivationLayer = Field(
        "GELU", description="No effect: the library does not pass it on, and its blocks have GELU."
    )
    use_abs_pos: StrictBool = Field(False, description="Adds pos_embed, resized to the grid of patches.")
    use_rel_pos: StrictBool = Field(True, description="Adds biases of relative position to every attention.")
    rel_pos_zero_init: StrictBool = Field(True, description="Training only; changes nothing here.")
    use_act_checkpoint: StrictBool = Field(
        False, description="Saves memory in training; changes nothing here."
    )
    pretrain_img_size: Pixels = Field(224, description="Side of the images that pos_embed is made for.")
    pretrain_use_cls_token: StrictBool = Field(
        True, description="Whether pos_embed has a position for a class token, which is not used."
    )
    out_features: Annotated[tuple[ScaleName, ...], Field(min_length=1, max_length=MAX_STAGES)] = Field(
        ("scale2", "scale3", "scale4", "scale5"), description="Stages to return; each has a norm of its own."
    )

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        ends, heads = self.last_block_indexes, self.num_heads
        if any(after <= before for before, after in pairwise(ends)):
            yield "last_block_indexes", "must ascend"
        if self.embed_dim % heads:
            yield "num_heads", f"{heads} heads do not divide {self.embed_dim} channels"
        widest = self.embed_dim * 2 ** self._doublings()
        if widest > MAX_WIDTH:
            yield "embed_dim", f"makes a stage of {widest:,} channels; the limit is {MAX_WIDTH:,}"
        if int(self.embed_dim * self.mlp_ratio) < 1:
            yield "mlp_ratio", f"leaves no channels of {self.embed_dim}"
        if any(size % 2 == 0 for size in self.qkv_pool_kernel):
            yield "qkv_pool_kernel", "must be odd, or pooled maps are larger than their windows"
        yield from self._position_faults()
        yield from self._block_faults()

    def _position_faults(self) -> Iterator[Fault]:
        rows, columns = self.patch_stride
        if rows != columns and self.use_rel_pos and self.img_size // rows != self.img_size // columns:
            yield "patch_stride", "relative positions need a square grid of patches"
        if self.use_abs_pos and not self._positions():
            yield "pretrain_img_size", "is less than a patch"
        if rows != columns and self.use_abs_pos:
            yield "patch_stride", "absolute positions need a square grid of patches"

    def _block_faults(self) -> Iterator[Fault]:
        for index, block in enumerate(self._blocks()):
            if block.window and min(block.window // block.stride, block.window // block.key_stride) < 1:
                yield "adaptive_window_size", f"leaves block {index} a window of less than one place"
                return
            if self.use_rel_pos and block.table < 1:
                yield "img_size", f"leaves block {index} no place for a relative position"
                return

    def _doublings(self) -> int:
        return sum(end < self.depth - 1 for end in self.last_block_indexes)

    def _positions(self) -> int:
        return self.pretrain_img_size // self.patch_stride[0] if self.use_abs_pos else 0

    def _blocks(self) -> Iterator[BlockSpec]:
        """Every block, as strides, windows and widths change from stage to stage."""
        ends, width = self.last_block_indexes, self.embed_dim
        stage = _Stage(width, self.num_heads, self.adaptive_kv_stride, self.adaptive_window_size)
        side = self.img_size // self.patch_stride[0]
        for index in range(self.depth):
            starts = index - 1 in ends
            stride = 2 if starts else 1
            key_stride = stage.key_stride * (2 if index in ends[1:3] else 1)
            yield BlockSpec(
                inputs=width,
                outputs=stage.width,
                heads=stage.heads,
                stride=stride,
                key_stride=key_stride,
                # The last blocks of all stages but the first see the whole map.
                window=0 if index in ends[1:] else stage.window,
                table=2 * max(side // stride, side // key_stride) - 1 if self.use_rel_pos else 0,
                ends=FIRST_STAGE + ends.index(index) if index in ends else None,
            )
            width = stage.width
            if index in ends:
                stage = stage.next()
            if starts:
                # The first block of a stage still has the window of the one before.
                stage, side = replace(stage, window=stage.window // 2), side // 2

    def spec(self) -> MViTSpec:
        """The neutral spelling."""
        ended = sum(end < self.depth for end in self.last_block_indexes)
        known = range(FIRST_STAGE, FIRST_STAGE + ended)
        asked = known if self.strides is not None else [int(name[5:]) for name in self.out_features]
        return MViTSpec(
            blocks=tuple(self._blocks()),
            outputs=tuple(stage for stage in known if stage in asked),
            positions=self._positions(),
            with_cls_token=self.pretrain_use_cls_token and self.use_abs_pos,
            side=self.img_size,
            in_channels=self.in_chans,
            kernel=self.patch_kernel,
            patch=self.patch_stride,
            padding=self.patch_padding,
            pool_kernel=self.qkv_pool_kernel,
            residual_pooling=self.residual_pooling,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            eps=epsilon_of(self.norm_layer),
        )

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(self.img_size, self.img_size))

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named as the features are."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        return tuple(Level(level.index, level.node, level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_features`.

        Raises:
            InvalidConfig: a stage that the network has not, or one asked for twice.
        """
        known = {feature.node: feature.index for feature in description.features}
        for position, name in enumerate(self.out_features):
            if name not in known or name in self.out_features[:position]:
                detail = "is asked for twice" if name in known else f"this backbone has {', '.join(known)}"
                raise InvalidConfig(f"#/backbone/out_features/{position}", detail)
        return tuple(Level(known[name], name, name) for name in self.out_features)


@dataclass(frozen=True)
class _Stage:
    """What changes from stage to stage."""

    width: int
    heads: int
    key_stride: int
    window: int

    def next(self) -> _Stage:
        """The stage behind this one; its window changes only after its first block."""
        return replace(
            self, width=self.width * 2, heads=self.heads * 2, key_stride=max(self.key_stride // 2, 1)
        )


EXAMPLE: dict[str, Any] = {
    "embed_dim": 96,
    "depth": 10,
    "num_heads": 1,
    "last_block_indexes": [0, 2, 7, 9],
    "residual_pooling": True,
    "norm_layer": {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-6},
    "out_features": ["scale2", "scale3", "scale4", "scale5"],
}
MVIT = make_family(MViTConfig, MViT, example=EXAMPLE, naming=MVIT_NAMES, library="detectron2")
