"""Transformer in Transformer (Han et al., arXiv:2103.00112) with mmpretrain's key names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Scale,
    SpecConfig,
    make_family,
    named_arch,
)
from service.backbones.transformer_layers import FeedForward, MultiheadAttention
from service.backbones.vision_transformer import MAX_PATCHES, Pixels, before
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults
from service.errors import InvalidConfig

KERNEL = 7  # of the convolution that makes pixels
GELU = ActivationSpec("gelu")


class ArchConfig(BaseModel):
    """An `arch` spelled out: outer is of the patches, inner of the pixels in one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims_outer: Annotated[int, Field(strict=True, ge=1, le=4096)]
    embed_dims_inner: Annotated[int, Field(strict=True, ge=1, le=1024)]
    num_layers: Annotated[int, Field(strict=True, ge=1, le=64)]
    num_heads_outer: Annotated[int, Field(strict=True, ge=1, le=64)]
    num_heads_inner: Annotated[int, Field(strict=True, ge=1, le=64)]


def _arch(outer: int, inner: int, heads_outer: int) -> ArchConfig:
    return ArchConfig(
        embed_dims_outer=outer,
        embed_dims_inner=inner,
        num_layers=12,
        num_heads_outer=heads_outer,
        num_heads_inner=4,
    )


ARCHS: dict[str, ArchConfig] = {
    name: arch
    for names, arch in ((("s", "small"), _arch(384, 24, 6)), (("b", "base"), _arch(640, 40, 10)))
    for name in names
}


@dataclass(frozen=True)
class BlockSpec:
    """A transformer's layer; `ratio` is of the inner width of its feed-forward network, which has `linears` layers."""

    width: int
    heads: int
    ratio: int = 4
    linears: int = 2
    qkv_bias: bool = False
    eps: float = 1e-5


@dataclass(frozen=True)
class TNTSpec:
    """What decides the numbers and the names of the weights.

    `outer` is of the patches, `inner` of the pixels in one. `pixels` are [rows, columns] of those in a patch, of which
    there are `patches`. Images are of `image_size`, [height, width].
    """

    inner: BlockSpec
    outer: BlockSpec
    layers: int
    image_size: tuple[int, int]
    pixels: tuple[int, int]
    patches: int
    stride: int = 4
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """The class token."""
        return (FeatureInfo(0, "0", self.outer.width, None, "NC"),)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual; keys `norm_attn`, `attn`, `norm_ffn`, `ffn`."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        width = spec.width
        self.norm_attn = nn.LayerNorm(width, eps=spec.eps)
        self.attn = MultiheadAttention(width, spec.heads, bias=spec.qkv_bias)
        self.norm_ffn = nn.LayerNorm(width, eps=spec.eps)
        self.ffn = FeedForward(width, width * spec.ratio, GELU, linears=spec.linears)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.attn(self.norm_attn(tokens))
        mixed: Tensor = tokens + self.ffn(self.norm_ffn(tokens))
        return mixed


class Layer(nn.Module):
    """A block among the pixels of each patch, and one among the patches; keys `inner_block`, `outer_block`, …"""

    def __init__(self, spec: TNTSpec) -> None:
        super().__init__()
        inner = spec.inner.width
        self.inner_block = Block(spec.inner)
        self.norm_proj = nn.LayerNorm(inner, eps=spec.inner.eps)
        self.projection = nn.Linear(inner * math.prod(spec.pixels), spec.outer.width)
        self.outer_block = Block(spec.outer)

    def forward(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """[n * l, pixels, inner] and [n, 1 + l, outer] to the same shapes."""
        pixels = self.inner_block(pixels)
        n, length, _ = patches.shape
        added = self.projection(self.norm_proj(pixels).reshape(n, length - 1, -1))
        patches = torch.cat((patches[:, :1], patches[:, 1:] + added), dim=1)
        return pixels, self.outer_block(patches)


class PixelEmbed(nn.Module):
    """A strided convolution, whose map is cut into patches of pixels; key `proj`."""

    def __init__(self, spec: TNTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = nn.Conv2d(
            spec.in_channels, spec.inner.width, KERNEL, stride=spec.stride, padding=KERNEL // 2
        )

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        """[n, c, h, w] and [1, inner, *pixels] to [n * patches, pixels, inner].

        Raises:
            InvalidConfig: the images are of another size.
        """
        spec = self.spec
        if tuple(images.shape[-2:]) != spec.image_size:
            sizes = [f"{width}x{height}" for height, width in (spec.image_size, images.shape[-2:])]
            detail = (
                f"positions are made for images of {sizes[0]} px, not {sizes[1]}; resize them or set img_size"
            )
            raise InvalidConfig("#/backbone/img_size", detail)
        cut = F.unfold(self.proj(images), spec.pixels, stride=spec.pixels).transpose(1, 2)
        patches = cut.reshape(-1, spec.inner.width, *spec.pixels) + positions
        return patches.flatten(2).transpose(1, 2)


class TNT(Backbone, Scale):
    """Keys `cls_token`, `patch_pos`, `pixel_pos`, `pixel_embed`, `projection`, `layers`, `norm`, …"""

    def __init__(self, spec: TNTSpec) -> None:
        super().__init__()
        self.features = spec.features()
        inner, outer = spec.inner.width, spec.outer.width
        whole = inner * math.prod(spec.pixels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, outer))
        self.patch_pos = nn.Parameter(torch.empty(1, spec.patches + 1, outer))
        self.pixel_pos = nn.Parameter(torch.empty(1, inner, *spec.pixels))
        self.pixel_embed = PixelEmbed(spec)
        self.norm1_proj = nn.LayerNorm(whole, eps=spec.inner.eps)
        self.projection = nn.Linear(whole, outer)
        self.norm2_proj = nn.LayerNorm(outer, eps=spec.outer.eps)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(outer, eps=spec.outer.eps)

    def start(self) -> None:
        """Small positions and class token."""
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The class token, [n, c]."""
        pixels = self.pixel_embed(images, self.pixel_pos)
        whole = self.norm1_proj(pixels.reshape(images.shape[0], self.patch_pos.shape[1] - 1, -1))
        patches = before(self.cls_token, self.norm2_proj(self.projection(whole))) + self.patch_pos
        for layer in self.layers:
            pixels, patches = layer(pixels, patches)
        return dict.fromkeys(nodes, self.norm(patches)[:, 0])

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing but what `norm_cfg` says: the library has no rule."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.TNT = mmcls.TNT -------------------------------------------------------------------

PatchSide = Annotated[int, Field(strict=True, ge=1, le=256)]


class TNTConfig(SpecConfig):
    """`mmpretrain.TNT`, which is also `mmcls.TNT`. There is one output: the class token."""

    NETWORK: ClassVar[str] = "TNT"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "b"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Size of the images: no other is taken."
    )
    patch_size: PatchSide | tuple[PatchSide, PatchSide] = 16
    in_channels: InputChannels = 3
    ffn_ratio: Annotated[int, Field(strict=True, ge=1, le=16)] = 4
    qkv_bias: bool = False
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    act_cfg: ActivationConfig = Field(
        ActivationConfig(type="GELU"), description="Changes nothing: the library's blocks take GELU."
    )
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    first_stride: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        4, description="Of the convolution that makes pixels."
    )
    num_fcs: Annotated[int, Field(strict=True, ge=2, le=8)] = Field(
        2, description="Linear layers of a feed-forward network."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch, patches = self.plan(), self.patches()
        for part, width, heads in (
            ("outer", arch.embed_dims_outer, arch.num_heads_outer),
            ("inner", arch.embed_dims_inner, arch.num_heads_inner),
        ):
            if width % heads:
                yield f"arch/num_heads_{part}", f"{heads} heads do not divide {width} embed_dims_{part}"
        cut = math.prod(
            math.ceil(side / self.first_stride) // pixels
            for side, pixels in zip(self.image_size(), self.pixels(), strict=True)
        )
        if not patches or cut != patches:
            yield (
                "img_size",
                f"has {patches} patches of {list(self.patch())} px, but its map is cut into {cut}",
            )
        if patches > MAX_PATCHES:
            yield "img_size", f"{patches} patches of {list(self.patch())} px; the limit is {MAX_PATCHES}"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def patch(self) -> tuple[int, int]:
        """[height, width] of a patch, in pixels of the image."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size, self.patch_size)

    def pixels(self) -> tuple[int, int]:
        """[rows, columns] of a patch on the map."""
        height, width = self.patch()
        return math.ceil(height / self.first_stride), math.ceil(width / self.first_stride)

    def patches(self) -> int:
        """Whole patches of an image."""
        return math.prod(side // patch for side, patch in zip(self.image_size(), self.patch(), strict=True))

    def _block(self, width: int, heads: int) -> BlockSpec:
        return BlockSpec(width, heads, self.ffn_ratio, self.num_fcs, self.qkv_bias, self.norm_cfg.eps)

    def spec(self) -> TNTSpec:
        """The neutral spelling."""
        arch = self.plan()
        return TNTSpec(
            inner=self._block(arch.embed_dims_inner, arch.num_heads_inner),
            outer=self._block(arch.embed_dims_outer, arch.num_heads_outer),
            layers=arch.num_layers,
            image_size=self.image_size(),
            pixels=self.pixels(),
            patches=self.patches(),
            stride=self.first_stride,
            in_channels=self.in_channels,
        )

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The one output."""
        return tuple(Level(feature.index, "0", feature.node) for feature in description.features)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())


TNT_FAMILY = make_family(TNTConfig, TNT, example={"arch": "s"}, architectures=tuple(ARCHS))
