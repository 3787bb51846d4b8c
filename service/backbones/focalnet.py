"""FocalNet (Yang et al., arXiv:2203.11926) with the key names of its authors' code, which detrex keeps.

In place of attention each position is multiplied by a sum of contexts: depthwise convolutions of growing kernels over
one another, each with a gate of its own, and the mean over the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, StrictBool
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.detrex import (
    Blocks,
    MlpRatio,
    NormLayer,
    StageIndices,
    StagesConfig,
    Width,
    epsilon_of,
    freeze_of,
    without_output_norms,
)
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import Scale, deepest, make_family
from service.backbones.output_norms import asked_stages
from service.backbones.output_norms import without_output_norms as weights_without_output_norms
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

FOCAL_FACTOR = 2  # what a level's kernel is larger than that of the level before
INITIAL_SCALE = 1e-4
CONV_STEM_STRIDE = 4
# kernel, stride and padding of patches that overlap
STEM_OVERLAP = (7, CONV_STEM_STRIDE, 2)
STAGE_OVERLAP = (3, 2, 1)


@dataclass(frozen=True)
class FocalNetSpec:
    """What decides the numbers and the names of the weights.

    `levels` and `windows` are each stage's number of convolved contexts and the kernel of the first of them.
    `outputs` are the stages with an output norm. `post_norm` norms what a branch gives, not what goes in.
    """

    width: int
    depths: tuple[int, ...]
    levels: tuple[int, ...]
    windows: tuple[int, ...]
    outputs: tuple[int, ...]
    patch: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    eps: float = 1e-5
    patch_norm: bool = True
    overlapping: bool = False
    post_norm: bool = False
    post_norm_inside: bool = False
    layer_scale: bool = False
    normalise: bool = False

    def width_of(self, stage: int) -> int:
        """Channels of a stage; each doubles them."""
        return self.width * (1 << stage)

    def stem_stride(self) -> int:
        """What the patches reduce the image by."""
        return CONV_STEM_STRIDE if self.overlapping else self.patch

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        return tuple(
            FeatureInfo(stage, str(stage), self.width_of(stage), self.stem_stride() * 2**stage, "NCHW")
            for stage in range(len(self.depths))
        )


class Modulation(nn.Module):
    """Focal modulation; keys `f`, `h`, `proj`, `focal_layers.0.0`, …, `ln`."""

    def __init__(self, spec: FocalNetSpec, stage: int) -> None:
        super().__init__()
        width, levels = spec.width_of(stage), spec.levels[stage]
        self.levels, self.normalise = levels, spec.normalise
        self.f = nn.Linear(width, 2 * width + levels + 1)
        self.h = nn.Conv2d(width, width, 1)
        self.proj = nn.Linear(width, width)
        kernels = (spec.windows[stage] + FOCAL_FACTOR * level for level in range(levels))
        self.focal_layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False), nn.GELU()
            )
            for kernel in kernels
        )
        self.ln = nn.LayerNorm(width) if spec.post_norm_inside else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        width = maps.shape[-1]
        projected = self.f(maps).permute(0, 3, 1, 2)
        query, context, gates = torch.split(projected, [width, width, self.levels + 1], dim=1)
        modulated = query * self.h(self._contexts(context, gates))
        output: Tensor = self.proj(self.ln(modulated.permute(0, 2, 3, 1)))
        return output

    def _contexts(self, context: Tensor, gates: Tensor) -> Tensor:
        """The gated sum of [n, c, h, w] convolved ever wider, and of its mean."""
        *level_gates, last_gate = gates.chunk(self.levels + 1, dim=1)
        total = torch.zeros_like(context)
        for layer, gate in zip(self.focal_layers, level_gates, strict=True):
            context = layer(context)
            total = total + context * gate
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * last_gate
        return total / (self.levels + 1) if self.normalise else total


class FeedForward(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, spec: FocalNetSpec, width: int) -> None:
        super().__init__()
        hidden = int(width * spec.mlp_ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.fc2(F.gelu(self.fc1(maps)))
        return projected


class Block(Scale):
    """Modulation and feed-forward, each with a residual; keys `gamma_1`, `gamma_2` where residuals are scaled."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, spec: FocalNetSpec, stage: int) -> None:
        super().__init__()
        width, self.post_norm = spec.width_of(stage), spec.post_norm
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if spec.layer_scale else None)
        self.norm1 = nn.LayerNorm(width, eps=spec.eps)
        self.modulation = Modulation(spec, stage)
        self.norm2 = nn.LayerNorm(width, eps=spec.eps)
        self.mlp = FeedForward(spec, width)

    def start(self) -> None:
        """The residual branches begin small."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, INITIAL_SCALE)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self._branch(maps, self.norm1, self.modulation, self.gamma_1)
        return maps + self._branch(maps, self.norm2, self.mlp, self.gamma_2)

    def _branch(self, maps: Tensor, norm: nn.Module, mix: nn.Module, scale: Tensor | None) -> Tensor:
        mixed: Tensor = norm(mix(maps)) if self.post_norm else mix(norm(maps))
        return mixed if scale is None else scale * mixed


class PatchEmbed(nn.Module):
    """Patches projected and normed; pads right and bottom to whole patches. Keys `proj`, `norm`."""

    def __init__(self, patch: int, projection: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.patch = patch
        self.proj = projection
        self.norm = norm

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, rows, columns, outputs]."""
        height, width = maps.shape[-2:]
        padded = F.pad(maps, (0, -width % self.patch, 0, -height % self.patch))
        normed: Tensor = self.norm(self.proj(padded).permute(0, 2, 3, 1))
        return normed


def make_patch_embed(
    spec: FocalNetSpec, inputs: int, outputs: int, patch: int, overlap: tuple[int, int, int], *, normed: bool
) -> PatchEmbed:
    """The projection of patches; `overlap` is kernel, stride and padding of those that overlap."""
    kernel, stride, padding = overlap if spec.overlapping else (patch, patch, 0)
    projection = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)
    norm = nn.LayerNorm(outputs, eps=spec.eps) if normed else nn.Identity()
    return PatchEmbed(patch, projection, norm)


class Stage(nn.Module):
    """Blocks, then patches of four for the next stage; keys `blocks`, `downsample`."""

    def __init__(self, spec: FocalNetSpec, stage: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec, stage) for _ in range(spec.depths[stage]))
        width = spec.width_of(stage)
        last = stage == len(spec.depths) - 1
        self.downsample = (
            None if last else make_patch_embed(spec, width, 2 * width, 2, STAGE_OVERLAP, normed=True)
        )

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[n, h, w, c] to the map before and after the downsampling."""
        for block in self.blocks:
            maps = block(maps)
        return maps, maps if self.downsample is None else self.downsample(maps.permute(0, 3, 1, 2))


class FocalNet(Backbone):
    """Keys `patch_embed`, `layers`, `norm0`, …"""

    def __init__(self, spec: FocalNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.patch_embed = make_patch_embed(
            spec, spec.in_channels, spec.width, spec.patch, STEM_OVERLAP, normed=spec.patch_norm
        )
        self.layers = nn.ModuleList(Stage(spec, stage) for stage in range(len(spec.depths)))
        for stage in spec.outputs:
            self.add_module(f"norm{stage}", nn.LayerNorm(spec.width_of(stage), eps=spec.eps))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.patch_embed(images), {}
        for stage in range(deepest(nodes) + 1):
            before, maps = self.layers[stage](maps)
            if str(stage) in nodes:
                normed = getattr(self, f"norm{stage}")(before)
                found[str(stage)] = normed.permute(0, 3, 1, 2).contiguous()
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return weights_without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """detrex's rule: 0 and 1 are the patches, k >= 2 also the first k - 1 stages; output norms never."""
        if freeze.stages is None:
            return freeze_report(self, freeze, [])
        layers = [f"layers.{stage}" for stage in range(freeze.stages - 1)]
        return freeze_report(self, freeze, ["patch_embed", *layers], norms_follow=False)


# --- detrex.FocalNet ------------------------------------------------------------------------------


def _one_side(value: Any) -> Any:
    """A patch as a pair of equal sides."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return value[0] if is_pair and value[0] == value[1] else value


PatchSize = Annotated[int, BeforeValidator(_one_side), Field(strict=True, ge=1, le=32)]
Levels = Annotated[int, Field(strict=True, ge=0, le=8)]
Window = Annotated[int, Field(strict=True, ge=1, le=31)]
OnStages = Field(min_length=1, max_length=8)


class FocalNetConfig(StagesConfig):
    """`detrex.FocalNet`."""

    NETWORK: ClassVar[str] = "detrex.FocalNet"

    pretrain_img_size: Annotated[int, Field(ge=1, le=65_536)] = Field(1600, description="No effect.")
    patch_size: PatchSize = 4
    in_chans: InputChannels = 3
    embed_dim: Width = Field(96, description="Channels of the first stage; each doubles them.")
    depths: Annotated[tuple[Blocks, ...], OnStages] = Field((2, 2, 6, 2), description="Blocks of the stages.")
    mlp_ratio: MlpRatio = 4.0
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.3, description="Training only; changes nothing here.")
    norm_layer: NormLayer = "LayerNorm"
    patch_norm: StrictBool = True
    out_indices: StageIndices = Field(
        (0, 1, 2, 3), description="Stages, 0 at stride 4, named p0 to p3; each has a norm of its own."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=9)] = Field(
        -1, description="0 and 1 freeze the patches, k also the first k - 1 stages; -1 nothing."
    )
    focal_levels: Annotated[tuple[Levels, ...], OnStages] = Field(
        (3, 3, 3, 3), description="Convolved contexts of each stage."
    )
    focal_windows: Annotated[tuple[Window, ...], OnStages] = Field(
        (3, 3, 3, 3), description="Kernel of the first context of each stage; the next are 2 larger. Odd."
    )
    use_conv_embed: StrictBool = Field(False, description="Patches that overlap.")
    use_postln: StrictBool = Field(False, description="Norms behind each branch, not before it.")
    use_postln_in_modulation: StrictBool = False
    use_layerscale: StrictBool = False
    normalize_modulator: StrictBool = Field(False, description="Divides the sum of contexts by their number.")
    use_checkpoint: StrictBool = Field(False, description="Saves memory in training; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        stages = len(self.depths)
        for key in ("focal_levels", "focal_windows"):
            if len(given := getattr(self, key)) != stages:
                yield key, f"{len(given)} values for {stages} stages"
        for stage, (levels, window) in enumerate(zip(self.focal_levels, self.focal_windows, strict=False)):
            if levels > 0 and window % 2 == 0:
                yield f"focal_windows/{stage}", f"{window} is even: the contexts would not fit each other"
        if self.frozen_stages > stages + 1:
            yield "frozen_stages", f"{self.frozen_stages} is more than {stages + 1}, which is everything"

    def freeze(self) -> Freeze:
        """`frozen_stages`."""
        return freeze_of(self.frozen_stages)

    def spec(self) -> FocalNetSpec:
        """The neutral spelling."""
        stem_stride = CONV_STEM_STRIDE if self.use_conv_embed else self.patch_size
        strides = tuple(stem_stride * 2**stage for stage in range(len(self.depths)))
        return FocalNetSpec(
            width=self.embed_dim,
            depths=self.depths,
            levels=self.focal_levels,
            windows=self.focal_windows,
            outputs=asked_stages(self.out_indices, self.strides, strides),
            patch=self.patch_size,
            in_channels=self.in_chans,
            mlp_ratio=self.mlp_ratio,
            eps=epsilon_of(self.norm_layer),
            patch_norm=self.patch_norm,
            overlapping=self.use_conv_embed,
            post_norm=self.use_postln,
            post_norm_inside=self.use_postln_in_modulation,
            layer_scale=self.use_layerscale,
            normalise=self.normalize_modulator,
        )


EXAMPLE: dict[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "focal_levels": [3, 3, 3, 3],
    "focal_windows": [3, 3, 3, 3],
    "out_indices": [1, 2, 3],
}
FOCALNET_NAMES = Naming(
    "FocalNet",
    own=("detrex", "official"),
    marks=(
        "patch_embed.proj.weight",
        "layers.0.blocks.0.modulation.f.weight",
        "layers.0.blocks.0.modulation.focal_layers.0.0.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "patch_embed.{rest}": "stem.{rest}",
                    "layers.{s}.downsample.{rest}": "layers.{s+1}.downsample.{rest}",
                    "layers.{s}.blocks.{b}.gamma_{k}": "layers.{s}.blocks.{b}.ls{k}.gamma",
                    "layers.{s}.blocks.{rest}": "layers.{s}.blocks.{rest}",
                    "norm.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


FOCALNET = make_family(
    FocalNetConfig, FocalNet, example=EXAMPLE, optional=without_output_norms, naming=FOCALNET_NAMES
)
