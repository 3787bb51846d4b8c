"""Conformer (Peng et al., arXiv:2105.03889) with mmpretrain's key names.

A residual network and a transformer side by side, which exchange what they see in every block. A block gives two
vectors: the mean of its map, and its class token (without one, the mean of its tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices
from service.backbones.freezing import freeze_report
from service.backbones.norms import NormSpec, make_norm
from service.backbones.openmmlab import OpenMMLabConfig, Scale, make_family, named_arch
from service.backbones.vision_transformer import (
    MAX_PATCHES,
    Size,
    TransformerLayer,
    VisionTransformerSpec,
    before,
)
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import InvalidConfig, TooLarge

STEM = 64
EXPANSION = 4
FIRST_BLOCK = 2  # the library counts from the stem, which is 1 and gives nothing
BATCH_NORM, LAYER_NORM = NormSpec("bn", 1e-6), NormSpec("ln", 1e-6)


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=2048)]
    channel_ratio: Annotated[float, Field(gt=0, le=16)]
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)]
    depths: Annotated[int, Field(strict=True, ge=3, le=48)]


ARCHS: dict[str, ArchConfig] = {
    name: ArchConfig(embed_dims=width, channel_ratio=ratio, num_heads=heads, depths=12)
    for names, width, ratio, heads in (
        (("t", "tiny"), 384, 1, 6),
        (("s", "small"), 384, 4, 6),
        (("b", "base"), 576, 6, 9),
    )
    for name in names
}


@dataclass(frozen=True)
class ConformerSpec:
    """What decides the numbers and the names of the weights.

    `channels` are those of the convolutions at first: each third of the blocks has twice as many as the one before.
    """

    width: int
    depths: int
    heads: int
    hidden: int
    channels: int
    patch: int = 16
    qkv_bias: bool = True
    with_cls_token: bool = True
    in_channels: int = 3

    @property
    def third(self) -> int:
        """Steps in a third of the network; the first third begins with the stem."""
        return self.depths // 3

    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(FIRST_BLOCK, 3 * self.third + 1)

    def third_of(self, block: int) -> int:
        """0 to 2: which third a block is in."""
        return (block - 1) // self.third

    def transformer(self) -> VisionTransformerSpec:
        """The neutral spelling of a layer of the transformer."""
        size = Size(self.width, self.depths, self.heads, self.hidden)
        return VisionTransformerSpec(size, grid=(1, 1), qkv_bias=self.qkv_bias)

    def features(self) -> tuple[FeatureInfo, ...]:
        """Two vectors a block."""
        found = []
        for block in self.blocks():
            channels = self.channels * 2 ** self.third_of(block)
            found.append(FeatureInfo(block, f"{block}.conv", channels, None, "NC"))
            found.append(FeatureInfo(block, f"{block}.trans", self.width, None, "NC"))
        return tuple(found)


class ConvBlock(nn.Module):
    """A bottleneck whose middle map others read and add to; keys `conv1`, `bn1`, …, `residual_conv`, `residual_bn`."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, projects: bool = False) -> None:
        super().__init__()
        middle = outputs // EXPANSION
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = make_norm(BATCH_NORM, middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = make_norm(BATCH_NORM, middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = make_norm(BATCH_NORM, outputs)
        self.projects = projects
        if projects:
            self.residual_conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.residual_bn = make_norm(BATCH_NORM, outputs)

    def forward(self, maps: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[n, inputs, h, w] to the output, [n, outputs, h / stride, w / stride], and to the middle map.

        `added` is added to what the middle convolution takes.
        """
        middle = F.relu(self.bn1(self.conv1(maps)))
        middle = F.relu(self.bn2(self.conv2(middle if added is None else middle + added)))
        identity = self.residual_bn(self.residual_conv(maps)) if self.projects else maps
        return F.relu(self.bn3(self.conv3(middle)) + identity), middle


class ToTokens(nn.Module):
    """A map as tokens; keys `conv_project`, `ln`."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(inputs, width, 1)
        self.ln = make_norm(LAYER_NORM, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows * columns, width]."""
        pooled = F.avg_pool2d(self.conv_project(maps), self.stride)
        return F.gelu(self.ln(pooled.flatten(2).transpose(1, 2)))


class ToMap(nn.Module):
    """Tokens as a map; keys `conv_project`, `bn`."""

    def __init__(self, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(width, outputs, 1)
        self.bn = make_norm(BATCH_NORM, outputs)

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """[n, rows * columns, width] to a map of `size`, [n, outputs, h, w]."""
        rows, columns = (side // self.stride for side in size)
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, rows, columns)
        projected = F.relu(self.bn(self.conv_project(maps)))
        return F.interpolate(projected, size=(rows * self.stride, columns * self.stride))


class ConvTransBlock(nn.Module):
    """Two bottlenecks and a layer of the transformer between them.

    Keys `cnn_block`, `fusion_block`, `squeeze_block`, `expand_block`, `trans_block`.
    """

    def __init__(self, spec: ConformerSpec, block: int) -> None:
        super().__init__()
        third, before_it = spec.third_of(block), spec.third_of(block - 1)
        inputs, outputs = (spec.channels * 2**part for part in (before_it, third))
        begins, ends = third > before_it, block == spec.depths
        tokens_stride = spec.patch // 4 // 2**third
        self.extra = int(spec.with_cls_token)
        self.cnn_block = ConvBlock(inputs, outputs, stride=1 + begins, projects=begins)
        self.fusion_block = ConvBlock(outputs, outputs, stride=1 + ends, projects=ends)
        self.squeeze_block = ToTokens(outputs // EXPANSION, spec.width, tokens_stride)
        self.expand_block = ToMap(spec.width, outputs // EXPANSION, tokens_stride)
        self.trans_block = TransformerLayer(spec.transformer())

    def forward(self, maps: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[n, c, h, w] and [n, l, width] to the same of this block."""
        maps, middle = self.cnn_block(maps)
        # The class token is added to itself, as the patches' tokens get those of the map.
        seen = torch.cat((tokens[:, : self.extra], self.squeeze_block(middle)), dim=1)
        tokens = self.trans_block(seen + tokens)
        added = self.expand_block(tokens[:, self.extra :], middle.shape[2:])
        return self.fusion_block(maps, added)[0], tokens


class Conformer(Backbone, Scale):
    """Keys `cls_token`, `conv1`, `bn1`, `conv_1`, `trans_patch_conv`, `trans_1`, `conv_trans_2`, …, `trans_norm`."""

    def __init__(self, spec: ConformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.stride = spec.patch // 4
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width)) if spec.with_cls_token else None
        self.conv1 = nn.Conv2d(spec.in_channels, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.conv_1 = ConvBlock(STEM, spec.channels, projects=True)
        self.trans_patch_conv = nn.Conv2d(STEM, spec.width, self.stride, stride=self.stride)
        self.trans_1 = TransformerLayer(spec.transformer())
        for block in spec.blocks():
            self.add_module(f"conv_trans_{block}", ConvTransBlock(spec, block))
        self.trans_norm = nn.LayerNorm(spec.width)

    def start(self) -> None:
        """A small class token at first."""
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The vectors in `nodes`; stops after the deepest block asked for.

        Raises:
            TooLarge: more than 16384 patches.
        """
        maps, tokens = self._embed(images)
        found = {}
        for block in range(FIRST_BLOCK, max(int(node.partition(".")[0]) for node in nodes) + 1):
            maps, tokens = self.get_submodule(f"conv_trans_{block}")(maps, tokens)
            for node, feature in ((f"{block}.conv", maps), (f"{block}.trans", tokens)):
                if node in nodes:
                    found[node] = self._vector(feature)
        return {node: found[node] for node in nodes}

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The first map and the first tokens."""
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        height, width = stem.shape[2:]
        stem = F.pad(stem, (0, -width % self.stride, 0, -height % self.stride))
        patches = stem.shape[2] * stem.shape[3] // self.stride**2
        if patches > MAX_PATCHES:
            raise TooLarge(f"{patches} patches of {self.spec.patch} px; the limit is {MAX_PATCHES}")
        tokens = self.trans_patch_conv(stem).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = before(self.cls_token, tokens)
        return self.conv_1(stem)[0], self.trans_1(tokens)

    def _vector(self, feature: Tensor) -> Tensor:
        if feature.ndim == 4:
            return feature.mean((2, 3))
        normed: Tensor = self.trans_norm(feature)
        return normed.mean(dim=1) if self.cls_token is None else normed[:, 0]

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has keys for it and no rule."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.Conformer = mmcls.Conformer -------------------------------------------------------


class ConformerConfig(OpenMMLabConfig):
    """`mmpretrain.Conformer`, which is also `mmcls.Conformer`."""

    NETWORK: ClassVar[str] = "Conformer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    patch_size: Annotated[int, Field(strict=True, ge=16, le=64, multiple_of=16)] = 16
    base_channels: Annotated[int, Field(strict=True, ge=4, le=512)] = 64
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = True
    with_cls_token: bool = Field(
        True, description="False returns the mean of the tokens where true returns the class token."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_eval: bool = Field(True, description="The library reads it nowhere; changes nothing.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        0, description="The library reads it nowhere; nothing is frozen."
    )
    out_indices: Indices = Field(
        (-1,),
        description="Blocks from 2 to the depth; smaller ones give nothing, as in the library. Each returns two "
        "vectors: the mean of the map, and the class token.",
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch, channels = self.plan(), self.spec().channels
        if arch.embed_dims % arch.num_heads:
            yield "arch/num_heads", f"{arch.num_heads} heads do not divide {arch.embed_dims} embed_dims"
        if not EXPANSION <= channels <= 4096:
            yield "arch/channel_ratio", f"{channels} channels at first; {EXPANSION} to 4096 are served"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def spec(self) -> ConformerSpec:
        """The neutral spelling."""
        arch = self.plan()
        return ConformerSpec(
            arch.embed_dims,
            arch.depths,
            arch.num_heads,
            hidden=int(arch.embed_dims * self.mlp_ratio),
            channels=int(self.base_channels * arch.channel_ratio),
            patch=self.patch_size,
            qkv_bias=self.qkv_bias,
            with_cls_token=self.with_cls_token,
        )

    def freeze(self) -> Freeze:
        """Nothing is frozen."""
        return Freeze()

    def selected(self, description: Description) -> tuple[Level, ...]:  # noqa: ARG002 - the config knows
        """Two levels an index: `12`, and `12.cls` or, without a class token, `12.avg`."""
        blocks = self.spec().blocks()
        asked = [self._block(position) for position in range(len(self.out_indices))]
        within = [block for block in asked if block in blocks]
        if not within or len(set(within)) < len(within):
            detail = (
                f"give different ones of {blocks[0]} to {blocks[-1]}"
                if blocks
                else "this depth has no blocks"
            )
            raise InvalidConfig("#/backbone/out_indices", detail)
        suffix = "cls" if self.with_cls_token else "avg"
        return tuple(
            level
            for block in sorted(within)
            for level in (
                Level(block, str(block), f"{block}.conv"),
                Level(block, f"{block}.{suffix}", f"{block}.trans"),
            )
        )

    def _block(self, position: int) -> int:
        index, depths = self.out_indices[position], self.plan().depths
        block = index if index >= 0 else depths + index + 1
        if block < 0 or block > depths:
            detail = f"{index} is not a block of {FIRST_BLOCK} to {depths}"
            raise InvalidConfig(f"#/backbone/out_indices/{position}", detail)
        return block


CONFORMER = make_family(
    ConformerConfig, Conformer, example={"arch": "tiny", "out_indices": [12]}, architectures=tuple(ARCHS)
)
