"""MixMIMTransformer (Liu et al., arXiv:2205.13137) with mmpretrain's key names: its output is one vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import ActivationSpec, Scale, SpecConfig, make_family, named_arch
from service.backbones.swin import SwinSpec, WindowAttention, cut_windows, fours, join_windows
from service.backbones.transformer_layers import FeedForward
from service.backbones.vision_transformer import MAX_PATCHES, Pixels
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

GELU = ActivationSpec("gelu")
# width of the first stage, blocks and heads of the stages
Plan = tuple[int, tuple[int, ...], tuple[int, ...]]
DEPTHS = (2, 2, 18, 2)
ARCHS: dict[str, Plan] = {
    name: plan
    for names, plan in (
        (("b", "base"), (128, DEPTHS, (4, 8, 16, 32))),
        (("l", "large"), (192, DEPTHS, (6, 12, 24, 48))),
        (("h", "huge"), (352, DEPTHS, (11, 22, 44, 88))),
    )
    for name in names
}


@dataclass(frozen=True)
class MixMIMSpec:
    """What decides the numbers and the names of the weights; `grid` is (rows, columns) of an image's patches.

    `image` [height, width] is the only size that images may have. `windows` are as given, one a stage.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    image: tuple[int, int]
    patch: tuple[int, int]
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    eps: float = 1e-5
    in_channels: int = 3

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    def grid(self, stage: int) -> tuple[int, int]:
        """(rows, columns) of the map of a stage."""
        rows, columns = (math.ceil(side / patch) for side, patch in zip(self.image, self.patch, strict=True))
        return rows // 2**stage, columns // 2**stage

    def window(self, stage: int) -> int:
        """The side of a stage's windows: that of a map which is not larger."""
        return min(self.windows[stage], *self.grid(stage))

    def features(self) -> tuple[FeatureInfo, ...]:
        """The mean of the last tokens."""
        return (FeatureInfo(0, "0", self.widths()[-1], None, "NC"),)


class PatchEmbed(nn.Module):
    """Patches projected and normed; pads right and bottom to whole patches. Keys `projection`, `norm`."""

    def __init__(self, spec: MixMIMSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.projection = nn.Conv2d(spec.in_channels, spec.width, spec.patch, stride=spec.patch)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows, columns, width]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        normed: Tensor = self.norm(self.projection(padded).permute(0, 2, 3, 1))
        return normed


def _attention(spec: MixMIMSpec, stage: int) -> WindowAttention:
    like = SwinSpec(
        spec.width,
        spec.depths,
        spec.heads,
        outputs=(),
        rule="mmpretrain",
        pads_small=False,
        window=spec.window(stage),
        qkv_bias=spec.qkv_bias,
    )
    return WindowAttention(like, spec.widths()[stage], spec.heads[stage])


class Block(nn.Module):
    """Swin's without shifting; keys `ln1`, `attn`, `ln2`, `ffn`."""

    def __init__(self, spec: MixMIMSpec, stage: int) -> None:
        super().__init__()
        width, self.window = spec.widths()[stage], spec.window(stage)
        self.ln1 = nn.LayerNorm(width, eps=spec.eps)
        self.attn = _attention(spec, stage)
        self.ln2 = nn.LayerNorm(width, eps=spec.eps)
        self.ffn = FeedForward(width, int(spec.mlp_ratio * width), GELU)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        windows = self.attn(cut_windows(self.ln1(maps), self.window), None)
        maps = maps + join_windows(windows, self.window, maps.shape[1], maps.shape[2])
        mixed: Tensor = maps + self.ffn(self.ln2(maps))
        return mixed


class PatchMerging(nn.Module):
    """Four neighbours become one position of twice the width, as in Swin; keys `norm`, `reduction`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, h / 2, w / 2, 2c]."""
        merged: Tensor = self.reduction(self.norm(fours(maps)))
        return merged


class Stage(nn.Module):
    """Blocks, then the merging of patches, but for the last stage; keys `blocks`, `downsample`."""

    def __init__(self, spec: MixMIMSpec, stage: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(spec, stage) for _ in range(spec.depths[stage])))
        last = stage == len(spec.depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(spec.widths()[stage], spec.eps)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, h / 2, w / 2, 2c]; the last stage to the same shape."""
        merged: Tensor = self.downsample(self.blocks(maps))
        return merged


class MixMIMTransformer(Backbone, Scale):
    """Keys `absolute_pos_embed`, `patch_embed`, `layers`, `norm`."""

    def __init__(self, spec: MixMIMSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        rows, columns = spec.grid(0)
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, rows * columns, spec.width))
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.Sequential(*(Stage(spec, stage) for stage in range(len(spec.depths))))
        self.norm = nn.LayerNorm(spec.widths()[-1], eps=spec.eps)

    def start(self) -> None:
        """No positions at first."""
        nn.init.zeros_(self.absolute_pos_embed)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The mean of the last tokens, [n, c].

        Raises:
            ValueError: images of another number of patches than the one whose positions are learnt.
        """
        maps, grid = self.patch_embed(images), self.spec.grid(0)
        if tuple(maps.shape[1:3]) != grid:
            raise ValueError(f"images must have {grid[0]}x{grid[1]} patches")
        maps = maps + self.absolute_pos_embed.reshape(1, *grid, -1)
        vector = self.norm(self.layers(maps)).mean(dim=(1, 2))
        return dict.fromkeys(nodes, vector)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """There is no `frozen_stages`; the positions never learn, and `norm_cfg` reaches all norms but the patches'."""
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)]
        reached = [name for name in norms if name != "patch_embed.norm"] if freeze.all_norms else []
        return freeze_report(self, replace(freeze, all_norms=False), reached, norms_follow=False)


# --- mmpretrain.MixMIMTransformer = mmcls.MixMIMTransformer ---------------------------------------

MAX_STAGES = 6
Stages = Field(min_length=1, max_length=MAX_STAGES)
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Heads = Annotated[int, Field(strict=True, ge=1, le=1024)]
PatchSide = Annotated[int, Field(strict=True, ge=1, le=64)]
Window = Annotated[int, Field(strict=True, ge=1, le=64)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=1024)]
    depths: Annotated[tuple[Count, ...], Stages]
    num_heads: Annotated[tuple[Heads, ...], Stages]

    def plan(self) -> Plan:
        """The neutral spelling."""
        return self.embed_dims, self.depths, self.num_heads


class NothingConfig(BaseModel):
    """A key of which only the empty object is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixMIMConfig(SpecConfig):
    """`mmpretrain.MixMIMTransformer`, which is also `mmcls.MixMIMTransformer`: images of `img_size` only."""

    NETWORK: ClassVar[str] = "MixMIMTransformer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    img_size: Pixels | tuple[Pixels, Pixels] = Field(224, description="The only size that images may have.")
    patch_size: PatchSide | tuple[PatchSide, PatchSide] = 4
    in_channels: InputChannels = 3
    window_size: Annotated[tuple[Window, ...], Stages] = Field(
        (14, 14, 14, 7), description="One a stage; a smaller map is one window."
    )
    qkv_bias: bool = True
    patch_cfg: NothingConfig = NothingConfig()
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    use_checkpoint: bool = Field(False, description="Saves memory in training; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        _, depths, heads = self.plan()
        for key, given in (("arch/num_heads", heads), ("window_size", self.window_size)):
            if len(given) < len(depths):
                yield key, f"has {len(given)} entries for {len(depths)} stages"
                return
        spec = self.spec()
        for width, count in zip(spec.widths(), heads, strict=False):
            if width % count:
                yield "arch/num_heads", f"{count} heads do not divide {width} channels"
        yield from size_faults(spec)

    def plan(self) -> Plan:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()

    def spec(self) -> MixMIMSpec:
        """The neutral spelling."""
        patch, (width, depths, heads) = self.patch_size, self.plan()
        return MixMIMSpec(
            width,
            depths,
            heads[: len(depths)],
            windows=self.window_size[: len(depths)],
            image=self.image_size(),
            patch=patch if isinstance(patch, tuple) else (patch, patch),
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            eps=self.norm_cfg.eps,
            in_channels=self.in_channels,
        )

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`, and the positions."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad, constant=("absolute_pos_embed",))

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The one vector."""
        return tuple(Level(info.index, str(info.index), info.node) for info in description.features)


def size_faults(spec: MixMIMSpec) -> Iterator[tuple[str, str]]:
    """Maps that are too large, that windows do not cover, or that cannot be halved, as (key, detail)."""
    rows, columns = spec.grid(0)
    if rows * columns > MAX_PATCHES:
        yield "img_size", f"{rows * columns} patches; the limit is {MAX_PATCHES}"
    for stage in range(len(spec.depths)):
        rows, columns = spec.grid(stage)
        if not rows * columns or rows % spec.window(stage) or columns % spec.window(stage):
            detail = f"stage {stage} has {rows}x{columns} positions"
            yield "img_size", f"{detail}, which are no windows of {spec.windows[stage]}"
            return
        if stage < len(spec.depths) - 1 and (rows % 2 or columns % 2):
            yield "img_size", f"stage {stage} has {rows}x{columns} positions, which cannot be halved"


MIXMIM = make_family(MixMIMConfig, MixMIMTransformer, example={"arch": "base"}, architectures=tuple(ARCHS))
