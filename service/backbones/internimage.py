"""InternImage (Wang et al., arXiv:2211.05778) with the key names of its authors' code, which detrex keeps.

Its operator, DCNv3, takes at each position a weighted sum of nine samples of the map, whose places and weights are
computed from the position itself, for each group of channels on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate
from service.backbones.detrex import Blocks, MlpRatio, StagesConfig, Width
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import Scale, deepest, make_family
from service.config.spec import FeatureInfo, Freeze, FreezeReport

KERNEL = 3
POINTS = KERNEL * KERNEL
EPS = 1e-6
STEM_STRIDE = 4
POST_NORM_LEVEL = 2  # the one whose blocks may have norms behind them
ActivationName = Literal["GELU", "ReLU", "SiLU"]
NormName = Literal["LN", "BN"]
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[ActivationName, Activation] = {"GELU": F.gelu, "ReLU": F.relu, "SiLU": F.silu}


@dataclass(frozen=True)
class InternImageSpec:
    """What decides the numbers and the names of the weights.

    `norm` is that of the convolutions; the layers' own are layer norms. `layer_scale` is None for none.
    `filter` is the kernel of the depthwise convolution that offsets come from. `post_norm_blocks` are the blocks of
    level 2 with a norm behind them, None where it has no such norms.
    """

    width: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    mlp_ratio: float = 4.0
    activation: ActivationName = "GELU"
    norm: NormName = "LN"
    layer_scale: float | None = None
    offset_scale: float = 1.0
    post_norm: bool = False
    filter: int = KERNEL
    post_norm_blocks: tuple[int, ...] | None = None
    residual_post_norm: bool = False
    center_scale: bool = False
    in_channels: int = 3

    def width_of(self, level: int) -> int:
        """Channels of a level; each doubles them."""
        return self.width * (1 << level)

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a level."""
        return tuple(
            FeatureInfo(level, str(level), self.width_of(level), STEM_STRIDE * 2**level, "NCHW")
            for level in range(len(self.depths))
        )


# --- norms ----------------------------------------------------------------------------------------


class ChannelsLast(nn.Module):
    """[n, c, h, w] to [n, h, w, c]; a module, as the keys of the norms beside it count it."""

    def forward(self, maps: Tensor) -> Tensor:
        """As the class says."""
        return maps.permute(0, 2, 3, 1)


def norm_after_convolution(kind: NormName, width: int) -> nn.Sequential:
    """[n, c, h, w] to [n, h, w, c]; key `1` of a layer norm, `0` of a batch norm."""
    if kind == "LN":
        return nn.Sequential(ChannelsLast(), nn.LayerNorm(width, eps=EPS))
    return nn.Sequential(nn.BatchNorm2d(width), ChannelsLast())


def layer_norm(width: int) -> nn.Sequential:
    """Over the last dimension; key `0`."""
    return nn.Sequential(nn.LayerNorm(width, eps=EPS))


# --- DCNv3 ----------------------------------------------------------------------------------------


def sample_and_sum(maps: Tensor, offsets: Tensor, weights: Tensor, offset_scale: float) -> Tensor:
    """The weighted sum of nine bilinear samples around each position; zeros lie past the border.

    Args:
        maps: [n, h, w, c]; the groups are equal parts of the channels.
        offsets: [n, h, w, groups, 9, 2], right and down in positions. The points of the 3x3 grid that they move go
            down each column, left to right.
        weights: [n, h, w, groups, 9].
        offset_scale: what the grid and the offsets are multiplied by.
    """
    n, height, width, channels = maps.shape
    groups = weights.shape[3]
    # In float32 whatever the maps are: half precision cannot tell the places of a large map apart.
    sources = maps.float().permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height, width)
    offsets = offsets.float().permute(4, 0, 3, 1, 2, 5).flatten(1, 2)
    shares = weights.float().permute(4, 0, 3, 1, 2).flatten(1, 2)
    down, right = torch.meshgrid(
        torch.arange(height, device=maps.device), torch.arange(width, device=maps.device), indexing="ij"
    )
    places = torch.stack((right, down), dim=-1)
    # Width and height, as numbers of the map that a trace does not take for constants.
    size = places[-1, -1] + 1
    summed = torch.zeros_like(sources)
    # One point at a time: all nine at once would take nine times the map's memory.
    for point in range(POINTS):
        step = torch.tensor(divmod(point, KERNEL), device=maps.device) - KERNEL // 2
        where = places + (step + offsets[point]) * offset_scale
        grid = (2 * where + 1) / size - 1
        samples = F.grid_sample(sources, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = summed + samples * shares[point][:, None]
    return summed.reshape(n, channels, height, width).permute(0, 2, 3, 1).to(maps.dtype)


class DeformableMixing(Scale):
    """DCNv3; keys `dw_conv`, `offset`, `mask`, `input_proj`, `output_proj`, `center_feature_scale_proj_weight`, …"""

    center_feature_scale_proj_weight: nn.Parameter | None
    center_feature_scale_proj_bias: nn.Parameter | None

    def __init__(self, spec: InternImageSpec, level: int) -> None:
        super().__init__()
        width, groups = spec.width_of(level), spec.groups[level]
        self.groups, self.offset_scale = groups, spec.offset_scale
        self.activation = ACTIVATIONS[spec.activation]
        for name, shape in (("weight", (groups, width)), ("bias", (groups,))):
            gate = nn.Parameter(torch.empty(shape)) if spec.center_scale else None
            self.register_parameter(f"center_feature_scale_proj_{name}", gate)
        self.dw_conv = nn.Sequential(
            nn.Conv2d(width, width, spec.filter, padding=(spec.filter - 1) // 2, groups=width),
            norm_after_convolution(spec.norm, width),
        )
        self.offset = nn.Linear(width, groups * POINTS * 2)
        self.mask = nn.Linear(width, groups * POINTS)
        self.input_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def start(self) -> None:
        """The gates begin half open."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        projected = self.input_proj(maps)
        query = self.activation(self.dw_conv(maps.permute(0, 3, 1, 2)))
        offsets = self.offset(query).unflatten(-1, (self.groups, POINTS, 2))
        weights = self.mask(query).unflatten(-1, (self.groups, POINTS)).softmax(-1)
        mixed = sample_and_sum(projected, offsets, weights, self.offset_scale)
        output: Tensor = self.output_proj(self._centred(mixed, projected, query))
        return output

    def _centred(self, mixed: Tensor, projected: Tensor, query: Tensor) -> Tensor:
        """Between the samples and the position itself, by a gate of each group."""
        if self.center_feature_scale_proj_weight is None:
            return mixed
        gates = F.linear(query, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias)
        gates = gates.sigmoid().repeat_interleave(mixed.shape[-1] // self.groups, dim=-1)
        return mixed * (1 - gates) + projected * gates


class FeedForward(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, spec: InternImageSpec, width: int) -> None:
        super().__init__()
        hidden = int(width * spec.mlp_ratio)
        self.activation = ACTIVATIONS[spec.activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.fc2(self.activation(self.fc1(maps)))
        return projected


# --- the network ----------------------------------------------------------------------------------


class Layer(Scale):
    """DCNv3 and feed-forward, each with a residual; keys `gamma1`, `gamma2`, `norm1`, `dcn`, `norm2`, `mlp`, …"""

    def __init__(self, spec: InternImageSpec, level: int) -> None:
        super().__init__()
        width, self.initial = spec.width_of(level), spec.layer_scale
        scaled = spec.layer_scale is not None
        for name in ("gamma1", "gamma2"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if scaled else None)
        self.post_norm = spec.post_norm
        # The library has these norms beside scaled residuals too, and does not use them there.
        self.norms_twice = spec.residual_post_norm and not scaled
        self.norm1 = layer_norm(width)
        self.dcn = DeformableMixing(spec, level)
        self.norm2 = layer_norm(width)
        self.mlp = FeedForward(spec, width)
        for name in ("res_post_norm1", "res_post_norm2"):
            self.add_module(name, layer_norm(width) if spec.residual_post_norm else nn.Identity())

    def start(self) -> None:
        """The residual branches begin at the config's scale."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, self.initial or 0.0)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = maps + self._branch(maps, "1", self.dcn)
        return maps + self._branch(maps, "2", self.mlp)

    def _branch(self, maps: Tensor, number: str, mix: nn.Module) -> Tensor:
        norm, scale = getattr(self, f"norm{number}"), getattr(self, f"gamma{number}")
        mixed: Tensor = norm(mix(maps)) if self.post_norm else mix(norm(maps))
        if self.norms_twice and not self.post_norm:
            mixed = getattr(self, f"res_post_norm{number}")(mixed)
        return mixed if scale is None else scale * mixed


class Downsample(nn.Module):
    """Half the map, twice the channels; keys `conv`, `norm`."""

    def __init__(self, spec: InternImageSpec, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm = norm_after_convolution(spec.norm, 2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, ceil(h / 2), ceil(w / 2), 2c]."""
        halved: Tensor = self.norm(self.conv(maps.permute(0, 3, 1, 2)))
        return halved


class Level(nn.Module):
    """Layers, a norm, and the way to the next level; keys `blocks`, `norm`, `post_norms`, `downsample`."""

    def __init__(self, spec: InternImageSpec, level: int) -> None:
        super().__init__()
        width = spec.width_of(level)
        self.blocks = nn.ModuleList(Layer(spec, level) for _ in range(spec.depths[level]))
        normed = not spec.post_norm or spec.center_scale
        self.norm = layer_norm(width) if normed else nn.Identity()
        self.normed_blocks = (spec.post_norm_blocks or ()) if level == POST_NORM_LEVEL else ()
        self.post_norms = nn.ModuleList(layer_norm(width) for _ in self.normed_blocks)
        last = level == len(spec.depths) - 1
        self.downsample = None if last else Downsample(spec, width)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[n, h, w, c] to the map before and after the downsampling."""
        for index, block in enumerate(self.blocks):
            maps = block(maps)
            if index in self.normed_blocks:
                maps = self.post_norms[self.normed_blocks.index(index)](maps)
        maps = self.norm(maps)
        return maps, maps if self.downsample is None else self.downsample(maps)


class Stem(nn.Module):
    """Two strided convolutions; keys `conv1`, `norm1`, `conv2`, `norm2`."""

    def __init__(self, spec: InternImageSpec) -> None:
        super().__init__()
        half = spec.width // 2
        self.activation = ACTIVATIONS[spec.activation]
        self.conv1 = nn.Conv2d(spec.in_channels, half, 3, stride=2, padding=1)
        self.norm1 = norm_after_convolution(spec.norm, half)
        self.conv2 = nn.Conv2d(half, spec.width, 3, stride=2, padding=1)
        self.norm2 = norm_after_convolution(spec.norm, spec.width)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] to [n, ceil(h / 4), ceil(w / 4), width]."""
        maps = self.activation(self.norm1(self.conv1(images)))
        normed: Tensor = self.norm2(self.conv2(maps.permute(0, 3, 1, 2)))
        return normed


class InternImage(Backbone):
    """Keys `patch_embed`, `levels`."""

    def __init__(self, spec: InternImageSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.patch_embed = Stem(spec)
        self.levels = nn.ModuleList(Level(spec, level) for level in range(len(spec.depths)))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the levels in `nodes`; stops after the deepest of them."""
        maps, found = self.patch_embed(images), {}
        for level in range(deepest(nodes) + 1):
            before, maps = self.levels[level](maps)
            if str(level) in nodes:
                found[str(level)] = before.permute(0, 3, 1, 2).contiguous()
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has no key for it."""
        return freeze_report(self, freeze, [])


# --- detrex.InternImage ---------------------------------------------------------------------------

Groups = Annotated[int, Field(strict=True, ge=1, le=1024)]
BlockIndex = Annotated[int, Field(strict=True, ge=0, le=63)]


class InternImageConfig(StagesConfig):
    """`detrex.InternImage`: images of three channels."""

    NETWORK: ClassVar[str] = "detrex.InternImage"

    core_op: Literal["DCNv3", "DCNv3_pytorch"] = Field("DCNv3", description="Both compute the same.")
    channels: Width = Field(64, description="Channels of the first level; each doubles them.")
    depths: Annotated[tuple[Blocks, ...], Field(min_length=1, max_length=8)] = Field(
        (3, 4, 18, 5), description="Layers of the levels."
    )
    groups: Annotated[tuple[Groups, ...], Field(min_length=1, max_length=8)] = Field(
        (3, 6, 12, 24), description="Groups of channels of the levels, each with offsets of its own."
    )
    mlp_ratio: MlpRatio = 4.0
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.2, description="Training only; changes nothing here.")
    drop_path_type: Literal["linear", "uniform"] = Field("linear", description="Training only.")
    act_layer: ActivationName = "GELU"
    norm_layer: NormName = Field("LN", description="Of the convolutions; the layers have layer norms.")
    layer_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="null leaves the layer scale out."
    )
    offset_scale: Annotated[float, Field(ge=-16, le=16)] = 1.0
    post_norm: StrictBool = Field(False, description="Norms behind each branch, not before it.")
    with_cp: StrictBool = Field(False, description="Saves memory in training; changes nothing here.")
    dw_kernel_size: Annotated[int, Field(strict=True, ge=1, le=31)] | None = Field(
        None, description="Kernel of the convolution that offsets come from; odd, 3 if null."
    )
    level2_post_norm: StrictBool = False
    level2_post_norm_block_ids: Annotated[tuple[BlockIndex, ...], Field(max_length=64)] | None = Field(
        None, description="Layers of level 2 with a norm behind them."
    )
    res_post_norm: StrictBool = Field(False, description="A second norm at the end of each branch.")
    center_feature_scale: StrictBool = Field(False, description="Mixes each position itself back in.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if len(self.groups) != len(self.depths):
            yield "groups", f"{len(self.groups)} values for {len(self.depths)} levels"
        for level, groups in enumerate(self.groups):
            if (width := self.channels * 2**level) % groups:
                yield f"groups/{level}", f"{groups} groups do not divide {width} channels"
        if self.channels < 2:
            yield "channels", "at least 2: the stem begins with half of them"
        if self.dw_kernel_size is not None and self.dw_kernel_size % 2 == 0:
            yield "dw_kernel_size", f"{self.dw_kernel_size} is even"

    def spec(self) -> InternImageSpec:
        """The neutral spelling."""
        return InternImageSpec(
            width=self.channels,
            depths=self.depths,
            groups=self.groups,
            mlp_ratio=self.mlp_ratio,
            activation=self.act_layer,
            norm=self.norm_layer,
            layer_scale=self.layer_scale,
            offset_scale=self.offset_scale,
            post_norm=self.post_norm,
            filter=self.dw_kernel_size or KERNEL,
            post_norm_blocks=self.level2_post_norm_block_ids if self.level2_post_norm else None,
            residual_post_norm=self.res_post_norm,
            center_scale=self.center_feature_scale,
        )


EXAMPLE: dict[str, Any] = {
    "channels": 64,
    "depths": [4, 4, 18, 4],
    "groups": [4, 8, 16, 32],
    "offset_scale": 1.0,
    "layer_scale": 1.0,
    "out_indices": [1, 2, 3],
}
INTERNIMAGE = make_family(InternImageConfig, InternImage, example=EXAMPLE)
