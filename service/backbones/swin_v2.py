"""SwinTransformerV2 (Liu et al., arXiv:2111.09883) with mmpretrain's key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import DropRate, Indices, InputChannels
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import Computed, OpenMMLabConfig, Scale, deepest, make_family, named_arch
from service.backbones.output_norms import asked_stages, may_lack_output_norms
from service.backbones.swin import (
    MERGING,
    Depths,
    FeedForward,
    HeadCounts,
    NothingConfig,
    PatchEmbed,
    Pixels,
    ShiftedWindows,
    SwinSpec,
    SwinTransformer,
    Width,
    absolute_positions,
    both,
    fours,
    patch_grid,
    relative_position_index,
    stage_faults,
)
from service.checkpoints.layouts import KeyLayout, Naming, Regrouping, below, rules
from service.config.spec import FeatureInfo, PreprocessDefaults

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

HIDDEN_WIDTH = 512  # of the network that gives the biases
LARGEST_LOGIT = math.log(100.0)


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Width
    depths: Depths
    num_heads: HeadCounts
    extra_norm_every_n_blocks: Annotated[int, Field(strict=True, ge=0, le=64)]


def _arch(width: int, depths: Sequence[int], heads: Sequence[int], extra: int = 0) -> ArchConfig:
    return ArchConfig(
        embed_dims=width, depths=tuple(depths), num_heads=tuple(heads), extra_norm_every_n_blocks=extra
    )


ARCHS: dict[str, ArchConfig] = {
    name: arch
    for names, arch in (
        (("t", "tiny"), _arch(96, (2, 2, 6, 2), (3, 6, 12, 24))),
        (("s", "small"), _arch(96, (2, 2, 18, 2), (3, 6, 12, 24))),
        (("b", "base"), _arch(128, (2, 2, 18, 2), (4, 8, 16, 32))),
        (("l", "large"), _arch(192, (2, 2, 18, 2), (6, 12, 24, 48))),
        (("h", "huge"), _arch(352, (2, 2, 18, 2), (8, 16, 32, 64), 6)),
        (("g", "giant"), _arch(512, (2, 2, 42, 4), (16, 32, 64, 128), 6)),
    )
    for name in names
}


@dataclass(frozen=True)
class SwinV2Spec:
    """What decides the numbers and the names of the weights.

    `swin` is what the first version has too, but for its window: each stage has one in `windows`. `pretrained` are the
    windows that the biases were learnt for, 0 for the stage's own. Every `extra_norm`-th block ends in a norm.
    """

    swin: SwinSpec
    windows: tuple[int, ...]
    pretrained: tuple[int, ...]
    extra_norm: int = 0

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.swin.in_channels

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        return self.swin.features()

    def of_stage(self, stage: int) -> SwinSpec:
        """The first version's spec with the window of a stage."""
        return replace(self.swin, window=self.windows[stage])


def relative_coords_table(window: int, pretrained: int) -> Tensor:
    """[1, 2 window - 1, same, 2]: distances in a window on the logarithmic scale on which biases are learnt."""
    reach = (pretrained or window) - 1
    steps = torch.arange(1 - window, window, dtype=torch.float32) / reach * 8
    steps = steps.sign() * (steps.abs() + 1).log2() / math.log2(8)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)[None]


class WindowAttention(Scale, Computed):
    """Attention by cosine with biases from a network of distances; keys `logit_scale`, `cpb_mlp`, `qkv`, `proj`, …"""

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, window: int, pretrained: int, width: int, heads: int) -> None:
        super().__init__()
        self.window, self.pretrained, self.heads = window, pretrained, heads
        self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        side, area = 2 * window - 1, window**2
        self.register_buffer("relative_coords_table", torch.empty(1, side, side, 2), persistent=False)
        index = torch.empty(area, area, dtype=torch.long)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, heads, bias=False)
        )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """Cosines are multiplied by 10 at first."""
        nn.init.constant_(self.logit_scale, math.log(10.0))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def compute(self) -> None:
        """The distances and where they are in their table, which follow from the size of the window."""
        self.relative_coords_table.copy_(relative_coords_table(self.window, self.pretrained))
        self.relative_position_index.copy_(relative_position_index(self.window))

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """[n * windows, window², c] to the same shape."""
        count, length, width = windows.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(windows, self.qkv.weight, bias).reshape(count, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query = F.normalize(query, dim=-1) * self.logit_scale.clamp(max=LARGEST_LOGIT).exp()
        biases = self._biases()
        if mask is not None:
            biases = (biases + mask).repeat(count // mask.shape[0], 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            query, F.normalize(key, dim=-1), value, attn_mask=biases.to(query.dtype), scale=1.0
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, length, width))
        return projected

    def _biases(self) -> Tensor:
        """[1, heads, window², window²]."""
        distances = self.relative_coords_table.to(self.logit_scale.dtype)
        table: Tensor = self.cpb_mlp(distances).reshape(-1, self.heads)
        return 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1)[None])


class ShiftedWindowsV2(ShiftedWindows):
    """Attention in windows of a map, which every second block shifts by half a window; key `w_msa`."""

    def __init__(self, spec: SwinV2Spec, stage: int, *, shifted: bool) -> None:
        nn.Module.__init__(self)
        swin = self.spec = spec.of_stage(stage)
        self.shift = swin.window // 2 if shifted else 0
        sizes = swin.widths()[stage], swin.heads[stage]
        self.add_module("w_msa", WindowAttention(swin.window, spec.pretrained[stage], *sizes))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm behind it and a residual; keys `norm1`, `norm2`, `norm3`."""

    def __init__(self, spec: SwinV2Spec, stage: int, index: int) -> None:
        super().__init__()
        width = spec.swin.widths()[stage]
        self.attn = ShiftedWindowsV2(spec, stage, shifted=bool(index % 2))
        self.norm1 = nn.LayerNorm(width)
        self.ffn = FeedForward(spec.swin, width)
        self.norm2 = nn.LayerNorm(width)
        ends_in_norm = spec.extra_norm and (index + 1) % spec.extra_norm == 0
        self.norm3 = nn.LayerNorm(width) if ends_in_norm else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self.norm1(self.attn(maps))
        mixed: Tensor = self.norm3(maps + self.norm2(self.ffn(maps)))
        return mixed


class PatchMerging(nn.Module):
    """Four neighbours become one position of twice the width; keys `reduction`, `norm`.

    The channels of the four lie channel by channel, not neighbour by neighbour as in the official code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, ceil(h / 2), ceil(w / 2), 2c]."""
        merged: Tensor = self.norm(self.reduction(fours(maps)))
        return merged


class Stage(nn.Module):
    """The merging of patches that begins every stage but the first, then blocks; keys `downsample`, `blocks`."""

    def __init__(self, spec: SwinV2Spec, stage: int) -> None:
        super().__init__()
        self.downsample = PatchMerging(spec.swin.widths()[stage - 1]) if stage else None
        self.blocks = nn.ModuleList(Block(spec, stage, index) for index in range(spec.swin.depths[stage]))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the map of the stage."""
        if self.downsample is not None:
            maps = self.downsample(maps)
        for block in self.blocks:
            maps = block(maps)
        return maps


class SwinTransformerV2(SwinTransformer):
    """A SwinTransformerV2 whose state dict has mmpretrain's keys; frozen by the rule of the first version."""

    def __init__(self, spec: SwinV2Spec) -> None:
        nn.Module.__init__(self)
        self.spec = spec.swin
        self.features = spec.features()
        self.absolute_pos_embed = absolute_positions(spec.swin)
        self.patch_embed = PatchEmbed(spec.swin)
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in range(len(spec.swin.depths)))
        for stage in spec.swin.outputs:
            norm = nn.LayerNorm(self.features[stage].channels, eps=spec.swin.eps)
            self.add_module(f"norm{stage}", norm)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.placed(self.patch_embed(images)), {}
        for stage in range(deepest(nodes) + 1):
            maps = self.stages[stage](maps)
            if str(stage) in nodes:
                # The blocks work on NHWC; the wire promises NCHW.
                found[str(stage)] = getattr(self, f"norm{stage}")(maps).permute(0, 3, 1, 2).contiguous()
        return {node: found[node] for node in nodes}


# --- mmpretrain.SwinTransformerV2 = mmcls.SwinTransformerV2 ---------------------------------------

Windows = Annotated[tuple[Annotated[int, Field(strict=True, ge=2, le=32)], ...], Field(max_length=8)]
Pretrained = Annotated[int, Field(strict=True, ge=0, le=64)]


class SwinTransformerV2Config(OpenMMLabConfig):
    """`mmpretrain.SwinTransformerV2`, which is also `mmcls.SwinTransformerV2`."""

    NETWORK: ClassVar[str] = "SwinTransformerV2"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        256, description="Image size that images are brought to by default; any other is taken."
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    in_channels: InputChannels = 3
    window_size: Annotated[int, Field(strict=True, ge=2, le=32)] | Windows = Field(
        8, description="Of all stages, or one a stage."
    )
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4; each has a norm of its own.")
    use_abs_pos_embed: bool = Field(
        False,
        description="Learns a position for each patch of an image of img_size; others are interpolated.",
    )
    interpolate_mode: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="How absolute positions are brought to images of another size."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=7)] = Field(
        -1, description="-1 nothing, k the patch embedding and stages 0 to k with their output norms."
    )
    pad_small_map: bool = Field(False, description="Pads maps that are smaller than a window.")
    norm_cfg: LayerNormConfig = Field(LayerNormConfig(type="LN"), description="Of the output norms.")
    stage_cfgs: NothingConfig = NothingConfig()
    patch_cfg: NothingConfig = NothingConfig()
    pretrained_window_sizes: Annotated[tuple[Pretrained, ...], Field(max_length=8)] = Field(
        (0, 0, 0, 0),
        description="Windows that the biases were learnt for, one a stage; 0 is the stage's own.",
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch = self.plan()
        stages = len(arch.depths)
        if len(self.windows()) != stages:
            yield "window_size", f"{len(self.windows())} entries for {stages} stages"
        if len(self.pretrained_window_sizes) < stages:
            yield (
                "pretrained_window_sizes",
                f"{len(self.pretrained_window_sizes)} entries for {stages} stages",
            )
        if 1 in self.pretrained_window_sizes:
            yield "pretrained_window_sizes", "a window of 1 has no distances"
        yield from stage_faults(self.spec().swin, "arch/num_heads")
        if self.frozen_stages >= stages:
            yield "frozen_stages", f"{self.frozen_stages} is not a stage of 0 to {stages - 1}"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def windows(self) -> tuple[int, ...]:
        """The window of each stage."""
        given = self.window_size
        return (given,) * len(self.plan().depths) if isinstance(given, int) else given

    def spec(self) -> SwinV2Spec:
        """The neutral spelling."""
        arch = self.plan()
        swin = SwinSpec(
            arch.embed_dims,
            arch.depths,
            arch.num_heads,
            outputs=(),
            rule="mmpretrain",
            pads_small=self.pad_small_map,
            in_channels=self.in_channels,
            patch=self.patch_size,
            eps=self.norm_cfg.eps,
            grid=patch_grid(self.img_size, self.patch_size) if self.use_abs_pos_embed else None,
            interpolation=self.interpolate_mode if self.use_abs_pos_embed else "bicubic",
        )
        strides = [feature.stride or 0 for feature in swin.features()]
        swin = replace(swin, outputs=asked_stages(self.out_indices, self.strides, strides))
        extra = arch.extra_norm_every_n_blocks
        return SwinV2Spec(swin, self.windows(), self.pretrained_window_sizes, extra)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=both(self.img_size))


def _optional(config: SwinTransformerV2Config, state: StateDict) -> Callable[[str], bool]:
    return may_lack_output_norms(state, last=len(config.plan().depths) - 1)


_BLOCK = {
    "attn.w_msa.{rest}": "attn.{rest}",
    "ffn.layers.0.0.{leaf}": "mlp.fc1.{leaf}",
    "ffn.layers.1.{leaf}": "mlp.fc2.{leaf}",
    "norm{k}.{leaf}": "norm{k}.{leaf}",
}


def _layout(library: str, downsample: str) -> KeyLayout:
    """timm has a stage's merging of patches before its blocks as we have, the official code behind."""
    mine = "stages.{s}.downsample."
    names = {
        "patch_embed.projection.{leaf}": "patch_embed.proj.{leaf}",
        "patch_embed.norm.{leaf}": "patch_embed.norm.{leaf}",
        "absolute_pos_embed": "absolute_pos_embed",
        **below("stages.{s}.blocks.{b}.", "layers.{s}.blocks.{b}.", _BLOCK),
        # It norms what it has made, so that only its matrix knows the order of the neighbours.
        mine + "norm.{leaf}": downsample + "norm.{leaf}",
        "norm3.{leaf}": "norm.{leaf}",
    }
    merging = rules({mine + "reduction.{leaf}": downsample + "reduction.{leaf}"}, MERGING)
    return KeyLayout(library, (*rules(names), *merging))


_TORCHVISION_BLOCK = {
    **{f"attn.w_msa.{name}": f"attn.{name}" for name in ("logit_scale", "qkv.weight", "cpb_mlp.{i}.{leaf}")},
    "attn.w_msa.proj.{leaf}": "attn.proj.{leaf}",
    "ffn.layers.0.0.{leaf}": "mlp.0.{leaf}",
    "ffn.layers.1.{leaf}": "mlp.3.{leaf}",
    "norm{k}.{leaf}": "norm{k}.{leaf}",
}


def _torchvision() -> KeyLayout:
    """Stages and mergings take turns; the keys have a bias, which torchvision sets to 0 whenever it computes."""
    names = {
        "patch_embed.projection.{leaf}": "features.0.0.{leaf}",
        "patch_embed.norm.{leaf}": "features.0.2.{leaf}",
        "norm3.{leaf}": "norm.{leaf}",
    }
    mergings, biases = {}, []
    for stage in range(4):
        mine, theirs = f"stages.{stage}.blocks.{{b}}.", f"features.{2 * stage + 1}.{{b}}."
        names |= below(mine, theirs, _TORCHVISION_BLOCK)
        parts = (f"{mine}attn.w_msa.q_bias", None, f"{mine}attn.w_msa.v_bias")
        biases.append(Regrouping(parts, (f"{theirs}attn.qkv.bias",), (1, 1, 1)))
        names[f"stages.{stage}.downsample.norm.{{leaf}}"] = f"features.{2 * stage}.norm.{{leaf}}"
        mergings[f"stages.{stage}.downsample.reduction.{{leaf}}"] = f"features.{2 * stage}.reduction.{{leaf}}"
    return KeyLayout("torchvision", (*rules(names), *rules(mergings, MERGING)), regroupings=tuple(biases))


SWIN_V2_NAMES = Naming(
    "SwinTransformerV2",
    own=("mmpretrain",),
    marks=(
        "patch_embed.projection.weight",
        "stages.0.blocks.0.attn.w_msa.logit_scale",
        "stages.0.blocks.0.attn.w_msa.cpb_mlp.0.weight",
        "stages.1.downsample.reduction.weight",
    ),
    layouts=(
        _layout("timm", "layers.{s}.downsample."),
        _layout("official", "layers.{s-1}.downsample."),
        _torchvision(),
    ),
)


SWIN_TRANSFORMER_V2 = make_family(
    SwinTransformerV2Config,
    SwinTransformerV2,
    example={"arch": "tiny", "img_size": 256, "window_size": 8, "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    optional=_optional,
    naming=SWIN_V2_NAMES,
)
