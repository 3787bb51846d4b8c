"""RepMLPNet (Ding et al., arXiv:2112.11081) with mmpretrain's key names, as trained and as deployed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.inverted_residual import NO_ACTIVATION
from service.backbones.norms import BATCH_NORM, NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationSpec,
    ConvConfig,
    ConvModule,
    SpecConfig,
    SqueezeExcite,
    batch_norm,
    deepest,
    make_divisible,
    make_family,
    map_features,
    named_arch,
    norm_fault,
    pads_same,
)
from service.backbones.vision_transformer import Pixels
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

# channels, units and sets of shared weights of the stages
Plan = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
BASE: Plan = ((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128))
ARCHS: dict[str, Plan] = {"b": BASE, "base": BASE}
RELU, SIGMOID = ActivationSpec("relu"), ActivationSpec("sigmoid")
MAX_VECTOR = 65_536  # values of a part of a map that one linear layer mixes


@dataclass(frozen=True)
class RepMLPNetSpec:
    """What decides the numbers and the names of the weights; images are `image` [height, width] and nothing else.

    `kernels` are those of the convolutions beside each linear layer, none where `deploy` has merged them.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    sets: tuple[int, ...]
    image: tuple[int, int]
    patch: tuple[int, int]
    kernels: tuple[int, ...]
    ratio: int
    norm: NormSpec
    in_channels: int = 3
    final_norm: bool = True
    deploy: bool = False
    same_pad: bool = False

    def grid(self, stage: int) -> tuple[int, int]:
        """(rows, columns) of the map that a stage mixes."""
        rows, columns = (math.ceil(side / patch) for side, patch in zip(self.image, self.patch, strict=True))
        return rows // 2**stage, columns // 2**stage

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage, after the convolution that halves it; nothing halves the last."""
        stages = range(len(self.widths))
        after = [min(stage + 1, len(self.widths) - 1) for stage in stages]
        return map_features([self.widths[i] for i in after], [self.patch[0] * 2**i for i in after])


class PatchEmbed(nn.Module):
    """Patches projected, normed, activated; pads right and bottom. Keys `projection`, `norm`."""

    def __init__(self, spec: RepMLPNetSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.projection = nn.Conv2d(
            spec.in_channels, spec.widths[0], spec.patch, stride=spec.patch, bias=False
        )
        self.norm = make_norm(spec.norm, spec.widths[0])

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, rows, columns]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        return F.relu(self.norm(self.projection(padded)))


class GlobalPerceptron(SqueezeExcite):
    """The gate of a squeeze-and-excite layer; keys `conv1.conv`, `conv2.conv`."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to [n, c, 1, 1]."""
        gate: Tensor = self.conv2(self.conv1(F.adaptive_avg_pool2d(maps, 1)))
        return gate


class RepMLPBlock(nn.Module):
    """All positions of a map mixed by a linear layer and convolutions, then gated.

    Keys `gp`, `fc3`, `fc3_bn`, `repconv1`, `repconv3`, …. The channels share as many weights as there are sets.
    """

    def __init__(self, spec: RepMLPNetSpec, stage: int) -> None:
        super().__init__()
        width, self.sets, self.grid = spec.widths[stage], spec.sets[stage], spec.grid(stage)
        hidden = make_divisible(width // spec.ratio, 8)
        self.gp = GlobalPerceptron(width, hidden, first=RELU, gate=SIGMOID)
        vector = self.sets * self.grid[0] * self.grid[1]
        self.fc3 = nn.Conv2d(vector, vector, 1, groups=self.sets, bias=spec.deploy)
        self.fc3_bn = nn.Identity() if spec.deploy else nn.BatchNorm2d(self.sets)
        self.names = () if spec.deploy else tuple(f"repconv{kernel}" for kernel in spec.kernels)
        for kernel, name in zip(spec.kernels, self.names, strict=False):
            branch = ConvModule(
                self.sets, self.sets, kernel, groups=self.sets, norm=BATCH_NORM, activation=NO_ACTIVATION
            )
            self.add_module(name, branch)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, rows, columns] to the same shape."""
        parts = maps.reshape(-1, self.sets, *self.grid)
        mixed = self.fc3(parts.reshape(parts.shape[0], -1, 1, 1)).reshape(parts.shape)
        mixed = self.fc3_bn(mixed)
        local: Tensor | None = None
        for name in self.names:
            branch = getattr(self, name)(parts)
            local = branch if local is None else local + branch
        mixed = mixed if local is None else mixed + local
        gated: Tensor = mixed.reshape(maps.shape) * self.gp(maps)
        return gated


class ConvFeedForward(nn.Module):
    """Two 1x1 convolutions whose norms no `norm_cfg` reaches; keys `ffn_fc1`, `ffn_fc2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvModule(width, 4 * width, 1, norm=BATCH_NORM, activation=NO_ACTIVATION)
        self.ffn_fc2 = ConvModule(4 * width, width, 1, norm=BATCH_NORM, activation=NO_ACTIVATION)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.ffn_fc2(F.gelu(self.ffn_fc1(maps)))
        return mixed


class Unit(nn.Module):
    """Positions, then channels, each with a residual; keys `repmlp_block`, `ffn_block`, `norm1`, `norm2`."""

    def __init__(self, spec: RepMLPNetSpec, stage: int) -> None:
        super().__init__()
        width = spec.widths[stage]
        self.repmlp_block = RepMLPBlock(spec, stage)
        self.ffn_block = ConvFeedForward(width)
        self.norm1 = make_norm(spec.norm, width)
        self.norm2 = make_norm(spec.norm, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, rows, columns] to the same shape."""
        maps = maps + self.repmlp_block(self.norm1(maps))
        mixed: Tensor = maps + self.ffn_block(self.norm2(maps))
        return mixed


class RepMLPNet(Backbone):
    """Keys `patch_embed`, `stages`, `downsample_layers`, `final_norm`."""

    def __init__(self, spec: RepMLPNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.patch_embed = PatchEmbed(spec)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Unit(spec, stage) for _ in range(depth)))
            for stage, depth in enumerate(spec.depths)
        )
        self.downsample_layers = nn.ModuleList(
            ConvModule(
                inputs,
                outputs,
                2,
                stride=2,
                padding=0,
                norm=spec.norm,
                activation=RELU,
                same_pad=spec.same_pad,
            )
            for inputs, outputs in pairwise(spec.widths)
        )
        self.final_norm = make_norm(spec.norm, spec.widths[-1]) if spec.final_norm else nn.Identity()

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`, the last one normed; stops after the deepest of them.

        Raises:
            ValueError: images of another size than the one whose positions are mixed.
        """
        if tuple(images.shape[-2:]) != self.spec.image:
            raise ValueError(f"images must be {self.spec.image[0]}x{self.spec.image[1]}")
        maps, found, last = self.patch_embed(images), {}, len(self.stages) - 1
        for stage in range(deepest(nodes) + 1):
            maps = self.stages[stage](maps)
            maps = self.final_norm(maps) if stage == last else self.downsample_layers[stage](maps)
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """RepMLPNet has no `frozen_stages`; `norm_cfg.requires_grad` holds for the norms that it reaches."""
        inner = (".repmlp_block.", ".ffn_block.")
        names = [
            name
            for name, module in self.named_modules()
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and not any(part in name for part in inner)
        ]
        reached = names if freeze.all_norms else []
        return freeze_report(self, Freeze(), reached, norms_follow=False)


# --- mmpretrain.RepMLPNet = mmcls.RepMLPNet -------------------------------------------------------

MAX_STAGES = 6
Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
PatchSide = Annotated[int, Field(strict=True, ge=1, le=64)]
Kernel = Annotated[int, Field(strict=True, ge=1, le=31)]
Stages = Field(min_length=1, max_length=MAX_STAGES)


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[tuple[Width, ...], Stages]
    depths: Annotated[tuple[Count, ...], Stages]
    sharesets_nums: Annotated[tuple[Width, ...], Stages]

    def plan(self) -> Plan:
        """The neutral spelling."""
        return self.channels, self.depths, self.sharesets_nums


class NothingConfig(BaseModel):
    """A key of which only the empty object is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RepMLPNetConfig(SpecConfig):
    """`mmpretrain.RepMLPNet`, which is also `mmcls.RepMLPNet`: images of `img_size` only."""

    NETWORK: ClassVar[str] = "RepMLPNet"

    arch: Annotated[str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})]
    img_size: Pixels | tuple[Pixels, Pixels] = Field(224, description="The only size that images may have.")
    in_channels: InputChannels = 3
    patch_size: PatchSide | tuple[PatchSide, PatchSide] = 4
    out_indices: Indices = Field(
        (3,), description="Stages, each but the last after the convolution that halves it: 0 at stride 8."
    )
    reparam_conv_kernels: Annotated[tuple[Kernel, ...], Field(min_length=1, max_length=8)] | None = Field(
        (3,), description="Convolutions beside each linear layer; odd. null is none."
    )
    globalperceptron_ratio: Annotated[int, Field(strict=True, ge=1, le=1024)] = 4
    conv_cfg: ConvConfig | None = Field(None, description="Of the convolutions that halve the maps.")
    norm_cfg: NormConfig = Field(batch_norm(), description="Of all norms but those inside the blocks.")
    patch_cfg: NothingConfig = NothingConfig()
    final_norm: bool = Field(True, description="A norm on the output of the last stage.")
    deploy: bool = Field(
        False, description="Convolutions are in the linear layers, and so are their weights in the file."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        for key, given in (("depths", spec.depths), ("sharesets_nums", spec.sets)):
            if len(given) != len(spec.widths):
                yield f"arch/{key}", f"has {len(given)} entries for {len(spec.widths)} stages"
        yield from self._set_faults(spec)
        halved = range(len(spec.widths) - 1)
        if spec.same_pad and any(side % 2 for stage in halved for side in spec.grid(stage)):
            yield "conv_cfg/type", "padding makes a map larger than the one whose positions are mixed"
        if (fault := norm_fault(self.norm_cfg, spec.widths)) is not None:
            yield fault
        kernels = self.reparam_conv_kernels or ()
        if len(set(kernels)) < len(kernels) or any(kernel % 2 == 0 for kernel in kernels):
            yield "reparam_conv_kernels", "must be odd numbers, each once"

    def _set_faults(self, spec: RepMLPNetSpec) -> Iterator[tuple[str, str]]:
        for stage, (width, sets) in enumerate(zip(spec.widths, spec.sets, strict=False)):
            rows, columns = spec.grid(stage)
            if width % sets:
                yield f"arch/sharesets_nums/{stage}", f"{sets} sets do not divide {width} channels"
            if not 0 < rows * columns * sets <= MAX_VECTOR or rows * columns > MAX_VECTOR // 16:
                detail = f"stage {stage} has {rows}x{columns} positions in {sets} sets"
                yield (
                    "img_size",
                    f"{detail}; at least 1 position, at most {MAX_VECTOR // 16}, {MAX_VECTOR} in sets",
                )

    def spec(self) -> RepMLPNetSpec:
        """The neutral spelling."""
        arch, patch, image = self.arch, self.patch_size, self.image_size()
        return RepMLPNetSpec(
            *(ARCHS[arch] if isinstance(arch, str) else arch.plan()),
            image=image,
            patch=patch if isinstance(patch, tuple) else (patch, patch),
            kernels=() if self.deploy else self.reparam_conv_kernels or (),
            ratio=self.globalperceptron_ratio,
            norm=self.norm_cfg.spec(),
            in_channels=self.in_channels,
            final_norm=self.final_norm,
            deploy=self.deploy,
            same_pad=pads_same(self.conv_cfg),
        )

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


REPMLPNET = make_family(
    RepMLPNetConfig,
    RepMLPNet,
    example={"arch": "base", "img_size": 224, "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
)
