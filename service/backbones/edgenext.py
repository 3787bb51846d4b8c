"""EdgeNeXt (Maaz et al., arXiv:2206.10589) with mmpretrain's key names: ConvNeXt with attention among channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import DropRate, Indices, InputChannels, levels_by_index
from service.backbones.convnext import Block, ConvNeXt, ConvNeXtSpec
from service.backbones.freezing import in_module_order, is_under, norm_names
from service.backbones.norms import Eps
from service.backbones.openmmlab import ActivationConfig, Scale, SpecConfig, make_family, named_arch
from service.backbones.output_norms import asked_stages, may_lack_output_norms
from service.backbones.tracing import is_tracing
from service.config.spec import Description, Freeze, FreezeReport, Level

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

WAVES = 32  # sines and cosines a coordinate
TEMPERATURE = 10000.0
STRIDES = (4, 8, 16, 32)
STAGES = len(STRIDES)

Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Widths = tuple[Width, Width, Width, Width]
Counts = tuple[Count, Count, Count, Count]
Globals = Annotated[int, Field(strict=True, ge=0, le=64)]
Kernel = Annotated[int, Field(strict=True, ge=1, le=31)]
GlobalType = Literal["None", "SDTA"]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Widths
    depths: Counts
    num_heads: Counts


def _arch(channels: Widths, depths: Counts, heads: int) -> ArchConfig:
    return ArchConfig(channels=channels, depths=depths, num_heads=(heads,) * STAGES)


ARCHS: dict[str, ArchConfig] = {
    "xxsmall": _arch((24, 48, 88, 168), (2, 2, 6, 2), 4),
    "xsmall": _arch((32, 64, 100, 192), (3, 3, 9, 3), 4),
    "small": _arch((48, 96, 160, 304), (3, 3, 9, 3), 8),
    "base": _arch((80, 160, 288, 584), (3, 3, 9, 3), 8),
}


@dataclass(frozen=True)
class StageSpec:
    """What the stages differ in beside their widths.

    The last `encoders` blocks see the whole map, `heads` at a time, after `scales - 1` of the `scales` parts of their
    channels were filtered; `positions` is whether they know where they are.
    """

    kernel: int
    encoders: int
    scales: int
    heads: int
    positions: bool


@dataclass(frozen=True)
class EdgeNeXtSpec(ConvNeXtSpec):
    """What decides the numbers and the names of the weights."""

    stages: tuple[StageSpec, ...] = ()
    positions: bool = False
    mlp_ratio: int = 4


class FourierPositions(nn.Module):
    """Where a position lies in its map, by sines and cosines; key `proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * WAVES, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to what is added to it, [1, width, h, w]."""
        rows, columns = (self._waves(side, maps) for side in maps.shape[2:])
        size = (-1, *maps.shape[2:])
        waves = torch.cat((rows[:, :, None].expand(size), columns[:, None, :].expand(size)))
        # OpenVINO adds within the convolution, and would take what is added to for one image as well.
        images = maps.shape[0] if is_tracing() else 1
        projected: Tensor = self.proj(waves.expand(images, -1, -1, -1).to(maps.dtype))
        return projected

    @staticmethod
    def _waves(side: int, like: Tensor) -> Tensor:
        """[waves, side]: sine and cosine in turn, each pair of another length."""
        steps = torch.arange(1, side + 1, device=like.device, dtype=torch.float32)
        angles = steps / (side + 1e-6) * (2 * math.pi)
        pairs = torch.arange(WAVES, device=like.device, dtype=torch.float32).div(2, rounding_mode="floor")
        scaled = angles[None, :] / (TEMPERATURE ** (2 * pairs / WAVES))[:, None]
        return torch.stack((scaled[0::2].sin(), scaled[1::2].cos()), dim=1).flatten(0, 1)


class ChannelAttention(Scale):
    """Self-attention among the channels of a head by cosine; keys `scale`, `qkv`, `proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """Cosines count as they are at first."""
        nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        n, length, width = tokens.shape
        query, key, value = (
            self.qkv(tokens).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        )
        cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        mixed = (cosines * self.scale).softmax(dim=-1) @ value
        projected: Tensor = self.proj(mixed.permute(0, 3, 1, 2).reshape(n, length, width))
        return projected


class Encoder(Scale):
    """Filters part after part of the channels, then attends among them and widens.

    Keys `gamma_csa`, `gamma`, `conv_modules`, `pos_embed`, `norm_csa`, `csa`, `norm`, `pointwise_conv1`, ….
    """

    def __init__(self, width: int, stage: StageSpec, mlp_ratio: int) -> None:
        super().__init__()
        self.part = math.ceil(width / stage.scales)
        self.gamma_csa = nn.Parameter(torch.empty(width))
        self.gamma = nn.Parameter(torch.empty(width))
        self.conv_modules = nn.ModuleList(
            nn.Conv2d(self.part, self.part, 3, padding=1, groups=self.part) for _ in range(stage.scales - 1)
        )
        self.pos_embed = FourierPositions(width) if stage.positions else None
        self.norm_csa = nn.LayerNorm(width)
        self.csa = ChannelAttention(width, stage.heads)
        self.norm = nn.LayerNorm(width)
        self.pointwise_conv1 = nn.Linear(width, mlp_ratio * width)
        self.pointwise_conv2 = nn.Linear(mlp_ratio * width, width)

    def start(self) -> None:
        """The branches begin small."""
        nn.init.constant_(self.gamma_csa, 1e-6)
        nn.init.constant_(self.gamma, 1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed = self._filtered(maps)
        if self.pos_embed is not None:
            mixed = mixed + self.pos_embed(mixed)
        tokens = mixed.flatten(2).transpose(1, 2)
        tokens = tokens + self.gamma_csa * self.csa(self.norm_csa(tokens))
        wide = F.gelu(self.pointwise_conv1(self.norm(tokens)))
        projected = self.gamma * self.pointwise_conv2(wide)
        residual: Tensor = maps + projected.transpose(1, 2).reshape(maps.shape)
        return residual

    def _filtered(self, maps: Tensor) -> Tensor:
        """Each part sees what was filtered of the one before; the last one passes."""
        parts = [maps[:, start : start + self.part] for start in range(0, maps.shape[1], self.part)]
        filtered: list[Tensor] = []
        for convolution, part in zip(self.conv_modules, parts[:-1], strict=True):
            filtered.append(convolution(filtered[-1] + part if filtered else part))
        return torch.cat((*filtered, parts[-1]), dim=1)


class EdgeNeXt(ConvNeXt):
    """A ConvNeXt whose stages end in encoders; key `pos_embed` where the whole network knows where it is."""

    def __init__(self, spec: EdgeNeXtSpec) -> None:
        super().__init__(spec)
        self.pos_embed = FourierPositions(spec.widths[0]) if spec.positions else None
        # As the library orders its modules.
        for name in ("downsample_layers", "stages", *(f"norm{stage}" for stage in spec.outputs)):
            self.add_module(name, self._modules.pop(name))

    def make_stage(self, spec: ConvNeXtSpec, stage: int) -> nn.Sequential:
        """Convolutional blocks, then encoders."""
        if not isinstance(spec, EdgeNeXtSpec):
            raise TypeError("an EdgeNeXt is made of an EdgeNeXtSpec")
        own, width, count = spec.stages[stage], spec.widths[stage], spec.blocks[stage]
        encoders = min(own.encoders, count)
        blocks: list[nn.Module] = [Block(spec, width, own.kernel) for _ in range(count - encoders)]
        blocks += [Encoder(width, own, spec.mlp_ratio) for _ in range(encoders)]
        return nn.Sequential(*blocks)

    def output_eps(self, spec: ConvNeXtSpec) -> float:
        """`norm_cfg` is not of the norms of vectors."""
        return 1e-5 if spec.pooled else spec.eps

    def run_stage(self, stage: int, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the map of a stage."""
        maps = super().run_stage(stage, maps)
        return maps + self.pos_embed(maps) if self.pos_embed is not None and stage == 0 else maps

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """ConvNeXt's rule; what `norm_cfg` freezes are neither the encoders' norms nor those of vectors."""
        report = super().frozen(replace(freeze, all_norms=False))
        if not freeze.all_norms:
            return report
        encoders = [name for name, module in self.named_modules() if isinstance(module, Encoder)]
        outputs = [name for name in norm_names(self) if self.pooled and "." not in name]
        norms = [name for name in norm_names(self) if not is_under(name, (*encoders, *outputs))]
        names = [name for name, _ in self.named_parameters() if is_under(name, norms)]
        return in_module_order(self, freeze, (*report.parameters, *names), report.norms)


# --- mmpretrain.EdgeNeXt = mmcls.EdgeNeXt ---------------------------------------------------------


class NormConfig(BaseModel):
    """OpenMMLab's `norm_cfg` for EdgeNeXt: a layer norm over the channels of a map."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["LN2d"]
    requires_grad: bool = Field(
        True, description="False freezes the norms of the convolutional blocks and of maps."
    )
    eps: Eps = 1e-5


class EdgeNeXtConfig(SpecConfig):
    """`mmpretrain.EdgeNeXt`, which is also `mmcls.EdgeNeXt`."""

    NETWORK: ClassVar[str] = "EdgeNeXt"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "xxsmall"
    in_channels: InputChannels = 3
    global_blocks: tuple[Globals, Globals, Globals, Globals] = Field(
        (0, 1, 1, 1), description="How many blocks at the end of each stage see the whole map."
    )
    global_block_type: Annotated[tuple[GlobalType, ...], Field(max_length=16)] = Field(
        ("None", "SDTA", "SDTA", "SDTA"), description="The library reads it nowhere; changes nothing."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = Field(
        1e-6, description="Of the convolutional blocks; 0 leaves their scale out."
    )
    linear_pw_conv: bool = Field(True, description="Keeps 1x1 convolutions as matrices in the checkpoint.")
    mlp_ratio: Annotated[int, Field(strict=True, ge=1, le=16)] = Field(
        4, description="Of the blocks that see the whole map."
    )
    conv_kernel_sizes: tuple[Kernel, Kernel, Kernel, Kernel] = (3, 5, 7, 9)
    use_pos_embd_csa: tuple[bool, bool, bool, bool] = (False, True, False, False)
    use_pos_embd_global: bool = False
    d2_scales: Counts = (2, 2, 3, 4)
    norm_cfg: NormConfig = NormConfig(type="LN2d", eps=1e-6)
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    out_indices: Indices = Field((-1,), description="Stages, 0 at stride 4; each has a norm of its own.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=STAGES)] = Field(
        0, description="k freezes the first k stages with their downsampling; 0 nothing."
    )
    gap_before_final_norm: bool = Field(
        True, description="True returns vectors: means over the map, normed. False returns normed maps."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for index, (width, stage) in enumerate(zip(self.plan().channels, self.stages(), strict=True)):
            if stage.kernel % 2 == 0 and stage.encoders < self.plan().depths[index]:
                yield f"conv_kernel_sizes/{index}", f"{stage.kernel} is even"
            if not stage.encoders:
                continue
            if width % stage.heads:
                yield f"arch/num_heads/{index}", f"{stage.heads} heads do not divide {width} channels"
            if stage.scales < 2 or (stage.scales - 1) * math.ceil(width / stage.scales) >= width:
                yield f"d2_scales/{index}", f"{width} channels do not make {stage.scales} parts; 2 at least"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def stages(self) -> tuple[StageSpec, ...]:
        """The stages' own."""
        own = (self.conv_kernel_sizes, self.global_blocks, self.d2_scales, self.plan().num_heads)
        return tuple(StageSpec(*values) for values in zip(*own, self.use_pos_embd_csa, strict=True))

    def spec(self) -> EdgeNeXtSpec:
        """The neutral spelling."""
        arch = self.plan()
        return EdgeNeXtSpec(
            blocks=arch.depths,
            widths=arch.channels,
            outputs=asked_stages(self.out_indices, self.strides, STRIDES),
            pooled=self._is_pooled(),
            in_channels=self.in_channels,
            eps=self.norm_cfg.eps,
            activation=self.act_cfg.spec(),
            linear=self.linear_pw_conv,
            layer_scale=self.layer_scale_init_value,
            stages=self.stages(),
            positions=self.use_pos_embd_global,
            mlp_ratio=self.mlp_ratio,
        )

    def _is_pooled(self) -> bool:
        # Who asks for maps by their stride wants maps, unless something else is said.
        unsaid = "gap_before_final_norm" not in self.model_fields_set
        return self.gap_before_final_norm and not (self.strides is not None and unsaid)

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages=stages, all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def _optional(config: EdgeNeXtConfig, state: StateDict) -> Callable[[str], bool]:  # noqa: ARG001 - four stages
    return may_lack_output_norms(state, last=STAGES - 1)


EXAMPLE: dict[str, Any] = {"arch": "xxsmall", "out_indices": [1, 2, 3], "gap_before_final_norm": False}
EDGENEXT = make_family(
    EdgeNeXtConfig, EdgeNeXt, example=EXAMPLE, architectures=tuple(ARCHS), optional=_optional
)
