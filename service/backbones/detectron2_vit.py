"""detectron2's plain ViT (Li et al., arXiv:2203.16527): one map, windowed attention, decomposed relative positions.

`SimpleFeaturePyramid` in `detectron2_simple_pyramid` makes levels of its map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.detectron2_configs import Fault
from service.backbones.detrex import LayerNormPartial, LayerNormPath, MlpRatio, Width, epsilon_of
from service.backbones.openmmlab import Scale, SpecConfig, make_family
from service.backbones.vision_transformer import VIT_NAMES
from service.backbones.vitdet_layers import (
    ActivationLayer,
    ActivationName,
    Attention,
    FeedForward,
    PatchEmbed,
    PositionTable,
    ResidualBottleneck,
    Size,
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

NODE = "map"
MAX_DEPTH = 128


@dataclass(frozen=True)
class ViTSpec:
    """What decides the numbers and the names of the weights.

    `windows` has the window of each block, 0 for attention of the whole map; `residual` the blocks with a convolutional
    one behind them. `positions` is the side of the square grid that absolute positions are for, 0 for none. `side` is
    that of the images, in pixels, that relative positions are for.
    """

    width: int
    heads: int
    windows: tuple[int, ...]
    residual: tuple[int, ...]
    positions: int
    with_cls_token: bool
    side: int
    relative: bool
    in_channels: int = 3
    patch: int = 16
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    eps: float = 1e-5
    activation: ActivationName = "GELU"

    @property
    def grid(self) -> Size:
        """[rows, columns] of the patches that relative positions are for."""
        return self.side // self.patch, self.side // self.patch

    def features(self) -> tuple[FeatureInfo, ...]:
        """The one map."""
        return (FeatureInfo(0, NODE, self.width, self.patch, "NCHW"),)


class Block(nn.Module):
    """Pre-norm attention, in windows or not, and feed-forward; keys `norm1`, `attn`, `norm2`, `mlp`, `residual`."""

    def __init__(self, spec: ViTSpec, index: int) -> None:
        super().__init__()
        width, self.window = spec.width, spec.windows[index]
        made_for = (self.window, self.window) if self.window else spec.grid
        self.norm1 = nn.LayerNorm(width, eps=spec.eps)
        self.attn = self.make_attention(spec, index, made_for if spec.relative else None)
        self.norm2 = nn.LayerNorm(width, eps=spec.eps)
        self.mlp = self.make_feed_forward(spec)
        with_residual = index in spec.residual
        self.residual = ResidualBottleneck(width, width // 2, spec.activation) if with_residual else None

    def make_attention(self, spec: ViTSpec, index: int, made_for: Size | None) -> nn.Module:  # noqa: ARG002 - hook
        """`attn`; `made_for` is the [h, w] of its relative positions, None for none."""
        return Attention(spec.width, spec.heads, qkv_bias=spec.qkv_bias, made_for=made_for)

    def make_feed_forward(self, spec: ViTSpec) -> nn.Module:
        """`mlp`."""
        return FeedForward(spec.width, int(spec.width * spec.mlp_ratio), spec.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self.attended(self.norm1(maps))
        mixed: Tensor = maps + self.mlp(self.norm2(maps))
        if self.residual is not None:
            mixed = self.residual(mixed)
        return mixed

    def attended(self, maps: Tensor) -> Tensor:
        """Attention in windows or not, [n, h, w, c] to the same shape."""
        if not self.window:
            whole: Tensor = self.attn(maps)
            return whole
        windows, padded = split_windows(maps, self.window)
        return merge_windows(self.attn(windows), padded, (maps.shape[1], maps.shape[2]))


class ViT(Backbone, Scale):
    """Keys `pos_embed`, `patch_embed`, `blocks`."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.positions = PositionTable(spec.positions, spec.with_cls_token)
        self.pos_embed = self.positions.made(spec.width)
        self.patch_embed = PatchEmbed(
            spec.in_channels, spec.width, (spec.patch, spec.patch), (spec.patch, spec.patch)
        )
        self.blocks = nn.ModuleList(self.make_block(spec, index) for index in range(len(spec.windows)))

    def make_block(self, spec: ViTSpec, index: int) -> nn.Module:
        """One of `blocks`."""
        return Block(spec, index)

    def start(self) -> None:
        """Small positions at first."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The map of the last block."""
        maps = self.positions.added(self.patch_embed(images), self.pos_embed)
        for block in self.blocks:
            maps = block(maps)
        return {node: maps.permute(0, 3, 1, 2) for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library freezes none of it."""
        return FreezeReport(freeze.stages, (), (), len(list(self.parameters())))


# --- the config -----------------------------------------------------------------------------------

Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
BlockIndex = Annotated[int, Field(strict=True, ge=0, le=1024)]
BlockIndices = Annotated[tuple[BlockIndex, ...], Field(max_length=MAX_DEPTH)]


class ViTConfig(SpecConfig):
    """`detectron2.ViT`."""

    NETWORK: ClassVar[str] = "detectron2.ViT"

    img_size: Pixels = Field(1024, description="Side of the images that relative positions are made for.")
    patch_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 16
    in_chans: InputChannels = 3
    embed_dim: Width = 768
    depth: Annotated[int, Field(strict=True, ge=1, le=MAX_DEPTH)] = 12
    num_heads: Annotated[int, Field(strict=True, ge=1, le=128)] = 12
    mlp_ratio: MlpRatio = 4.0
    qkv_bias: StrictBool = True
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_layer: LayerNormPath | LayerNormPartial = Field(
        "LayerNorm", description="LayerNorm, or a partial of it with its eps."
    )
    act_layer: ActivationLayer = "GELU"
    use_abs_pos: StrictBool = Field(True, description="Adds pos_embed, resized to the grid of patches.")
    use_rel_pos: StrictBool = Field(False, description="Adds biases of relative position to every attention.")
    rel_pos_zero_init: StrictBool = Field(True, description="Training only; changes nothing here.")
    window_size: Annotated[int, Field(strict=True, ge=0, le=256)] = Field(
        0, description="Of the blocks in window_block_indexes; 0 for none."
    )
    window_block_indexes: BlockIndices = ()
    residual_block_indexes: BlockIndices = Field(
        (), description="Blocks with a convolutional one behind them."
    )
    use_act_checkpoint: StrictBool = Field(
        False, description="Saves memory in training; changes nothing here."
    )
    pretrain_img_size: Pixels = Field(224, description="Side of the images that pos_embed is made for.")
    pretrain_use_cls_token: StrictBool = Field(
        True, description="Whether pos_embed has a position for a class token, which is not used."
    )
    out_feature: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        "last_feat", description="What to call the map."
    )

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.embed_dim % self.num_heads:
            yield "num_heads", f"{self.num_heads} heads do not divide {self.embed_dim} channels"
        if self.use_rel_pos and self.img_size < self.patch_size:
            yield "img_size", f"is less than the patches of {self.patch_size}"
        if self.use_abs_pos and self.pretrain_img_size < self.patch_size:
            yield "pretrain_img_size", f"is less than the patches of {self.patch_size}"
        if int(self.embed_dim * self.mlp_ratio) < 1:
            yield "mlp_ratio", f"leaves no channels of {self.embed_dim}"
        if self.residual_block_indexes and self.embed_dim < 2:
            yield "residual_block_indexes", "a bottleneck of half of one channel has none"

    def spec(self) -> ViTSpec:
        """The neutral spelling."""
        windowed = set(self.window_block_indexes)
        residual = sorted(index for index in set(self.residual_block_indexes) if index < self.depth)
        return ViTSpec(
            width=self.embed_dim,
            heads=self.num_heads,
            windows=tuple(self.window_size if index in windowed else 0 for index in range(self.depth)),
            residual=tuple(residual),
            positions=self.pretrain_img_size // self.patch_size if self.use_abs_pos else 0,
            with_cls_token=self.pretrain_use_cls_token and self.use_abs_pos,
            side=self.img_size,
            relative=self.use_rel_pos,
            in_channels=self.in_chans,
            patch=self.patch_size,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            eps=epsilon_of(self.norm_layer),
            activation=self.act_layer,
        )

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(self.img_size, self.img_size))

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The one map, under its name."""
        return tuple(
            Level(level.index, self.out_feature, level.node) for level in super().levels(description)
        )

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The one map."""
        return tuple(Level(feature.index, feature.node, feature.node) for feature in description.features)


EXAMPLE: dict[str, Any] = {
    "img_size": 1024,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "window_size": 14,
    "window_block_indexes": [0, 1, 3, 4, 6, 7, 9, 10],
    "use_rel_pos": True,
    "norm_layer": {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-6},
}
VIT = make_family(ViTConfig, ViT, example=EXAMPLE, naming=VIT_NAMES, library="timm")
