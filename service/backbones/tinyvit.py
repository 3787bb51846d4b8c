"""TinyViT (Wu et al., arXiv:2207.10666) with mmpretrain's key names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.freezing import freeze_report, in_module_order
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Computed,
    Scale,
    SpecConfig,
    deepest,
    make_activation,
    make_family,
    named_arch,
)
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.backbones.swin import cut_windows, join_windows
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

GELU = ActivationSpec("gelu")
# channels, heads and blocks of the stages; the first stage has no attention
Plan = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
DEPTHS = (2, 2, 6, 2)
ARCHS: dict[str, Plan] = {
    "5m": ((64, 128, 160, 320), (2, 4, 5, 10), DEPTHS),
    "11m": ((64, 128, 256, 448), (2, 4, 8, 14), DEPTHS),
    "21m": ((96, 192, 384, 576), (3, 6, 12, 18), DEPTHS),
}


@dataclass(frozen=True)
class TinyViTSpec:
    """What decides the numbers and the names of the weights; images are made for `image` [height, width].

    `outputs` are the stages with an output norm; `pooled` ones are the mean of a map, normed.
    """

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    windows: tuple[int, ...]
    outputs: tuple[int, ...]
    pooled: bool
    image: tuple[int, int]
    activation: ActivationSpec
    in_channels: int = 3
    mlp_ratio: float = 4.0
    expansion: float = 4.0
    local_kernel: int = 3
    eps: float = 1e-5

    def grid(self, stage: int) -> tuple[int, int]:
        """(rows, columns) of the map that a stage works on."""
        return self.image[0] // 4 // 2**stage, self.image[1] // 4 // 2**stage

    def after(self, stage: int) -> int:
        """The stage whose map and channels a stage's output has: the next one, for all but the last."""
        return min(stage + 1, len(self.widths) - 1)

    def features(self) -> tuple[FeatureInfo, ...]:
        """One output a stage, after the convolutions that halve its map."""
        found = []
        for stage, stride in enumerate(output_strides(len(self.widths))):
            width = self.widths[self.after(stage)]
            kind = (None, "NC") if self.pooled else (stride, "NCHW")
            found.append(FeatureInfo(stage, str(stage), width, *kind))
        return tuple(found)


def output_strides(stages: int) -> list[int]:
    """Strides of the outputs: nothing halves the last map."""
    return [4 * 2 ** min(stage + 1, stages - 1) for stage in range(stages)]


def conv_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm; keys `conv2d`, `bn2d`."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(conv2d=convolution, bn2d=nn.BatchNorm2d(outputs)))


class PatchEmbed(nn.Module):
    """Two strided convolutions; keys `seq.0`, `seq.2`."""

    def __init__(self, spec: TinyViTSpec) -> None:
        super().__init__()
        width = spec.widths[0]
        self.seq = nn.Sequential(
            conv_norm(spec.in_channels, width // 2, 3, stride=2),
            nn.GELU(),
            conv_norm(width // 2, width, 3, stride=2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, h / 4, w / 4]."""
        embedded: Tensor = self.seq(images)
        return embedded


class ThreeConvolutions(nn.Module):
    """A depthwise convolution between two 1x1 ones; keys `conv1`, `conv2`, `conv3`."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, activation: ActivationSpec, *, stride: int
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, hidden, 1)
        self.conv2 = conv_norm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3 = conv_norm(hidden, outputs, 1)
        self.act = make_activation(activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        filtered: Tensor = self.conv3(self.act(self.conv2(self.act(self.conv1(maps)))))
        return filtered


class ConvBlock(ThreeConvolutions):
    """The same with a residual; its activation is always GELU."""

    def __init__(self, spec: TinyViTSpec) -> None:
        width = spec.widths[0]
        super().__init__(width, int(width * spec.expansion), width, GELU, stride=1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        activated: Tensor = self.act(super().forward(maps) + maps)
        return activated


class Attention(Scale, Computed):
    """Attention in a window with a learnt bias for each distance; keys `norm`, `qkv`, `proj`, `attention_biases`."""

    attention_bias_idxs: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.attention_biases = nn.Parameter(torch.empty(heads, window**2))
        index = torch.empty(window**2, window**2, dtype=torch.long)
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """No biases at first."""
        nn.init.zeros_(self.attention_biases)

    def compute(self) -> None:
        """The index of the bias of each pair of positions, by how far apart they are down and across."""
        positions = torch.arange(self.window**2)
        rows, columns = positions // self.window, positions % self.window
        down = (rows[:, None] - rows[None, :]).abs()
        across = (columns[:, None] - columns[None, :]).abs()
        self.attention_bias_idxs.copy_(down * self.window + across)

    def forward(self, windows: Tensor) -> Tensor:
        """[windows, window², c] to the same shape."""
        count, length, width = windows.shape
        # the query, the key and the value of a head follow each other
        qkv = self.qkv(self.norm(windows)).reshape(count, length, self.heads, 3, width // self.heads)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        bias = self.attention_biases[:, self.attention_bias_idxs].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, length, width))
        return projected


class FeedForward(nn.Module):
    """A norm and two linear layers; keys `norm`, `fc1`, `fc2`."""

    def __init__(self, width: int, hidden: int, activation: ActivationSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.act = make_activation(activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        mixed: Tensor = self.fc2(self.act(self.fc1(self.norm(maps))))
        return mixed


class AttentionBlock(nn.Module):
    """Attention, a depthwise convolution, feed-forward; keys `attn`, `mlp`, `local_conv`."""

    def __init__(self, spec: TinyViTSpec, stage: int) -> None:
        super().__init__()
        width, self.window = spec.widths[stage], spec.windows[stage]
        self.attn = Attention(width, spec.heads[stage], self.window)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), spec.activation)
        self.local_conv = conv_norm(width, width, spec.local_kernel, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        tokens = maps.permute(0, 2, 3, 1)
        tokens = tokens + self._attend(tokens)
        local = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = local + self.mlp(local)
        return mixed.permute(0, 3, 1, 2)

    def _attend(self, tokens: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape; pads right and bottom to whole windows."""
        height, width = tokens.shape[1:3]
        padded = F.pad(tokens, (0, 0, 0, -width % self.window, 0, -height % self.window))
        windows = self.attn(cut_windows(padded, self.window))
        return join_windows(windows, self.window, *padded.shape[1:3])[:, :height, :width]


class Stage(nn.Module):
    """Blocks, then the convolutions that halve the map, but for the last stage; keys `blocks`, `downsample`."""

    def __init__(self, spec: TinyViTSpec, stage: int) -> None:
        super().__init__()
        width, after = spec.widths[stage], spec.after(stage)
        self.blocks = nn.Sequential(
            *(
                ConvBlock(spec) if stage == 0 else AttentionBlock(spec, stage)
                for _ in range(spec.depths[stage])
            )
        )
        outputs = spec.widths[after]
        self.downsample = (
            nn.Identity()
            if after == stage
            else ThreeConvolutions(width, outputs, outputs, spec.activation, stride=2)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the map of the next stage."""
        halved: Tensor = self.downsample(self.blocks(maps))
        return halved


class TinyViT(Backbone):
    """Keys `patch_embed`, `stages` and, of the outputs, `norm0`, `norm1`, …."""

    def __init__(self, spec: TinyViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.patch_embed = PatchEmbed(spec)
        self.stages = nn.ModuleList()
        for stage in range(len(spec.widths)):
            self.stages.append(Stage(spec, stage))
            if stage in spec.outputs:
                norm = nn.LayerNorm(spec.widths[spec.after(stage)], eps=spec.eps)
                self.add_module(f"norm{stage}", norm)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the stages in `nodes`, [n, c, h, w], or [n, c] pooled; stops after the deepest of them.

        Raises:
            ValueError: a map is not what the stage after it is made for.
        """
        maps, found = self.patch_embed(images), {}
        for stage in range(deepest(nodes) + 1):
            maps = self.stages[stage](maps)
            grid = self.spec.grid(self.spec.after(stage))
            if tuple(maps.shape[-2:]) != grid:
                raise ValueError(f"the map after stage {stage} must be {grid[0]}x{grid[1]}")
            if str(stage) in nodes:
                found[str(stage)] = self._output(stage, maps)
        return {node: found[node] for node in nodes}

    def _output(self, stage: int, maps: Tensor) -> Tensor:
        tokens = maps.permute(0, 2, 3, 1)
        normed: Tensor = getattr(self, f"norm{stage}")(tokens.mean((1, 2)) if self.spec.pooled else tokens)
        return normed if self.spec.pooled else normed.permute(0, 3, 1, 2).contiguous()

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the first k stages; neither the patch embedding nor an output norm is ever frozen."""
        stages = freeze_report(
            self, Freeze(freeze.stages), [f"stages.{i}" for i in range(freeze.stages or 0)]
        )
        outputs = [f"norm{stage}.{leaf}" for stage in self.spec.outputs for leaf in ("weight", "bias")]
        reached = outputs if freeze.all_norms else []
        return in_module_order(self, freeze, (*stages.parameters, *reached), stages.norms)


# --- mmpretrain.TinyViT = mmcls.TinyViT -----------------------------------------------------------

MAX_STAGES = 6
Stages = Field(min_length=2, max_length=MAX_STAGES)
Small = Annotated[int, Field(strict=True, ge=1, le=64)]
Width = Annotated[int, Field(strict=True, ge=2, le=4096)]
Pixels = Annotated[int, Field(strict=True, ge=4, le=4096)]
Ratio = Annotated[float, Field(ge=0.25, le=16)]


class ArchConfig(BaseModel):
    """An `arch` spelled out, one entry a stage; the first stage has no attention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[tuple[Width, ...], Stages]
    num_heads: Annotated[tuple[Small, ...], Stages]
    depths: Annotated[tuple[Small, ...], Stages]

    def plan(self) -> Plan:
        """The neutral spelling."""
        return self.channels, self.num_heads, self.depths


class TinyViTConfig(SpecConfig):
    """`mmpretrain.TinyViT`, which is also `mmcls.TinyViT`: images of `img_size` only."""

    NETWORK: ClassVar[str] = "TinyViT"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "5m"
    img_size: tuple[Pixels, Pixels] = Field(
        (224, 224),
        description="[height, width] of the images; only those that give maps of its size are taken.",
    )
    window_size: Annotated[tuple[Small, ...], Stages] = Field(
        (7, 7, 14, 7), description="One a stage; that of the first changes nothing."
    )
    in_channels: InputChannels = 3
    mlp_ratio: Ratio = 4.0
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    use_checkpoint: bool = Field(False, description="Saves memory in training; changes nothing here.")
    mbconv_expand_ratio: Ratio = 4.0
    local_conv_size: Annotated[int, Field(strict=True, ge=1, le=31)] = Field(3, description="Odd.")
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Training only.")
    out_indices: Indices = Field(
        (-1,), description="Stages, each but the last after the convolutions that halve it: 0 at stride 8."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=MAX_STAGES)] = Field(
        0, description="k freezes the first k stages; the patch embedding is never frozen."
    )
    gap_before_final_norm: bool = Field(
        True, description="Outputs are means of maps; by strides maps are returned unless it is set."
    )
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    norm_cfg: LayerNormConfig = Field(LayerNormConfig(type="LN"), description="Of the outputs.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        widths, heads, depths = self.plan()
        for key, given in (("arch/num_heads", heads), ("arch/depths", depths)):
            if len(given) != len(widths):
                yield key, f"has {len(given)} entries for {len(widths)} stages"
        if len(self.window_size) < len(widths):
            yield "window_size", f"has {len(self.window_size)} entries for {len(widths)} stages"
        for width, count in zip(widths[1:], heads[1:], strict=False):
            if width % count:
                yield "arch/num_heads", f"{count} heads do not divide {width} channels"
        if self.local_conv_size % 2 == 0:
            yield "local_conv_size", "must be odd"
        if self.frozen_stages > len(widths):
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(widths)} stages"

    def plan(self) -> Plan:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()

    def spec(self) -> TinyViTSpec:
        """The neutral spelling."""
        widths, heads, depths = self.plan()
        return TinyViTSpec(
            widths,
            heads,
            depths,
            windows=self.window_size[: len(widths)],
            outputs=self._outputs(output_strides(len(widths))),
            pooled=self._is_pooled(),
            image=self.img_size,
            activation=self.act_cfg.spec(),
            in_channels=self.in_channels,
            mlp_ratio=self.mlp_ratio,
            expansion=self.mbconv_expand_ratio,
            local_kernel=self.local_conv_size,
            eps=self.norm_cfg.eps,
        )

    def _is_pooled(self) -> bool:
        unsaid = "gap_before_final_norm" not in self.model_fields_set
        return self.gap_before_final_norm and not (self.strides is not None and unsaid)

    def _outputs(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Stages with an output norm; of two stages of a stride the deeper is the one that it names."""
        if self.strides is None:
            return asked_stages(self.out_indices, None, strides)
        deepest_of = {stride: stage for stage, stride in enumerate(strides)}
        return tuple(stage for stride, stage in deepest_of.items() if stride in self.strides)

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages, all_norms=not self.norm_cfg.requires_grad)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.img_size)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def may_lack_norms(config: TinyViTConfig, state: StateDict) -> Callable[[str], bool]:
    """A classifier's file has the norm of the last stage only; the others start at 1 and 0."""
    return may_lack_output_norms(state, last=len(config.plan()[0]) - 1)


TINYVIT = make_family(
    TinyViTConfig,
    TinyViT,
    example={"arch": "5m", "out_indices": [0, 1, 2, 3], "gap_before_final_norm": False},
    architectures=tuple(ARCHS),
    optional=may_lack_norms,
)
