"""ConvNeXt and ConvNeXt V2 (Liu et al., arXiv:2201.03545; Woo et al., arXiv:2301.00808) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.norms import Eps
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    OpenMMLabConfig,
    Scale,
    deepest,
    frozen_by_stage,
    make_activation,
    make_family,
    named_arch,
)
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.checkpoints.layouts import Change, KeyLayout, Naming, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# blocks of the stages, width of the first; each stage doubles it
ARCHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    name: (blocks, tuple(width * 2**stage for stage in range(4)))
    for name, blocks, width in (
        ("atto", (2, 2, 6, 2), 40),
        ("femto", (2, 2, 6, 2), 48),
        ("pico", (2, 2, 6, 2), 64),
        ("nano", (2, 2, 8, 2), 80),
        ("tiny", (3, 3, 9, 3), 96),
        ("small", (3, 3, 27, 3), 96),
        ("base", (3, 3, 27, 3), 128),
        ("large", (3, 3, 27, 3), 192),
        ("xlarge", (3, 3, 27, 3), 256),
        ("huge", (3, 3, 27, 3), 352),
    )
}


@dataclass(frozen=True)
class ConvNeXtSpec:
    """What decides the numbers and the names of the weights.

    `outputs` are the stages with an output norm. `pooled` outputs are means over the map, normed after.
    `linear` is whether 1x1 convolutions are kept as matrices. `layer_scale` is 0 for none.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    outputs: tuple[int, ...]
    pooled: bool
    in_channels: int = 3
    patch: int = 4
    eps: float = 1e-6
    activation: ActivationSpec = ActivationSpec("gelu")  # noqa: RUF009 - frozen
    linear: bool = True
    response_norm: bool = False
    layer_scale: float = 1e-6

    def features(self) -> tuple[FeatureInfo, ...]:
        """One feature a stage."""
        return tuple(
            FeatureInfo(stage, str(stage), width, None, "NC")
            if self.pooled
            else FeatureInfo(stage, str(stage), width, self.patch * 2**stage, "NCHW")
            for stage, width in enumerate(self.widths)
        )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class GlobalResponseNorm(Scale):
    """Weighs each channel by its norm over the map, relative to the others (ConvNeXt V2); keys `gamma`, `beta`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def start(self) -> None:
        """Nothing is weighed at first."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        norms: Tensor = torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (maps * relative) + self.beta + maps


class Pointwise(nn.Conv2d):
    """A 1x1 convolution of maps with the channels last: the numbers of a linear layer, kept as mmpretrain does."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, h, w, inputs] to [n, h, w, outputs]."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class Block(Scale):
    """Filter each channel, norm, widen, project; keys `gamma`, `norm`, `grn` and those of `CONVOLUTIONS`."""

    CONVOLUTIONS: ClassVar[tuple[str, str, str]] = ("depthwise_conv", "pointwise_conv1", "pointwise_conv2")

    def __init__(self, spec: ConvNeXtSpec, width: int, kernel: int = 7) -> None:
        super().__init__()
        filtering, widening, narrowing = self.CONVOLUTIONS
        self.initial = spec.layer_scale
        self.gamma = nn.Parameter(torch.empty(width)) if spec.layer_scale > 0 else None
        self.add_module(filtering, nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width))
        self.norm = nn.LayerNorm(width, eps=spec.eps)
        self.add_module(widening, _pointwise(spec, width, 4 * width))
        self.act = make_activation(spec.activation)
        self.add_module(narrowing, _pointwise(spec, 4 * width, width))
        self.grn = GlobalResponseNorm(4 * width) if spec.response_norm else nn.Identity()

    def start(self) -> None:
        """The residual branch begins at the configured scale."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.initial)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        filter_each, widen, narrow = (getattr(self, name) for name in self.CONVOLUTIONS)
        mixed = self.norm(filter_each(maps).permute(0, 2, 3, 1))
        mixed = narrow(self.grn(self.act(widen(mixed))))
        mixed = mixed if self.gamma is None else mixed * self.gamma
        residual: Tensor = maps + mixed.permute(0, 3, 1, 2)
        return residual


def _pointwise(spec: ConvNeXtSpec, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs) if spec.linear else Pointwise(inputs, outputs, 1)


def _downsample(spec: ConvNeXtSpec, stage: int) -> nn.Sequential:
    width = spec.widths[stage]
    if stage == 0:
        stem = nn.Conv2d(spec.in_channels, width, spec.patch, stride=spec.patch)
        return nn.Sequential(stem, ChannelNorm(width, eps=spec.eps))
    before = spec.widths[stage - 1]
    return nn.Sequential(ChannelNorm(before, eps=spec.eps), nn.Conv2d(before, width, 2, stride=2))


class ConvNeXt(Backbone):
    """Stages that each end in a norm of their own, where they are asked for."""

    BLOCK: ClassVar[type[Block]] = Block

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.pooled = spec.pooled
        self.features = spec.features()
        stages = range(len(spec.widths))
        self.downsample_layers = nn.ModuleList(_downsample(spec, stage) for stage in stages)
        self.stages = nn.ModuleList(self.make_stage(spec, stage) for stage in stages)
        for stage in spec.outputs:
            self.add_module(f"norm{stage}", nn.LayerNorm(spec.widths[stage], eps=self.output_eps(spec)))

    def make_stage(self, spec: ConvNeXtSpec, stage: int) -> nn.Sequential:
        """The blocks of a stage."""
        return nn.Sequential(*(self.BLOCK(spec, spec.widths[stage]) for _ in range(spec.blocks[stage])))

    def output_eps(self, spec: ConvNeXtSpec) -> float:
        """What the norms of the outputs add to a variance."""
        return spec.eps

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Features of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for stage in range(deepest(nodes) + 1):
            maps = self.run_stage(stage, maps)
            if str(stage) in nodes:
                found[str(stage)] = self._output(stage, maps)
        return {node: found[node] for node in nodes}

    def run_stage(self, stage: int, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the map of a stage."""
        mixed: Tensor = self.stages[stage](self.downsample_layers[stage](maps))
        return mixed

    def _output(self, stage: int, maps: Tensor) -> Tensor:
        norm = getattr(self, f"norm{stage}")
        if self.pooled:
            pooled: Tensor = norm(maps.mean((2, 3)))
            return pooled
        normed: Tensor = norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return normed

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the first k stages with their downsampling; output norms never."""
        return frozen_by_stage(self, freeze, first_stages)


def first_stages(count: int) -> list[str]:
    """The modules of the first stages, each with the downsampling before it."""
    return [f"{part}.{stage}" for part in ("downsample_layers", "stages") for stage in range(count)]


# --- mmpretrain.ConvNeXt = mmcls.ConvNeXt ---------------------------------------------------------

Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
Blocks = Annotated[int, Field(strict=True, ge=1, le=64)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depths: tuple[Blocks, ...] = Field(min_length=1, max_length=8)
    channels: tuple[Width, ...] = Field(min_length=1, max_length=8)


class NormConfig(BaseModel):
    """OpenMMLab's `norm_cfg` for ConvNeXt: a layer norm over the channels of a map."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["LN2d", "LN"]
    requires_grad: bool = Field(True, description="False freezes weight and bias of every norm layer.")
    eps: Eps = 1e-5


class ConvNeXtConfig(OpenMMLabConfig):
    """`mmpretrain.ConvNeXt`, which is also `mmcls.ConvNeXt`."""

    NETWORK: ClassVar[str] = "ConvNeXt"

    arch: Annotated[
        str | ArchConfig,
        named_arch(ARCHS, fold=False),
        Field(json_schema_extra={"examples": list(ARCHS)}),
    ] = "tiny"
    in_channels: InputChannels = 3
    stem_patch_size: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    norm_cfg: NormConfig = NormConfig(type="LN2d", eps=1e-6)
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    linear_pw_conv: bool = Field(True, description="Keeps 1x1 convolutions as matrices in the checkpoint.")
    use_grn: bool = Field(False, description="ConvNeXt V2's global response norm.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = Field(
        1e-6, description="0 leaves the layer scale out, as ConvNeXt V2 does."
    )
    out_indices: Indices = Field((-1,), description="Stages, 0 at stride 4; each has a norm of its own.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=8)] = Field(
        0, description="k freezes the first k stages with their downsampling; 0 nothing."
    )
    gap_before_final_norm: bool = Field(
        True, description="True returns vectors: means over the map, normed. False returns normed maps."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if isinstance(self.arch, ArchConfig) and len(self.arch.depths) != len(self.arch.channels):
            yield "arch/channels", f"{len(self.arch.channels)} widths for {len(self.arch.depths)} stages"
        stages = len(self.depths_and_widths()[0])
        if self.frozen_stages > stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {stages} stages"

    def depths_and_widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks and channels of the stages."""
        if isinstance(self.arch, str):
            return ARCHS[self.arch]
        return self.arch.depths, self.arch.channels

    def _is_pooled(self) -> bool:
        # Who asks for maps by their stride wants maps, unless something else is said.
        unsaid = "gap_before_final_norm" not in self.model_fields_set
        return self.gap_before_final_norm and not (self.strides is not None and unsaid)

    def spec(self) -> ConvNeXtSpec:
        """The neutral spelling."""
        blocks, widths = self.depths_and_widths()
        strides = tuple(self.stem_patch_size * 2**stage for stage in range(len(widths)))
        return ConvNeXtSpec(
            blocks=blocks,
            widths=widths,
            outputs=asked_stages(self.out_indices, self.strides, strides),
            pooled=self._is_pooled(),
            in_channels=self.in_channels,
            patch=self.stem_patch_size,
            eps=self.norm_cfg.eps,
            activation=self.act_cfg.spec(),
            linear=self.linear_pw_conv,
            response_norm=self.use_grn,
            layer_scale=self.layer_scale_init_value,
        )


def _optional(config: ConvNeXtConfig, state: StateDict) -> Callable[[str], bool]:
    return may_lack_output_norms(state, last=len(config.depths_and_widths()[0]) - 1)


EXAMPLE: dict[str, Any] = {"arch": "tiny", "out_indices": [1, 2, 3], "gap_before_final_norm": False}


def _blocks(theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {
        f"stages.{{s}}.{{b}}.{part}.{{leaf}}": f"{theirs}{named}.{{leaf}}" for part, named in parts.items()
    }


_SCALE = Change(to_ours=Tensor.flatten, to_theirs=lambda scale: scale.reshape(-1, 1, 1))
_TORCHVISION_PARTS = {"depthwise_conv": "0", "norm": "2", "pointwise_conv1": "3", "pointwise_conv2": "5"}
_TIMM_PARTS = {
    "depthwise_conv": "conv_dw",
    "norm": "norm",
    "pointwise_conv1": "mlp.fc1",
    "pointwise_conv2": "mlp.fc2",
}
_OFFICIAL_PARTS = {
    "depthwise_conv": "dwconv",
    "norm": "norm",
    "pointwise_conv1": "pwconv1",
    "pointwise_conv2": "pwconv2",
}
CONVNEXT_NAMES = Naming(
    "ConvNeXt",
    own=("mmpretrain",),
    marks=(
        "downsample_layers.0.0.weight",
        "stages.0.0.depthwise_conv.weight",
        "stages.0.0.pointwise_conv2.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "downsample_layers.0.{i}.{leaf}": "stem.{i}.{leaf}",
                    "downsample_layers.{s}.{i}.{leaf}": "stages.{s}.downsample.{i}.{leaf}",
                    "stages.{s}.{b}.gamma": "stages.{s}.blocks.{b}.gamma",
                    "stages.{s}.{b}.grn.gamma": "stages.{s}.blocks.{b}.mlp.grn.weight",
                    "stages.{s}.{b}.grn.beta": "stages.{s}.blocks.{b}.mlp.grn.bias",
                    **_blocks("stages.{s}.blocks.{b}.", _TIMM_PARTS),
                    "norm3.{leaf}": "head.norm.{leaf}",
                }
            ),
        ),
        KeyLayout(
            "official",
            rules(
                {
                    "downsample_layers.{rest}": "downsample_layers.{rest}",
                    "stages.{s}.{b}.gamma": "stages.{s}.{b}.gamma",
                    "stages.{s}.{b}.grn.{leaf}": "stages.{s}.{b}.grn.{leaf}",
                    **_blocks("stages.{s}.{b}.", _OFFICIAL_PARTS),
                    "norm3.{leaf}": "norm.{leaf}",
                }
            ),
        ),
        KeyLayout(
            "torchvision",
            (
                *rules(
                    {f"stages.{s}.{{b}}.gamma": f"features.{2 * s + 1}.{{b}}.layer_scale" for s in range(4)},
                    _SCALE,
                ),
                *rules(
                    {
                        "norm3.{leaf}": "classifier.0.{leaf}",
                        **{
                            f"downsample_layers.{s}.{{i}}.{{leaf}}": f"features.{2 * s}.{{i}}.{{leaf}}"
                            for s in range(4)
                        },
                        **{
                            f"stages.{s}.{{b}}.{part}.{{leaf}}": f"features.{2 * s + 1}.{{b}}.block.{named}.{{leaf}}"
                            for s in range(4)
                            for part, named in _TORCHVISION_PARTS.items()
                        },
                    }
                ),
            ),
        ),
    ),
)


CONVNEXT = make_family(
    ConvNeXtConfig,
    ConvNeXt,
    example=EXAMPLE,
    architectures=tuple(ARCHS),
    optional=_optional,
    naming=CONVNEXT_NAMES,
)
