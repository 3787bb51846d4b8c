"""detectron2's SwinTransformer (Liu et al., arXiv:2103.14030): that of `swin` with the key names of its authors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.detectron2_configs import Fault
from service.backbones.detrex import (
    LayerNormPartial,
    LayerNormPath,
    MlpRatio,
    StageIndices,
    StagesConfig,
    epsilon_of,
    freeze_of,
    without_output_norms,
)
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import Scale, deepest, make_family
from service.backbones.output_norms import asked_stages
from service.backbones.output_norms import without_output_norms as needed
from service.backbones.swin import (
    SWIN_NAMES,
    Depths,
    HeadCounts,
    Stage,
    SwinSpec,
    Width,
    Window,
    WindowAttention,
    attend_in_windows,
    stage_faults,
)
from service.backbones.vitdet_layers import FeedForward, Size
from service.config.spec import Freeze, FreezeReport


@dataclass(frozen=True)
class DetectronSwinSpec(SwinSpec):
    """Besides what decides any Swin: `positions` is the [rows, columns] of absolute ones, None for none."""

    positions: Size | None = None


class Block(nn.Module):
    """Pre-norm attention in windows, shifted or not, and feed-forward; keys `norm1`, `attn`, `norm2`, `mlp`."""

    def __init__(self, spec: SwinSpec, stage: int, *, shifted: bool) -> None:
        super().__init__()
        width, self.window = spec.widths()[stage], spec.window
        self.shift = spec.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width, eps=spec.eps)
        self.attn = WindowAttention(spec, width, spec.heads[stage])
        self.norm2 = nn.LayerNorm(width, eps=spec.eps)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        # Maps of any size are padded, and shifted where blocks are.
        maps = maps + attend_in_windows(self.norm1(maps), self.window, self.shift, self.attn)
        mixed: Tensor = maps + self.mlp(self.norm2(maps))
        return mixed


class PatchMerging(nn.Module):
    """Four neighbours become one position of twice the width; keys `reduction`, `norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=eps)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, ceil(h / 2), ceil(w / 2), 2c]."""
        padded = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
        # Neighbours outermost, down before across.
        quarters = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(quarters, dim=-1)))
        return merged


def make_stage(spec: SwinSpec, stage: int) -> Stage:
    """A stage with detectron2's blocks, of which every second one is shifted."""
    blocks = (Block(spec, stage, shifted=bool(index % 2)) for index in range(spec.depths[stage]))
    return Stage(blocks, PatchMerging(spec.widths()[stage], spec.eps) if spec.merges(stage) else None)


class PatchEmbed(nn.Module):
    """Patches projected and normed; pads right and bottom to whole patches. Keys `proj`, `norm`."""

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.proj = nn.Conv2d(spec.in_channels, spec.width, spec.patch, stride=spec.patch)
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps) if spec.patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows, columns, width]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        normed: Tensor = self.norm(self.proj(padded).permute(0, 2, 3, 1))
        return normed


class DetectronSwin(Backbone, Scale):
    """Keys `absolute_pos_embed`, `patch_embed`, `layers`, `norm0`, …"""

    def __init__(self, spec: DetectronSwinSpec) -> None:
        super().__init__()
        self.features = spec.features()
        grid = spec.positions
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, spec.width, *grid)) if grid else None
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.ModuleList(make_stage(spec, stage) for stage in range(len(spec.depths)))
        for stage in spec.outputs:
            self.add_module(f"norm{stage}", nn.LayerNorm(self.features[stage].channels, eps=spec.eps))

    def start(self) -> None:
        """Small positions at first."""
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self._placed(self.patch_embed(images)), {}
        for stage in range(deepest(nodes) + 1):
            before, maps = self.layers[stage](maps)
            if str(stage) in nodes:
                output = self.get_submodule(f"norm{stage}")(before)
                found[str(stage)] = output.permute(0, 3, 1, 2).contiguous()
        return {node: found[node] for node in nodes}

    def _placed(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] with the positions of its places, resampled to its size."""
        if self.absolute_pos_embed is None:
            return maps
        positions = F.interpolate(self.absolute_pos_embed, size=maps.shape[1:3], mode="bicubic")
        return maps + positions.permute(0, 2, 3, 1)

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return needed(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """detectron2's rule: 0 is `patch_embed`, 1 the absolute positions too, k the first k - 1 stages too."""
        if freeze.stages is None:
            return freeze_report(self, freeze, ())
        positions = ["absolute_pos_embed"] if freeze.stages >= 1 else []
        stages = [f"layers.{stage}" for stage in range(freeze.stages - 1)]
        return freeze_report(self, freeze, ["patch_embed", *positions, *stages], norms_follow=False)


# --- the config -----------------------------------------------------------------------------------

Patch = Annotated[int, Field(strict=True, ge=1, le=32)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]


class DetectronSwinConfig(StagesConfig):
    """`detectron2.SwinTransformer`."""

    NETWORK: ClassVar[str] = "detectron2.SwinTransformer"

    pretrain_img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Images that absolute positions are made for; changes nothing without ape."
    )
    patch_size: Patch = 4
    in_chans: InputChannels = 3
    embed_dim: Width = 96
    depths: Depths = (2, 2, 6, 2)
    num_heads: HeadCounts = (3, 6, 12, 24)
    window_size: Window = 7
    mlp_ratio: MlpRatio = 4.0
    qkv_bias: StrictBool = True
    qk_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Factor of the attention; null and 0 are the root of the width of a head, inverted."
    )
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.2, description="Training only; changes nothing here.")
    norm_layer: LayerNormPath | LayerNormPartial = Field(
        "LayerNorm", description="LayerNorm, or a partial of it with its eps."
    )
    ape: StrictBool = Field(False, description="Adds absolute positions, resized to the grid of patches.")
    patch_norm: StrictBool = True
    out_indices: StageIndices = Field(
        (0, 1, 2, 3), description="Stages, 0 at stride 4, named p0, p1, …; each has a norm of its own."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=9)] = Field(
        -1,
        description="-1 nothing, 0 patch_embed, 1 the absolute positions too, k the first k - 1 stages too.",
    )
    use_checkpoint: StrictBool = Field(False, description="Saves memory in training; changes nothing here.")

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from stage_faults(self.spec(), "num_heads")
        if self.frozen_stages > len(self.depths) + 1:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(self.depths)} stages and 1"
        if self.ape and 0 in (self._grid() or ()):
            yield "pretrain_img_size", f"is less than the patches of {self.patch_size}"

    def _grid(self) -> Size | None:
        size = self.pretrain_img_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return (height // self.patch_size, width // self.patch_size) if self.ape else None

    def freeze(self) -> Freeze:
        """`frozen_stages`."""
        return freeze_of(self.frozen_stages)

    def spec(self) -> DetectronSwinSpec:
        """The neutral spelling."""
        strides = [self.patch_size * 2**stage for stage in range(len(self.depths))]
        return DetectronSwinSpec(
            self.embed_dim,
            self.depths,
            self.num_heads,
            outputs=asked_stages(self.out_indices, self.strides, strides),
            rule="mmdet",
            pads_small=True,
            in_channels=self.in_chans,
            patch=self.patch_size,
            window=self.window_size,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            scale=self.qk_scale or None,
            patch_norm=self.patch_norm,
            eps=epsilon_of(self.norm_layer),
            positions=self._grid(),
        )


EXAMPLE: dict[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "out_indices": [1, 2, 3],
}
SWIN = make_family(
    DetectronSwinConfig,
    DetectronSwin,
    example=EXAMPLE,
    optional=without_output_norms,
    naming=SWIN_NAMES,
    library="official",
)
