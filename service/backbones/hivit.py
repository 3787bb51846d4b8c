"""HiViT (Zhang et al., arXiv:2205.14949) with mmpretrain's key names.

Each patch is a little map of its own, which shrinks to one token without looking at its neighbours; a transformer
follows. There is one level: the library breaks its own pass where it is to give another block than the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.beit import MAX_RELATIVE_PATCHES
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig, NormSpec, make_norm
from service.backbones.openmmlab import Computed, Scale, SpecConfig, make_family, named_arch
from service.backbones.swin import relative_position_index
from service.backbones.vision_transformer import MAX_PATCHES
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults
from service.errors import InvalidConfig, TooLarge

Depth = Annotated[int, Field(strict=True, ge=1, le=64)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=4096)]
    depths: Annotated[tuple[Depth, ...], Field(min_length=1, max_length=5)]
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)]


ARCHS: dict[str, ArchConfig] = {
    name: ArchConfig(embed_dims=width, depths=depths, num_heads=heads)
    for names, width, depths, heads in (
        (("t", "tiny"), 384, (1, 1, 10), 6),
        (("s", "small"), 384, (2, 2, 20), 6),
        (("b", "base"), 512, (2, 2, 24), 8),
        (("l", "large"), 768, (2, 2, 40), 12),
    )
    for name in names
}


@dataclass(frozen=True)
class PatchSpec:
    """How an image is cut: patches of `size` pixels, each of `inner` times `inner` positions, by one convolution."""

    size: int = 16
    inner: int = 4
    kernel: int = 4
    padding: int = 0

    @property
    def stride(self) -> int:
        """Pixels between two positions."""
        return self.size // self.inner


@dataclass(frozen=True)
class HiViTSpec:
    """What decides the numbers and the names of the weights.

    `grid` is [rows, columns] of the patches that the positions are for. `absolute` is whether they are added,
    `relative` whether attention has biases of them. `layer_scale` is 0 for none.
    """

    width: int
    depths: tuple[int, ...]
    heads: int
    grid: tuple[int, int]
    patch: PatchSpec = PatchSpec()
    in_channels: int = 3
    stem_ratio: float = 3.0
    ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    norm: NormSpec = NormSpec("ln")  # noqa: RUF009 - frozen
    patch_norm: bool = True
    absolute: bool = True
    relative: bool = False
    layer_scale: float = 0.0

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages; only the last attends."""
        last = len(self.depths) - 1
        return tuple(self.width // 2 ** (last - stage) for stage in range(last + 1))

    def features(self) -> tuple[FeatureInfo, ...]:
        """The map of the last block."""
        last = self.depths[-1] - 1
        return (FeatureInfo(last, str(last), self.width, self.patch.size, "NCHW"),)


class Attention(Scale, Computed):
    """Multi-head self-attention; keys `relative_position_bias_table`, `relative_position_index`, `qkv`, `proj`."""

    relative_position_index: Tensor

    def __init__(self, spec: HiViTSpec) -> None:
        super().__init__()
        self.side = spec.grid[0] if spec.relative else 0
        self.heads, self.scale = spec.heads, spec.scale
        if self.side:
            table = torch.empty((2 * self.side - 1) ** 2, spec.heads)
            self.relative_position_bias_table = nn.Parameter(table)
            index = torch.empty(self.side**2, self.side**2, dtype=torch.long)
            self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.width, spec.width)

    def start(self) -> None:
        """Small biases at first."""
        if self.side:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def compute(self) -> None:
        """The index, which follows from the grid."""
        if self.side:
            self.relative_position_index.copy_(relative_position_index(self.side))

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        n, length, width = tokens.shape
        query, key, value = (
            self.qkv(tokens).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._biases(query), scale=self.scale
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, width))
        return projected

    def _biases(self, like: Tensor) -> Tensor | None:
        if not self.side:
            return None
        biases = self.relative_position_bias_table[self.relative_position_index]
        return biases.permute(2, 0, 1)[None].to(like.dtype)


class FeedForward(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        mixed: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return mixed


class Block(Scale):
    """Attention in the last stage, and feed-forward; keys `gamma_1`, `gamma_2`, `norm1`, `attn`, `norm2`, `mlp`."""

    def __init__(self, spec: HiViTSpec, width: int, *, attends: bool) -> None:
        super().__init__()
        self.attends, self.initial = attends, spec.layer_scale
        for name, wanted in (("gamma_1", attends), ("gamma_2", True)):
            scaled = wanted and spec.layer_scale > 0
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if scaled else None)
        if attends:
            self.norm1 = make_norm(spec.norm, width)
            self.attn = Attention(spec)
        self.norm2 = make_norm(spec.norm, width)
        self.mlp = FeedForward(width, int(width * (spec.ratio if attends else spec.stem_ratio)))

    def start(self) -> None:
        """The residual branches begin at the config's scale."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, self.initial)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        if self.attends:
            attended = self.attn(self.norm1(tokens))
            tokens = tokens + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp(self.norm2(tokens))
        output: Tensor = tokens + (mixed if self.gamma_2 is None else self.gamma_2 * mixed)
        return output


class PatchMerge(nn.Module):
    """Four positions of a patch become one of twice the width; keys `norm`, `reduction`."""

    def __init__(self, spec: HiViTSpec, width: int) -> None:
        super().__init__()
        self.norm = make_norm(spec.norm, 4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[n, l, h, w, c] to [n, l, h / 2, w / 2, 2c]."""
        corners = [patches[..., y::2, x::2, :] for x in (0, 1) for y in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


class PatchEmbed(nn.Module):
    """An image as patches that are little maps; keys `proj`, `norm`."""

    def __init__(self, spec: HiViTSpec) -> None:
        super().__init__()
        patch, width = spec.patch, spec.widths()[0]
        self.patch = patch
        self.proj = nn.Conv2d(
            spec.in_channels, width, patch.kernel, stride=patch.stride, padding=patch.padding
        )
        self.norm = make_norm(spec.norm, width) if spec.patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[n, c, h, w] to [n, rows * columns, inner, inner, width] and (rows, columns).

        Raises:
            InvalidConfig: the image is not made of whole patches.
            TooLarge: more than 16384 patches.
        """
        height, width = images.shape[2:]
        rows, columns = height // self.patch.size, width // self.patch.size
        if rows * columns > MAX_PATCHES:
            raise TooLarge(f"{rows * columns} patches of {self.patch.size} px; the limit is {MAX_PATCHES}")
        maps, inner = self.proj(images), self.patch.inner
        if tuple(maps.shape[2:]) != (rows * inner, columns * inner):
            detail = f"an image of {height}x{width} is not made of whole patches of {self.patch.size} px"
            raise InvalidConfig("#/preprocess", detail)
        cut = maps.reshape(*maps.shape[:2], rows, inner, columns, inner)
        patches: Tensor = self.norm(cut.permute(0, 2, 4, 3, 5, 1).flatten(1, 2))
        return patches, (rows, columns)


class HiViT(Backbone, Scale):
    """Keys `pos_embed`, `patch_embed`, `blocks`."""

    def __init__(self, spec: HiViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        positions = spec.grid[0] * spec.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, positions, spec.width)) if spec.absolute else None
        self.patch_embed = PatchEmbed(spec)
        self.blocks = nn.ModuleList(self._make_blocks())

    def _make_blocks(self) -> Iterator[nn.Module]:
        """All stages, one behind the other; before the last they have two blocks where the depth says one."""
        spec = self.spec
        *stem, last = zip(spec.widths(), spec.depths, strict=True)
        for width, depth in stem:
            yield from (Block(spec, width, attends=False) for _ in range(2 * depth))
            yield PatchMerge(spec, width)
        yield from (Block(spec, last[0], attends=True) for _ in range(last[1]))

    def start(self) -> None:
        """Small positions at first."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The map of the last block, [n, c, rows, columns]."""
        patches, grid = self.patch_embed(images)
        attending = self.spec.depths[-1]
        for block in self.blocks[:-attending]:
            patches = block(patches)
        tokens = self._with_positions(patches[..., 0, 0, :], grid, tuple(images.shape[2:]))
        for block in self.blocks[-attending:]:
            tokens = block(tokens)
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
        return dict.fromkeys(nodes, maps)

    def _with_positions(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, ...]) -> Tensor:
        # The library counts patches and does not ask how they lie.
        if self.spec.relative and tokens.shape[1] != math.prod(self.spec.grid):
            side = self.spec.grid[0] * self.spec.patch.size
            detail = f"relative positions are made for images of {side}x{side} px; resize the images or set img_size"
            raise InvalidConfig("#/backbone/img_size", detail)
        if self.pos_embed is None:
            return tokens
        is_native = tokens.shape[1] == self.pos_embed.shape[1] and size[0] == size[1]
        return tokens + (self.pos_embed if is_native else self._resized(grid))

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        """Positions for another grid, taken to be of a square: the library's factors are a tenth too large."""
        if self.pos_embed is None:
            raise TypeError("there are no positions to resize")
        length = self.pos_embed.shape[1]
        side = math.isqrt(length)
        if side**2 != length:
            detail = f"{length} positions are not those of a square and cannot be resized; set img_size"
            raise InvalidConfig("#/backbone/img_size", detail)
        square = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = [(wanted + 0.1) / math.sqrt(length) for wanted in grid]
        resized = F.interpolate(square.float(), scale_factor=factors, mode="bicubic")
        return resized.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """The norms where `norm_cfg` says so: the library's own freezing fails on a part that it has not."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.HiViT -----------------------------------------------------------------------------


class HiViTConfig(SpecConfig):
    """`mmpretrain.HiViT`."""

    NETWORK: ClassVar[str] = "HiViT"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224,
        description="Image size that the positions are for; others are taken but with relative positions.",
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    inner_patches: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        4, description="Positions a side of a patch at first."
    )
    in_chans: InputChannels = 3
    stem_mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 3.0
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = True
    qk_scale: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Factor of the attention; null is the root of the width of a head, inverted."
    )
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    out_indices: Indices = Field(
        (23,),
        description="One index. Whatever it is, the library gives the last block for it.",
    )
    ape: bool = Field(True, description="Positions are added to the tokens.")
    rpe: bool = Field(False, description="Biases of relative position in each block of the transformer.")
    patch_norm: bool = True
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=0)] = Field(
        -1, description="Nothing is frozen: the library fails above 0."
    )
    kernel_size: Annotated[int, Field(strict=True, ge=1, le=256)] | None = Field(
        None, description="Of the first convolution; null is its stride."
    )
    pad_size: Annotated[int, Field(strict=True, ge=0, le=128)] | None = None
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = 0.0

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch = self.plan()
        *stem, last = arch.depths
        halvings, before = 2 ** len(stem), sum(2 * depth + 1 for depth in stem)
        if arch.embed_dims % arch.num_heads:
            yield "arch/num_heads", f"{arch.num_heads} heads do not divide {arch.embed_dims} embed_dims"
        if last <= before:
            yield (
                "arch/depths",
                f"the last stage needs more than {before} blocks, as many as there are before it",
            )
        if arch.embed_dims % halvings:
            yield "arch/embed_dims", f"{arch.embed_dims} is not a multiple of {halvings}"
        if self.inner_patches % halvings:
            yield "inner_patches", f"{self.inner_patches} is not a multiple of {halvings}"
        if self.patch_size < self.inner_patches:
            yield (
                "patch_size",
                f"patches of {self.patch_size} px have not {self.inner_patches} positions a side",
            )
        yield from self._grid_faults()

    def _grid_faults(self) -> Iterator[tuple[str, str]]:
        rows, columns = self.grid()
        limit = MAX_RELATIVE_PATCHES if self.rpe else MAX_PATCHES
        if not 0 < rows * columns <= limit:
            yield "img_size", f"{rows * columns} patches of {self.patch_size} px; 1 to {limit} are served"
        if self.rpe and rows != columns:
            yield "img_size", "relative positions need a square image"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches of an image of `img_size`."""
        height, width = self.image_size()
        return height // self.patch_size, width // self.patch_size

    def spec(self) -> HiViTSpec:
        """The neutral spelling."""
        arch, stride = self.plan(), self.patch_size // self.inner_patches
        return HiViTSpec(
            arch.embed_dims,
            arch.depths,
            arch.num_heads,
            self.grid(),
            PatchSpec(self.patch_size, self.inner_patches, self.kernel_size or stride, self.pad_size or 0),
            in_channels=self.in_chans,
            stem_ratio=self.stem_mlp_ratio,
            ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            scale=self.qk_scale,
            norm=NormSpec("ln", self.norm_cfg.eps),
            patch_norm=self.patch_norm,
            absolute=self.ape,
            relative=self.rpe,
            layer_scale=self.layer_scale_init_value,
        )

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the positions are for."""
        return PreprocessDefaults(size=self.image_size())

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The last block."""
        if len(self.out_indices) > 1:
            detail = f"{self.out_indices[0]}: the library gives the last block only; give one index"
            raise InvalidConfig("#/backbone/out_indices/0", detail)
        return tuple(Level(feature.index, feature.node, feature.node) for feature in description.features)


HIVIT = make_family(
    HiViTConfig, HiViT, example={"arch": "tiny", "out_indices": [9]}, architectures=tuple(ARCHS)
)
