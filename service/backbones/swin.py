"""SwinTransformer (Liu et al., arXiv:2103.14030) with OpenMMLab's key names: mmpretrain's and mmdet's.

The two differ in small maps (mmdet pads and shifts always), in what `frozen_stages` counts, and in that mmdet
reads checkpoints of the official code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import (
    Backbone,
    CheckpointName,
    DropRate,
    Indices,
    InputChannels,
    Stride,
    levels_by_stride,
)
from service.backbones.freezing import freeze_report, in_module_order, is_under
from service.backbones.mobilenet_v2 import weights_or_pretrained
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Computed,
    OneForAll,
    OpenMMLabConfig,
    Scale,
    deepest,
    make_activation,
    make_family,
    named_arch,
)
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.backbones.position_tables import fit_tables, resize_bicubic, resize_progression
from service.backbones.vision_transformer import Interpolation, resize_pos_embed
from service.checkpoints.layouts import Change, KeyLayout, KeyRule, Naming, rules
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# width of the first stage, blocks and heads of the stages
ARCHS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    name: arch
    for names, arch in (
        (("t", "tiny"), (96, (2, 2, 6, 2), (3, 6, 12, 24))),
        (("s", "small"), (96, (2, 2, 18, 2), (3, 6, 12, 24))),
        (("b", "base"), (128, (2, 2, 18, 2), (4, 8, 16, 32))),
        (("l", "large"), (192, (2, 2, 18, 2), (6, 12, 24, 48))),
    )
    for name in names
}
Rule = Literal["mmpretrain", "mmdet"]
HIDDEN = -100.0  # added to the attention between parts of a window that are no neighbours


@dataclass(frozen=True)
class SwinSpec:
    """What decides the numbers and the names of the weights.

    `outputs` are the stages with an output norm. `pads_small` is whether maps not larger than a window are padded
    and shifted like all others. `after_merge` outputs come after the merging of patches that ends a stage.
    `eps` is that of the output norms, `inner_eps` that of all others. `grid` are the rows and columns of patches
    that absolute positions are learnt for; None is without them.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    outputs: tuple[int, ...]
    rule: Rule
    pads_small: bool
    in_channels: int = 3
    patch: int = 4
    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    patch_norm: bool = True
    eps: float = 1e-5
    inner_eps: float = 1e-5
    activation: ActivationSpec = ActivationSpec("gelu")  # noqa: RUF009 - frozen
    after_merge: bool = False
    grid: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"

    def widths(self) -> tuple[int, ...]:
        """Channels inside the stages."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    def merges(self, stage: int) -> bool:
        """Whether a stage ends in a merging of patches."""
        return stage < len(self.depths) - 1

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        found = []
        for stage, width in enumerate(self.widths()):
            factor = 2 if self.after_merge and self.merges(stage) else 1
            stride = self.patch * 2**stage * factor
            found.append(FeatureInfo(stage, str(stage), width * factor, stride, "NCHW"))
        return tuple(found)


def relative_position_index(window: int) -> Tensor:
    """[window², window²]: where in the table of biases that of two positions of a window is."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, shift: int, *, like: Tensor) -> Tensor:
    """[windows, 1, window², window²]: what is added where a shifted window holds parts from opposite edges."""
    down, right = (_parts(side, window, shift, like.device) for side in (height, width))
    windows = cut_windows((3 * down[:, None] + right)[None, :, :, None], window).squeeze(-1)
    differs = windows[:, :, None] != windows[:, None, :]
    return differs.to(like.dtype).mul(HIDDEN)[:, None]


def _parts(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """[side]: 0, and 1 in the last window, and 2 for what is shifted into it from the opposite edge."""
    places = torch.arange(side, device=device)
    return (places >= side - window).int() + (places >= side - shift).int()


def cut_windows(maps: Tensor, window: int) -> Tensor:
    """[n, h, w, c] to [n * windows, window², c]."""
    n, height, width, channels = maps.shape
    cut = maps.reshape(n, height // window, window, width // window, window, channels)
    return cut.transpose(2, 3).reshape(-1, window * window, channels)


def join_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """[n * windows, window², c] back to [n, h, w, c]."""
    cut = windows.reshape(-1, height // window, width // window, window, window, windows.shape[2])
    return cut.transpose(2, 3).reshape(-1, height, width, windows.shape[2])


def attend_in_windows(maps: Tensor, window: int, shift: int, attention: nn.Module) -> Tensor:
    """Attention in windows of a map, [n, h, w, c] to the same shape; pads right and bottom to whole windows.

    Args:
        maps: the map.
        window: the side of a window.
        shift: how far the windows are moved right and down, or 0; then nothing is hidden from anything.
        attention: takes [n * windows, window², c] and what is added to hide positions from each other, or None.
    """
    height, width = maps.shape[1:3]
    padded = F.pad(maps, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = padded.shape[1:3]
    if isinstance(shift, int) and shift == 0:
        plain: Tensor = join_windows(attention(cut_windows(padded, window), None), window, rows, columns)
        return plain[:, :height, :width]
    mask = shift_mask(rows, columns, window, shift, like=maps)
    rolled = padded.roll((-shift, -shift), (1, 2))
    mixed = join_windows(attention(cut_windows(rolled, window), mask), window, rows, columns)
    return mixed.roll((shift, shift), (1, 2))[:, :height, :width]


class WindowAttention(Scale, Computed):
    """Self-attention in a window with learnt biases of relative position; keys `relative_position_bias_table`, …."""

    relative_position_index: Tensor

    def __init__(self, spec: SwinSpec, width: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads, self.scale = spec.window, heads, spec.scale
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * spec.window - 1) ** 2, heads))
        index = torch.empty(spec.window**2, spec.window**2, dtype=torch.long)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """Small biases at first."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def compute(self) -> None:
        """The index, which follows from the size of the window."""
        self.relative_position_index.copy_(relative_position_index(self.window))

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """[n * windows, window², c] to the same shape."""
        count, length, width = windows.shape
        qkv = self.qkv(windows).reshape(count, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask).repeat(count // mask.shape[0], 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype), scale=self.scale
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, length, width))
        return projected


class ShiftedWindows(nn.Module):
    """Attention in windows of a map, which every second block shifts by half a window; key `w_msa`."""

    def __init__(self, spec: SwinSpec, width: int, heads: int, *, shifted: bool) -> None:
        super().__init__()
        self.spec = spec
        self.shift = spec.window // 2 if shifted else 0
        self.w_msa = WindowAttention(spec, width, heads)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        height, width = maps.shape[1:3]
        self._refuse_small(min(height, width))
        return attend_in_windows(maps, self.spec.window, self._shift(height, width), self.w_msa)

    def _shift(self, height: int, width: int) -> int:
        """The shift for a map of a size; the official code does not shift a single window."""
        window = self.spec.window
        if self.shift == 0 or self.spec.pads_small:
            return self.shift
        # Reckoned instead of chosen, so that a traced network still shifts where the map is larger.
        return self.shift * ((height > window) & (width > window))

    def _refuse_small(self, side: int) -> None:
        if side < self.spec.window and not self.spec.pads_small:
            detail = (
                f"a map of {side} is smaller than the window of {self.spec.window}; "
                "send larger images or set pad_small_map"
            )
            raise InvalidConfig("#/backbone/pad_small_map", detail)


class FeedForward(nn.Module):
    """Two linear layers; keys `layers.0.0`, `layers.1`."""

    def __init__(self, spec: SwinSpec, width: int) -> None:
        super().__init__()
        hidden = int(width * spec.mlp_ratio)
        first = nn.Sequential(nn.Linear(width, hidden), make_activation(spec.activation))
        self.layers = nn.Sequential(first, nn.Linear(hidden, width))

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.layers(maps)
        return projected


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, spec: SwinSpec, stage: int, *, shifted: bool) -> None:
        super().__init__()
        width = spec.widths()[stage]
        self.norm1 = nn.LayerNorm(width, eps=spec.inner_eps)
        self.attn = ShiftedWindows(spec, width, spec.heads[stage], shifted=shifted)
        self.norm2 = nn.LayerNorm(width, eps=spec.inner_eps)
        self.ffn = FeedForward(spec, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self.attn(self.norm1(maps))
        mixed: Tensor = maps + self.ffn(self.norm2(maps))
        return mixed


def fours(maps: Tensor) -> Tensor:
    """Every 2x2 patches side by side: [n, h, w, c] to [n, ceil(h / 2), ceil(w / 2), 4c], zeros past the border.

    The channels of the four lie channel by channel, as `nn.Unfold` puts them.
    """
    padded = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
    n, height, width, channels = padded.shape
    cut = padded.reshape(n, height // 2, 2, width // 2, 2, channels)
    return cut.permute(0, 1, 3, 5, 2, 4).flatten(3)


class PatchMerging(nn.Module):
    """Four neighbours become one position of twice the width; keys `norm`, `reduction`.

    The channels of the four lie channel by channel, not neighbour by neighbour as in the official code.
    """

    def __init__(self, spec: SwinSpec, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=spec.inner_eps) if spec.patch_norm else nn.Identity()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, ceil(h / 2), ceil(w / 2), 2c]."""
        merged: Tensor = self.reduction(self.norm(fours(maps)))
        return merged


class Stage(nn.Module):
    """Blocks, then the merging of patches; keys `blocks`, `downsample`."""

    def __init__(self, blocks: Iterable[nn.Module], merging: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merging

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[n, h, w, c] to the map before and after the merging."""
        for block in self.blocks:
            maps = block(maps)
        return maps, maps if self.downsample is None else self.downsample(maps)


def make_stage(spec: SwinSpec, stage: int) -> Stage:
    """A stage with OpenMMLab's blocks, of which every second one is shifted."""
    blocks = (Block(spec, stage, shifted=bool(index % 2)) for index in range(spec.depths[stage]))
    return Stage(blocks, PatchMerging(spec, spec.widths()[stage]) if spec.merges(stage) else None)


class PatchEmbed(nn.Module):
    """Patches projected and normed; pads right and bottom to whole patches. Keys `projection`, `norm`."""

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.projection = nn.Conv2d(spec.in_channels, spec.width, spec.patch, stride=spec.patch)
        self.norm = nn.LayerNorm(spec.width, eps=spec.inner_eps) if spec.patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows, columns, width]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        normed: Tensor = self.norm(self.projection(padded).permute(0, 2, 3, 1))
        return normed


def absolute_positions(spec: SwinSpec) -> nn.Parameter | None:
    """[1, patches, width], not filled; None where the network has none."""
    return None if spec.grid is None else nn.Parameter(torch.empty(1, math.prod(spec.grid), spec.width))


class SwinTransformer(Backbone, Scale):
    """A SwinTransformer whose state dict has OpenMMLab's keys."""

    absolute_pos_embed: nn.Parameter | None

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.absolute_pos_embed = absolute_positions(spec)
        self.patch_embed = PatchEmbed(spec)
        self.stages = nn.ModuleList(make_stage(spec, stage) for stage in range(len(spec.depths)))
        for stage in spec.outputs:
            self.add_module(f"norm{stage}", nn.LayerNorm(self.features[stage].channels, eps=spec.eps))

    def start(self) -> None:
        """Small positions at first."""
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def placed(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] with the absolute positions, which mmdet has for one size of images only."""
        if self.spec.grid is None or self.absolute_pos_embed is None:
            return maps
        grid = (maps.shape[1], maps.shape[2])
        if grid != self.spec.grid and self.spec.rule == "mmdet":
            rows, columns = (side * self.spec.patch for side in self.spec.grid)
            detail = f"absolute positions are made for images of {columns}x{rows} px; resize the images"
            raise InvalidConfig("#/backbone/pretrain_img_size", detail)
        positions = resize_pos_embed(
            self.absolute_pos_embed, self.spec.grid, grid, 0, self.spec.interpolation
        )
        return maps + positions.reshape(1, *grid, -1)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.placed(self.patch_embed(images)), {}
        for stage in range(deepest(nodes) + 1):
            before, maps = self.stages[stage](maps)
            if str(stage) in nodes:
                output = getattr(self, f"norm{stage}")(maps if self.spec.after_merge else before)
                # The blocks work on NHWC; the wire promises NCHW.
                found[str(stage)] = output.permute(0, 3, 1, 2).contiguous()
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """0 is `patch_embed` in mmdet, and the first stage with it in mmpretrain; k adds stages and output norms.

        In mmpretrain the output norms stay in train mode.
        """
        # mmpretrain's `norm_cfg` is of the output norms only.
        configured = (
            [f"norm{stage}" for stage in self.spec.outputs] if self.spec.rule == "mmpretrain" else None
        )
        if freeze.stages is None:
            return freeze_report(self, freeze, (), configured=configured)
        stages = range(freeze.stages + (self.spec.rule == "mmpretrain"))
        names = ["patch_embed", *(f"stages.{stage}" for stage in stages)]
        norms = [f"norm{stage}" for stage in stages]
        if self.spec.rule == "mmdet":
            return freeze_report(self, freeze, ["absolute_pos_embed", *names, *norms])
        report = freeze_report(self, freeze, names, configured=configured)
        outputs = [name for name, _ in self.named_parameters() if is_under(name, norms)]
        return in_module_order(self, freeze, (*report.parameters, *outputs), report.norms)


# --- checkpoints of the official code -------------------------------------------------------------

RENAMED = (
    (re.compile(r"(^|\.)layers\.(\d+)\.(blocks|downsample)\."), r"\1stages.\2.\3."),
    (re.compile(r"(blocks\.\d+\.attn)\."), r"\1.w_msa."),
    (re.compile(r"(blocks\.\d+)\.mlp\.fc1\."), r"\1.ffn.layers.0.0."),
    (re.compile(r"(blocks\.\d+)\.mlp\.fc2\."), r"\1.ffn.layers.1."),
    (re.compile(r"(^|\.)patch_embed\.proj\."), r"\1patch_embed.projection."),
)
OFFICIAL = re.compile(r"(?:^|\.)layers\.0\.blocks\.0\.")
MERGED = re.compile(r"downsample\.(?:norm\.weight|norm\.bias|reduction\.weight)$")


def from_official(state: StateDict) -> StateDict:
    """The tensors of a file of the official code by OpenMMLab's names, its merging of patches reordered.

    A file that has OpenMMLab's names already is left as it is.
    """
    if not any(OFFICIAL.search(name) for name in state):
        return state
    return {_renamed(name): _reordered(name, tensor) for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _reordered(name: str, tensor: Tensor) -> Tensor:
    return _into_channels_outermost(tensor) if MERGED.search(name) else tensor


# --- mmpretrain.SwinTransformer = mmcls.SwinTransformer -------------------------------------------

Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Width = Annotated[int, Field(strict=True, ge=1, le=2048)]
Depth = Annotated[int, Field(strict=True, ge=1, le=64)]
Heads = Annotated[int, Field(strict=True, ge=1, le=128)]
Depths = Annotated[tuple[Depth, ...], Field(min_length=1, max_length=8)]
HeadCounts = Annotated[tuple[Heads, ...], Field(min_length=1, max_length=8)]
Window = Annotated[int, Field(strict=True, ge=1, le=64)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Width
    depths: Depths
    num_heads: HeadCounts


class NothingConfig(BaseModel):
    """A key of which only the empty object is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockConfig(BaseModel):
    """Keys of every block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_size: Window | None = Field(None, description="In place of the network's window_size.")


class StageConfig(BaseModel):
    """Keys of every stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_cfgs: BlockConfig = BlockConfig()


def stage_faults(spec: SwinSpec, heads_key: str) -> Iterator[tuple[str, str]]:
    """What does not fit in the depths and heads of a spec, as (key, detail)."""
    if len(spec.depths) != len(spec.heads):
        yield heads_key, f"{len(spec.heads)} entries for {len(spec.depths)} stages"
    for width, heads in zip(spec.widths(), spec.heads, strict=False):
        if width % heads:
            yield heads_key, f"{heads} heads do not divide {width} channels"


class SwinTransformerConfig(OpenMMLabConfig):
    """`mmpretrain.SwinTransformer`, which is also `mmcls.SwinTransformer`."""

    NETWORK: ClassVar[str] = "SwinTransformer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that images are brought to by default; any other is taken."
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    in_channels: InputChannels = 3
    window_size: Window = 7
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4; each has a norm of its own.")
    out_after_downsample: bool = Field(False, description="Outputs after the merging that ends a stage.")
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
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    stage_cfgs: Annotated[StageConfig, OneForAll] = StageConfig()
    patch_cfg: NothingConfig = NothingConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        yield from stage_faults(spec, "arch/num_heads")
        if self.frozen_stages >= len(spec.depths):
            yield "frozen_stages", f"{self.frozen_stages} is not a stage of 0 to {len(spec.depths) - 1}"

    def spec(self) -> SwinSpec:
        """The neutral spelling."""
        arch = self.arch
        width, depths, heads = (
            ARCHS[arch] if isinstance(arch, str) else (arch.embed_dims, arch.depths, arch.num_heads)
        )
        spec = SwinSpec(
            width,
            depths,
            heads,
            outputs=(),
            rule="mmpretrain",
            pads_small=self.pad_small_map,
            in_channels=self.in_channels,
            patch=self.patch_size,
            window=self.stage_cfgs.block_cfgs.window_size or self.window_size,
            eps=self.norm_cfg.eps,
            after_merge=self.out_after_downsample,
            grid=patch_grid(self.img_size, self.patch_size) if self.use_abs_pos_embed else None,
            interpolation=self.interpolate_mode if self.use_abs_pos_embed else "bicubic",
        )
        return with_outputs(spec, self.out_indices, self.strides)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=both(self.img_size))


def both(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return size if isinstance(size, tuple) else (size, size)


def patch_grid(size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image, which is padded to whole ones."""
    height, width = both(size)
    return math.ceil(height / patch), math.ceil(width / patch)


def with_outputs(spec: SwinSpec, indices: Sequence[int], strides: Sequence[int] | None) -> SwinSpec:
    """The spec with norms for the stages that are asked for."""
    stage_strides = [feature.stride or 0 for feature in spec.features()]
    return replace(spec, outputs=asked_stages(indices, strides, stage_strides))


def fit_windows(config: SwinTransformerConfig, state: StateDict) -> StateDict:
    """`state` with its biases of position made to fit the windows, as mmpretrain does at load."""
    return fit_tables(state, (2 * config.spec().window - 1) ** 2, resize_progression)


def optional_output_norms(config: SwinTransformerConfig, state: StateDict) -> Callable[[str], bool]:
    """Which output norms a file may leave out."""
    return may_lack_output_norms(state, last=len(config.spec().depths) - 1)


# --- mmdet.SwinTransformer ------------------------------------------------------------------------


class DetSwinTransformerConfig(OpenMMLabConfig):
    """`mmdet.SwinTransformer`: sizes spelled out; its `strides` are those of the merging, or of levels."""

    NETWORK: ClassVar[str] = "SwinTransformer"

    pretrain_img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that absolute positions are made for."
    )
    in_channels: InputChannels = 3
    embed_dims: Width = 96
    patch_size: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    window_size: Window = 7
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    depths: Depths = (2, 2, 6, 2)
    num_heads: HeadCounts = (3, 6, 12, 24)
    strides: tuple[Stride, ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Of the patches and the mergings ([4, 2, 2, 2], which is all that is served); "
        "or ask for maps by stride instead of by index: [8, 16, 32].",
    )
    out_indices: Indices = Field(
        (0, 1, 2, 3), description="Stages, 0 at stride 4; each has a norm of its own."
    )
    qkv_bias: bool = True
    qk_scale: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Factor of the attention; null is the root of the width of a head, inverted."
    )
    patch_norm: bool = Field(True, description="Norms patches, and what the mergings take.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    use_abs_pos_embed: bool = Field(
        False,
        description="Learns a position for each patch; only images of pretrain_img_size are taken then.",
    )
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    pretrained: CheckpointName | None = Field(None, description="mmdet's older spelling of init_cfg.")
    convert_weights: bool = Field(
        False,
        description="True reads checkpoints of the official code too; their output norms start at 1 and 0.",
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=8)] = Field(
        -1, description="-1 nothing, 0 the patch embedding, k adds stages 0 to k-1 with their output norms."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from stage_faults(self.spec(), "num_heads")
        if self.frozen_stages > len(self.depths):
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(self.depths)} stages"
        if self.use_abs_pos_embed and min(self._grid()) < 1:
            yield "pretrain_img_size", f"is smaller than a patch of {self.patch_size}"

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that absolute positions are made for."""
        return PreprocessDefaults(size=both(self.pretrain_img_size) if self.use_abs_pos_embed else None)

    def _grid(self) -> tuple[int, int]:
        height, width = both(self.pretrain_img_size)
        return height // self.patch_size, width // self.patch_size

    def _strides_of_levels(self) -> tuple[int, ...] | None:
        merging = (self.patch_size, *(2 for _ in self.depths[1:]))
        return None if self.strides == merging else self.strides

    def spec(self) -> SwinSpec:
        """The neutral spelling."""
        spec = SwinSpec(
            self.embed_dims,
            self.depths,
            self.num_heads,
            outputs=(),
            rule="mmdet",
            pads_small=True,
            in_channels=self.in_channels,
            patch=self.patch_size,
            window=self.window_size,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            scale=self.qk_scale,
            patch_norm=self.patch_norm,
            eps=self.norm_cfg.eps,
            inner_eps=self.norm_cfg.eps,
            activation=self.act_cfg.spec(),
            grid=self._grid() if self.use_abs_pos_embed else None,
        )
        return with_outputs(spec, self.out_indices, self._strides_of_levels())

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling; a file may go in one way or the other."""
        return {**super().architecture(), "convert_weights": self.convert_weights}

    def weights(self) -> WeightsRef | None:
        """Where the weights come from."""
        return weights_or_pretrained(super().weights(), self.pretrained)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        strides = self._strides_of_levels()
        return (
            self.selected(description) if strides is None else levels_by_stride(strides, description.features)
        )


def _adapted(config: DetSwinTransformerConfig, state: StateDict) -> StateDict:
    named = from_official(state) if config.convert_weights else state
    return fit_tables(named, (2 * config.window_size - 1) ** 2, resize_bicubic)


def _det_optional(config: DetSwinTransformerConfig, state: StateDict) -> Callable[[str], bool]:
    # The official code has one norm, `norm`, which mmdet does not take.
    last = None if config.convert_weights else len(config.depths) - 1
    return may_lack_output_norms(state, last=last)


MERGED_PARTS = ("norm", "reduction")


def _into_channels_outermost(tensor: Tensor) -> Tensor:
    """[..., 4c] with the neighbours (0, 0), (1, 0), (0, 1), (1, 1) outermost to [..., 4c] with them innermost."""
    if not _is_of_four(tensor):
        return tensor
    quarters = tensor.reshape(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return quarters.transpose(-1, -2).flatten(-2)


def _into_neighbours_outermost(tensor: Tensor) -> Tensor:
    """The way back."""
    if not _is_of_four(tensor):
        return tensor
    quarters = tensor.reshape(*tensor.shape[:-1], -1, 4).transpose(-1, -2)[..., [0, 2, 1, 3], :]
    return quarters.flatten(-2)


def _is_of_four(tensor: Tensor) -> bool:
    """Whether there are four neighbours to reorder; of another shape the tensor does not fit, and is told so later."""
    return tensor.dim() > 0 and tensor.shape[-1] > 0 and tensor.shape[-1] % 4 == 0


MERGING = Change(_into_channels_outermost, _into_neighbours_outermost)
_BLOCK = {
    "attn.w_msa.relative_position_bias_table": "attn.relative_position_bias_table",
    "attn.w_msa.qkv.{leaf}": "attn.qkv.{leaf}",
    "attn.w_msa.proj.{leaf}": "attn.proj.{leaf}",
    "ffn.layers.0.0.{leaf}": "mlp.fc1.{leaf}",
    "ffn.layers.1.{leaf}": "mlp.fc2.{leaf}",
    "norm{k}.{leaf}": "norm{k}.{leaf}",
}
_EMBEDDING = {
    "patch_embed.projection.{leaf}": "patch_embed.proj.{leaf}",
    "patch_embed.norm.{leaf}": "patch_embed.norm.{leaf}",
    "absolute_pos_embed": "absolute_pos_embed",
    "norm3.{leaf}": "norm.{leaf}",
}


def _blocks(theirs: str) -> dict[str, str]:
    return {f"stages.{{s}}.blocks.{{b}}.{part}": theirs + named for part, named in _BLOCK.items()}


def _mergings(theirs: str) -> tuple[KeyRule, ...]:
    return rules(
        {f"stages.{{s}}.downsample.{part}.{{leaf}}": f"{theirs}.{part}.{{leaf}}" for part in MERGED_PARTS},
        MERGING,
    )


SWIN_NAMES = Naming(
    "SwinTransformer",
    own=("mmpretrain", "mmdet"),
    marks=(
        "patch_embed.projection.weight",
        "stages.0.blocks.0.attn.w_msa.relative_position_bias_table",
        "stages.0.downsample.reduction.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            (
                *rules({**_EMBEDDING, **_blocks("layers.{s}.blocks.{b}.")}),
                *_mergings("layers.{s+1}.downsample"),
            ),
        ),
        KeyLayout(
            "official",
            (
                *rules({**_EMBEDDING, **_blocks("layers.{s}.blocks.{b}.")}),
                *_mergings("layers.{s}.downsample"),
            ),
        ),
        KeyLayout(
            "torchvision",
            tuple(
                rule
                for s in range(4)
                for rule in (
                    *rules(
                        {
                            f"stages.{s}.blocks.{{b}}.{part}": f"features.{2 * s + 1}.{{b}}.{named}"
                            for part, named in {
                                **_BLOCK,
                                "ffn.layers.0.0.{leaf}": "mlp.0.{leaf}",
                                "ffn.layers.1.{leaf}": "mlp.3.{leaf}",
                            }.items()
                        }
                    ),
                    *rules(
                        {
                            f"stages.{s}.downsample.{part}.{{leaf}}": f"features.{2 * s + 2}.{part}.{{leaf}}"
                            for part in MERGED_PARTS
                        },
                        MERGING,
                    ),
                )
            )
            + rules(
                {
                    "patch_embed.projection.{leaf}": "features.0.0.{leaf}",
                    "patch_embed.norm.{leaf}": "features.0.2.{leaf}",
                    "norm3.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


SWIN_TRANSFORMER = make_family(
    SwinTransformerConfig,
    SwinTransformer,
    example={"arch": "tiny", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    adapt=fit_windows,
    optional=optional_output_norms,
    naming=SWIN_NAMES,
)
DET_SWIN_TRANSFORMER = make_family(
    DetSwinTransformerConfig,
    SwinTransformer,
    example={"embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "out_indices": [1, 2, 3]},
    adapt=_adapted,
    optional=_det_optional,
    naming=SWIN_NAMES,
)
