"""EfficientFormer (Li et al., arXiv:2206.01191) with mmpretrain's key names: pooling, and attention at the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.norms import BATCH_NORM, GroupNorm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Computed,
    ConvModule,
    Scale,
    SpecConfig,
    deepest,
    frozen_by_stage,
    make_activation,
    make_family,
    named_arch,
)
from service.backbones.output_norms import asked_stages
from service.backbones.poolformer import Pooling
from service.backbones.vision_transformer import LayerScale
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import InvalidConfig

STAGES = 4
HEADS, KEY_WIDTH, VALUE_WIDTH = 8, 32, 128
SIDE = 7  # of the last map: the attention has biases for 7x7 positions
MAP_RATIO = 4  # of the feed-forward networks on maps
LAYER_SCALE = 1e-5
RELU, NO_ACTIVATION = ActivationSpec("relu"), ActivationSpec("none")

Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Width = Annotated[int, Field(strict=True, ge=2, le=4096)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[Count, Count, Count, Count]
    embed_dims: tuple[Width, Width, Width, Width]
    downsamples: tuple[bool, bool, bool, bool]
    vit_num: Annotated[int, Field(strict=True, ge=0, le=64)]


HALVING = (False, True, True, True)
ARCHS: dict[str, ArchConfig] = {
    "l1": ArchConfig(layers=(3, 2, 6, 4), embed_dims=(48, 96, 224, 448), downsamples=HALVING, vit_num=1),
    "l3": ArchConfig(layers=(4, 4, 12, 6), embed_dims=(64, 128, 320, 512), downsamples=HALVING, vit_num=4),
    "l7": ArchConfig(layers=(6, 6, 18, 8), embed_dims=(96, 192, 384, 768), downsamples=HALVING, vit_num=8),
}


@dataclass(frozen=True)
class EfficientFormerSpec:
    """What decides the numbers and the names of the weights.

    The last `attending` blocks work on tokens, which come out as a map where `reshapes`. `outputs` are the stages with
    an output norm.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    halves: tuple[bool, ...]
    attending: int
    outputs: tuple[int, ...]
    reshapes: bool = False
    pool: int = 3
    mlp_ratio: float = 4.0
    activation: ActivationSpec = ActivationSpec("gelu")  # noqa: RUF009 - frozen
    layer_scale: bool = True
    in_channels: int = 3

    @property
    def gives_tokens(self) -> bool:
        """Whether the last stage gives tokens, channels first."""
        return self.attending > 0 and not self.reshapes

    def strides(self) -> tuple[int, ...]:
        """Of the maps of the stages."""
        return tuple(4 * 2**halvings for halvings in itertools.accumulate(self.halves))

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage, or tokens from the last."""
        *maps, last = (
            FeatureInfo(stage, str(stage), width, stride, "NCHW")
            for stage, (width, stride) in enumerate(zip(self.widths, self.strides(), strict=True))
        )
        if self.gives_tokens:
            last = FeatureInfo(last.index, last.node, last.channels, None, "NCL")
        return (*maps, last)


class OffsetBiases(Scale, Computed):
    """Base of an attention with a learnt bias for each distance; keys `attention_biases`, `attention_bias_idxs`.

    The positions are those of a square map; queries may be those of every `step`-th of its rows and columns.
    """

    attention_bias_idxs: Tensor

    def add_biases(self, heads: int, side: int, step: int = 1) -> None:
        """Register the biases and where in them that of a query and a key is."""
        self.side, self.step = side, step
        self.attention_biases = nn.Parameter(torch.empty(heads, side**2))
        queries = ((side - 1) // step + 1) ** 2
        index = torch.empty(queries, side**2, dtype=torch.long)
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def start(self) -> None:
        """No distance counts at first."""
        nn.init.zeros_(self.attention_biases)

    def compute(self) -> None:
        """The index: rows apart times the side, and columns apart."""
        rows, columns = (side.flatten() for side in _grid(self.side, 1))
        from_rows, from_columns = (side.flatten() for side in _grid(self.side, self.step))
        down = (from_rows[:, None] - rows[None, :]).abs()
        right = (from_columns[:, None] - columns[None, :]).abs()
        self.attention_bias_idxs.copy_(down * self.side + right)

    def biases(self) -> Tensor:
        """[heads, queries, keys]."""
        return self.attention_biases[:, self.attention_bias_idxs]


def _grid(side: int, step: int) -> tuple[Tensor, ...]:
    ticks = torch.arange(0, side, step)
    return torch.meshgrid(ticks, ticks, indexing="ij")


class Attention(OffsetBiases):
    """Self-attention among 7x7 positions; keys `qkv`, `proj` and those of the biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_biases(HEADS, SIDE)
        self.qkv = nn.Linear(width, HEADS * (2 * KEY_WIDTH + VALUE_WIDTH))
        self.proj = nn.Linear(HEADS * VALUE_WIDTH, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, 49, c] to the same shape."""
        n, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(n, length, HEADS, -1).transpose(1, 2)
        query, key, value = qkv.split((KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH), dim=-1)
        mask = self.biases().to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, -1))
        return projected


class LinearMlp(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, spec: EfficientFormerSpec, width: int) -> None:
        super().__init__()
        hidden = int(width * spec.mlp_ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.act = make_activation(spec.activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        mixed: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return mixed


class ConvMlp(nn.Module):
    """Two 1x1 convolutions, each with a norm; keys `fc1`, `fc2`, `norm1`, `norm2`."""

    def __init__(self, spec: EfficientFormerSpec, width: int) -> None:
        super().__init__()
        hidden = MAP_RATIO * width
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = make_activation(spec.activation)
        self.fc2 = nn.Conv2d(hidden, width, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = self.norm2(self.fc2(self.act(self.norm1(self.fc1(maps)))))
        return mixed


class MapScale(LayerScale):
    """A learnt factor a channel of a map."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return tokens * self.weight[:, None, None]


def _scale(spec: EfficientFormerSpec, width: int, kind: type[LayerScale]) -> nn.Module:
    return kind(width, LAYER_SCALE) if spec.layer_scale else nn.Identity()


class MapBlock(nn.Module):
    """Pooling and convolutions, each with a scaled residual; keys `mlp`, `ls1`, `ls2`."""

    def __init__(self, spec: EfficientFormerSpec, width: int) -> None:
        super().__init__()
        self.token_mixer = Pooling(spec.pool)
        self.mlp = ConvMlp(spec, width)
        self.ls1, self.ls2 = _scale(spec, width, MapScale), _scale(spec, width, MapScale)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = maps + self.ls1(self.token_mixer(maps))
        mixed: Tensor = maps + self.ls2(self.mlp(maps))
        return mixed


class TokenBlock(nn.Module):
    """Attention and linear layers, each with a scaled residual; keys `norm1`, `token_mixer`, `norm2`, `mlp`, …"""

    def __init__(self, spec: EfficientFormerSpec, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mixer = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = LinearMlp(spec, width)
        self.ls1, self.ls2 = _scale(spec, width, LayerScale), _scale(spec, width, LayerScale)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, 49, c] to the same shape."""
        tokens = tokens + self.ls1(self.token_mixer(self.norm1(tokens)))
        mixed: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return mixed


class ToTokens(nn.Module):
    """The positions of a map as tokens; it has a place in the numbers of the keys."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, 7, 7] to [n, 49, c].

        Raises:
            InvalidConfig: the map has not 7x7 positions.
        """
        height, width = maps.shape[2:]
        if (height, width) != (SIDE, SIDE):
            detail = f"attention needs a last map of {SIDE}x{SIDE}; these images give {height}x{width}"
            raise InvalidConfig("#/preprocess", detail)
        return maps.flatten(2).transpose(1, 2)


def make_stage(spec: EfficientFormerSpec, stage: int) -> nn.Sequential:
    """What halves the map, blocks on maps, blocks on tokens."""
    width = spec.widths[stage]
    modules: list[nn.Module] = []
    if spec.halves[stage]:
        before = spec.widths[max(stage - 1, 0)]
        halving = ConvModule(before, width, 3, stride=2, bias=True, norm=BATCH_NORM, activation=NO_ACTIVATION)
        modules.append(halving)
    attending = spec.attending if stage == STAGES - 1 else 0
    modules += [MapBlock(spec, width) for _ in range(spec.blocks[stage] - attending)]
    if attending:
        modules += [ToTokens(), *(TokenBlock(spec, width) for _ in range(attending))]
    return nn.Sequential(*modules)


class EfficientFormer(Backbone):
    """Keys `patch_embed`, `network`, and `norm0` … of the outputs."""

    def __init__(self, spec: EfficientFormerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        first = spec.widths[0]
        sizes = ((spec.in_channels, first // 2), (first // 2, first))
        self.patch_embed = nn.Sequential(
            *(ConvModule(i, o, 3, stride=2, bias=True, norm=BATCH_NORM, activation=RELU) for i, o in sizes)
        )
        self.network = nn.ModuleList(make_stage(spec, stage) for stage in range(STAGES))
        for stage in spec.outputs:
            is_tokens = self.features[stage].layout == "NCL"
            width = spec.widths[stage]
            self.add_module(f"norm{stage}", nn.LayerNorm(width) if is_tokens else GroupNorm(1, width))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed features of the stages in `nodes`; stops after the deepest of them."""
        features, found = self.patch_embed(images), {}
        for stage in range(deepest(nodes) + 1):
            features = self.network[stage](features)
            if str(stage) in nodes:
                found[str(stage)] = self._output(stage, features)
        return {node: found[node] for node in nodes}

    def _output(self, stage: int, features: Tensor) -> Tensor:
        norm = self.get_submodule(f"norm{stage}")
        if features.ndim == 4:
            normed: Tensor = norm(features)
            return normed
        if self.spec.gives_tokens:
            tokens: Tensor = norm(features).transpose(1, 2).contiguous()
            return tokens
        reshaped: Tensor = norm(features.transpose(1, 2).reshape(features.shape[0], -1, SIDE, SIDE))
        return reshaped

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is the stem, k adds the first k stages with their output norms."""
        return frozen_by_stage(
            self,
            freeze,
            lambda k: ["patch_embed", *(f"{part}{i}" for part in ("network.", "norm") for i in range(k))],
        )


# --- mmpretrain.EfficientFormer = mmcls.EfficientFormer -------------------------------------------


class EfficientFormerConfig(SpecConfig):
    """`mmpretrain.EfficientFormer`, which is also `mmcls.EfficientFormer`: for images of 224 px (a last map of 7x7)."""

    NETWORK: ClassVar[str] = "EfficientFormer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "l1"
    in_channels: InputChannels = 3
    pool_size: Annotated[int, Field(strict=True, ge=1, le=31)] = 3
    mlp_ratios: Annotated[float, Field(gt=0, le=16)] = Field(4, description="Of the blocks that attend.")
    reshape_last_feat: bool = Field(
        False, description="True returns the tokens of the last stage as a map; false as [n, c, positions]."
    )
    out_indices: Indices = Field((-1,), description="Stages, 0 at stride 4; each has a norm of its own.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=STAGES)] = Field(
        -1, description="-1 nothing, 0 the stem, k adds the first k stages with their output norms."
    )
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    use_layer_scale: bool = True

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch = self.plan()
        if arch.vit_num > arch.layers[-1]:
            yield (
                "arch/vit_num",
                f"{arch.vit_num} is more than the {arch.layers[-1]} blocks of the last stage",
            )
        if not arch.vit_num and not self._reshapes() and STAGES - 1 in self.spec().outputs:
            yield "reshape_last_feat", "must be true where no block attends (vit_num 0), as in the library"
        for stage in range(1, STAGES):
            before, width = arch.embed_dims[stage - 1 : stage + 1]
            if before != width and not arch.downsamples[stage]:
                detail = f"{before} channels become {width} only where the map is halved"
                yield f"arch/downsamples/{stage}", detail
        if self.pool_size % 2 == 0:
            yield "pool_size", f"{self.pool_size} is even"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def spec(self) -> EfficientFormerSpec:
        """The neutral spelling."""
        arch = self.plan()
        strides = [4 * 2**halvings for halvings in itertools.accumulate(arch.downsamples)]
        return EfficientFormerSpec(
            arch.layers,
            arch.embed_dims,
            arch.downsamples,
            arch.vit_num,
            outputs=asked_stages(self.out_indices, self.strides, strides),
            reshapes=self._reshapes(),
            pool=self.pool_size,
            mlp_ratio=self.mlp_ratios,
            activation=self.act_cfg.spec(),
            layer_scale=self.use_layer_scale,
            in_channels=self.in_channels,
        )

    def _reshapes(self) -> bool:
        # Who asks for maps by their stride wants maps, unless something else is said.
        unsaid = "reshape_last_feat" not in self.model_fields_set
        return self.reshape_last_feat or (self.strides is not None and unsaid)

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages`."""
        return Freeze(stages=self.frozen_stages if self.frozen_stages >= 0 else None)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


_TIMM_BLOCK = {
    "mlp.{rest}": "mlp.{rest}",
    "norm{k}.{leaf}": "norm{k}.{leaf}",
    "token_mixer.{rest}": "token_mixer.{rest}",
    "ls{k}.weight": "ls{k}.gamma",
}
_TIMM_NAMES = {
    **{f"patch_embed.{i}.conv.{{leaf}}": f"stem.conv{i + 1}.{{leaf}}" for i in range(2)},
    **{f"patch_embed.{i}.bn.{{leaf}}": f"stem.norm{i + 1}.{{leaf}}" for i in range(2)},
    **{f"network.{s}.0.conv.{{leaf}}": f"stages.{s}.downsample.conv.{{leaf}}" for s in range(1, 4)},
    **{f"network.{s}.0.bn.{{leaf}}": f"stages.{s}.downsample.norm.{{leaf}}" for s in range(1, 4)},
    **below("network.0.{b}.", "stages.0.blocks.{b}.", _TIMM_BLOCK),
    # Their first place is the downsampling's here.
    **below("network.{s}.{b+1}.", "stages.{s}.blocks.{b}.", _TIMM_BLOCK),
    "norm3.{leaf}": "norm.{leaf}",
}
EFFICIENTFORMER_NAMES = Naming(
    "EfficientFormer",
    own=("mmpretrain",),
    marks=(
        "patch_embed.0.conv.weight",
        "network.0.0.mlp.norm1.weight",
        "network.1.0.conv.weight",
        "network.3.1.mlp.fc1.weight",
    ),
    layouts=(KeyLayout("timm", rules(_TIMM_NAMES)),),
)


EFFICIENTFORMER = make_family(
    EfficientFormerConfig,
    EfficientFormer,
    example={"arch": "l1", "out_indices": [0, 1, 2, 3], "reshape_last_feat": True},
    architectures=tuple(ARCHS),
    naming=EFFICIENTFORMER_NAMES,
)
