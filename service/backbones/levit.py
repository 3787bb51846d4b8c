"""LeViT (Graham et al., arXiv:2104.01136) with mmpretrain's key names, as trained and as deployed (norms folded in).

Attention has a bias for each distance, so that a network is made for images of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, levels_by_index
from service.backbones.efficientformer import OffsetBiases
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    SpecConfig,
    deepest,
    make_activation,
    make_family,
    map_features,
    named_arch,
)
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults
from service.errors import InvalidConfig

STEM_STRIDE = 16
HALVING_RATIO = 4  # widths of values to keys where attention halves the map
MAX_SIDE = 32
STEM_ACTIVATION = ActivationSpec("hardswish")


@dataclass(frozen=True)
class Size:
    """Channels, heads, layers and width of the keys of each stage."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    keys: tuple[int, ...]


ARCHS: dict[str, Size] = {
    "128s": Size((128, 256, 384), (4, 6, 8), (2, 3, 4), (16, 16, 16)),
    "128": Size((128, 256, 384), (4, 8, 12), (4, 4, 4), (16, 16, 16)),
    "192": Size((192, 288, 384), (3, 5, 6), (4, 4, 4), (32, 32, 32)),
    "256": Size((256, 384, 512), (4, 6, 8), (4, 4, 4), (32, 32, 32)),
    "384": Size((384, 512, 768), (6, 9, 12), (4, 4, 4), (32, 32, 32)),
}


@dataclass(frozen=True)
class LeViTSpec:
    """What decides the numbers and the names of the weights.

    `side` is that of the first stage's map. `mlp_ratio` 0 leaves the feed-forward networks out. `deployed` layers have
    a bias in place of a norm.
    """

    size: Size
    side: int
    attn_ratio: float = 2.0
    mlp_ratio: int = 2
    activation: ActivationSpec = ActivationSpec("hardswish")  # noqa: RUF009 - frozen
    deployed: bool = False
    in_channels: int = 3

    def sides(self) -> tuple[int, ...]:
        """Of the map of each stage."""
        return tuple((self.side - 1) // 2**stage + 1 for stage in range(len(self.size.widths)))

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        widths = self.size.widths
        return map_features(widths, [STEM_STRIDE * 2**stage for stage in range(len(widths))])


class ConvNorm(nn.Module):
    """A strided convolution and its norm; keys `conv`, `bn`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, ceil(h / 2), ceil(w / 2)]."""
        normed: Tensor = self.bn(self.conv(maps))
        return normed


class LinearNorm(nn.Module):
    """A linear layer and its norm; keys `linear`, `bn`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, inputs] to [n, l, outputs]."""
        wide: Tensor = self.linear(tokens)
        normed: Tensor = self.bn(wide.flatten(0, 1)).reshape(wide.shape)
        return normed


def linear(spec: LeViTSpec, inputs: int, outputs: int) -> nn.Module:
    """A linear layer with a norm, or with a bias where it is deployed."""
    return nn.Linear(inputs, outputs) if spec.deployed else LinearNorm(inputs, outputs)


def _strided(spec: LeViTSpec, inputs: int, outputs: int) -> nn.Module:
    if spec.deployed:
        return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    return ConvNorm(inputs, outputs)


class Stem(nn.Module):
    """Four strided convolutions with activations between; key `patch_embed`."""

    def __init__(self, spec: LeViTSpec) -> None:
        super().__init__()
        width = spec.size.widths[0]
        widths = [spec.in_channels, width // 8, width // 4, width // 2, width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [_strided(spec, inputs, outputs), make_activation(STEM_ACTIVATION)]
        self.patch_embed = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] to [n, width, h / 16, w / 16]."""
        maps: Tensor = self.patch_embed(images)
        return maps


class Residual(nn.Module):
    """Adds what `block` gives to its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        mixed: Tensor = self.block(tokens)
        return tokens + mixed


def projection(spec: LeViTSpec, inputs: int, outputs: int) -> nn.Sequential:
    """An activation and a linear layer, as items `0` and `1`."""
    return nn.Sequential(make_activation(spec.activation), linear(spec, inputs, outputs))


def attend(query: Tensor, key: Tensor, value: Tensor, biases: Tensor) -> Tensor:
    """[n, heads, l, k], [n, heads, m, k], [n, heads, m, v] and [heads, l, m] to [n, heads, l, v].

    Step by step: norms without a residual enlarge the rounding that a fused attention has of its own.
    """
    weights = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + biases
    mixed: Tensor = weights.softmax(dim=-1) @ value
    return mixed


class Attention(OffsetBiases):
    """Self-attention with biases of distance; keys `attention_biases`, `qkv`, `proj.1`."""

    def __init__(self, spec: LeViTSpec, stage: int) -> None:
        super().__init__()
        width, heads, key = (of[stage] for of in (spec.size.widths, spec.size.heads, spec.size.keys))
        value = int(spec.attn_ratio * key)
        self.heads, self.sizes = heads, (key, key, value)
        self.add_biases(heads, spec.sides()[stage])
        self.qkv = linear(spec, width, heads * (2 * key + value))
        self.proj = projection(spec, heads * value, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        query, key, value = by_head(self.qkv(tokens), self.heads, self.sizes)
        mixed = attend(query, key, value, self.biases().to(query.dtype))
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class HalvingAttention(OffsetBiases):
    """Attention from every second row and column to all; keys `attention_biases`, `kv`, `q.1`, `proj.1`."""

    def __init__(self, spec: LeViTSpec, stage: int) -> None:
        super().__init__()
        inputs, outputs = spec.size.widths[stage - 1 : stage + 1]
        key = spec.size.keys[stage]
        heads, value = inputs // key, HALVING_RATIO * key
        self.heads, self.key, self.value = heads, key, value
        self.add_biases(heads, spec.sides()[stage - 1], step=2)
        self.kv = linear(spec, inputs, heads * (key + value))
        # The library has the choice of positions at 0, without weights.
        self.q = nn.Sequential(nn.Identity(), linear(spec, inputs, heads * key))
        self.proj = projection(spec, heads * value, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, side², inputs] to [n, ceil(side / 2)², outputs]."""
        key, value = by_head(self.kv(tokens), self.heads, (self.key, self.value))
        maps = tokens.reshape(tokens.shape[0], self.side, self.side, -1)
        chosen = self.q(maps[:, :: self.step, :: self.step].flatten(1, 2))
        (query,) = by_head(chosen, self.heads, (self.key,))
        mixed = attend(query, key, value, self.biases().to(query.dtype))
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


def by_head(tokens: Tensor, heads: int, sizes: Sequence[int]) -> list[Tensor]:
    """[n, l, heads * sum(sizes)] to one [n, heads, l, size] a size: a head's parts lie side by side."""
    n, length, _ = tokens.shape
    parts = tokens.reshape(n, length, heads, -1).transpose(1, 2)
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [parts[..., start : start + size] for start, size in zip(starts, sizes, strict=True)]


class FeedForward(nn.Module):
    """Two linear layers; keys `linear1`, `linear2`."""

    def __init__(self, spec: LeViTSpec, width: int) -> None:
        super().__init__()
        self.linear1 = linear(spec, width, width * spec.mlp_ratio)
        self.activation = make_activation(spec.activation)
        self.linear2 = linear(spec, width * spec.mlp_ratio, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        mixed: Tensor = self.linear2(self.activation(self.linear1(tokens)))
        return mixed


def make_stage(spec: LeViTSpec, stage: int) -> nn.Sequential:
    """What halves the map, and attention and feed-forward in turn."""
    width, mixes = spec.size.widths[stage], spec.mlp_ratio > 0
    layers: list[nn.Module] = [HalvingAttention(spec, stage)] if stage else []
    makers: list[Callable[[], nn.Module]] = [lambda: FeedForward(spec, width)] if stage and mixes else []
    for _ in range(spec.size.depths[stage]):
        makers.append(lambda: Attention(spec, stage))
        makers += [lambda: FeedForward(spec, width)] if mixes else []
    return nn.Sequential(*layers, *(Residual(make()) for make in makers))


class LeViT(Backbone):
    """Keys `patch_embed.patch_embed`, `stages`."""

    def __init__(self, spec: LeViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.patch_embed = Stem(spec)
        self.stages = nn.ModuleList(make_stage(spec, stage) for stage in range(len(spec.size.widths)))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them.

        Raises:
            InvalidConfig: the network is made for images of another size.
        """
        maps, found = self.patch_embed(images), {}
        if tuple(maps.shape[2:]) != (self.spec.side, self.spec.side):
            side = self.spec.side * STEM_STRIDE
            detail = f"distances are made for images of {side}x{side} px; resize the images or set img_size"
            raise InvalidConfig("#/backbone/img_size", detail)
        tokens = maps.flatten(2).transpose(1, 2)
        for stage in range(deepest(nodes) + 1):
            tokens = self.stages[stage](tokens)
            if str(stage) in nodes:
                side = self.spec.sides()[stage]
                found[str(stage)] = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has no rule."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.LeViT -----------------------------------------------------------------------------


class LeViTConfig(SpecConfig):
    """`mmpretrain.LeViT`: images of `img_size` only. The library fails at an `arch` that is not a name."""

    NETWORK: ClassVar[str] = "LeViT"

    arch: Annotated[str, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})]
    img_size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = Field(
        16, description="Says how many positions attention is for, not how images are cut: always by 16."
    )
    attn_ratio: Annotated[float, Field(gt=0, le=16)] = Field(
        2, description="Widths of values to keys in attention that keeps the map's size."
    )
    mlp_ratio: Annotated[int, Field(strict=True, ge=0, le=16)] = Field(
        2, description="0 leaves the feed-forward networks out."
    )
    act_cfg: ActivationConfig = Field(ActivationConfig(type="HSwish"), description="Of all but the stem.")
    out_indices: Indices = Field((-1,), description="Stages, 0 at stride 16.")
    deploy: bool = Field(False, description="Weights of a network whose norms were folded into its layers.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        if not 1 <= spec.side <= MAX_SIDE:
            yield "img_size", f"a map of {spec.side}x{spec.side}; 1 to {MAX_SIDE} a side are served"
        if int(self.attn_ratio * min(spec.size.keys)) < 1:
            yield "attn_ratio", f"{self.attn_ratio} leaves no values"

    def spec(self) -> LeViTSpec:
        """The neutral spelling."""
        return LeViTSpec(
            ARCHS[self.arch],
            self.img_size // self.patch_size,
            self.attn_ratio,
            self.mlp_ratio,
            self.act_cfg.spec(),
            self.deploy,
        )

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        side = self.img_size if self.patch_size == STEM_STRIDE else self.spec().side * STEM_STRIDE
        return PreprocessDefaults(size=(side, side))

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


MAX_BLOCKS = 8
_ATTENTION = {
    "block.attention_biases": "attn.attention_biases",
    "block.qkv.{rest}": "attn.qkv.{rest}",
    "block.proj.1.{rest}": "attn.proj.ln.{rest}",
}
_FEED_FORWARD = {"block.linear{k}.{rest}": "mlp.ln{k}.{rest}"}
_DOWNSAMPLE = {
    "attention_biases": "attention_biases",
    "kv.{rest}": "kv.{rest}",
    "q.1.{rest}": "q.ln.{rest}",
    "proj.1.{rest}": "proj.ln.{rest}",
}


def _timm_stage(stage: int) -> dict[str, str]:
    """Attention and feed-forward take turns here, after the downsampling and its own feed-forward."""
    mine = theirs = f"stages.{stage}."
    found: dict[str, str] = {}
    first = 2 if stage else 0
    if first:
        found |= below(f"{mine}0.", f"{theirs}downsample.attn_downsample.", _DOWNSAMPLE)
        found |= below(f"{mine}1.", f"{theirs}downsample.", _FEED_FORWARD)
    for block in range(MAX_BLOCKS):
        found |= below(f"{mine}{first + 2 * block}.", f"{theirs}blocks.{block}.", _ATTENTION)
        found |= below(f"{mine}{first + 2 * block + 1}.", f"{theirs}blocks.{block}.", _FEED_FORWARD)
    return found


_TIMM_NAMES = {
    # between the convolutions there are activations
    **{
        f"patch_embed.patch_embed.{2 * i}.conv.{{leaf}}": f"stem.conv{i + 1}.linear.{{leaf}}"
        for i in range(4)
    },
    **{f"patch_embed.patch_embed.{2 * i}.bn.{{leaf}}": f"stem.conv{i + 1}.bn.{{leaf}}" for i in range(4)},
    **_timm_stage(0),
    **_timm_stage(1),
    **_timm_stage(2),
}
LEVIT_NAMES = Naming(
    "LeViT",
    own=("mmpretrain",),
    marks=(
        "patch_embed.patch_embed.0.conv.weight",
        "stages.0.0.block.attention_biases",
        "stages.0.1.block.linear1.linear.weight",
        "stages.1.0.kv.linear.weight",
    ),
    layouts=(KeyLayout("timm", rules(_TIMM_NAMES)),),
)


LEVIT = make_family(
    LeViTConfig,
    LeViT,
    example={"arch": "128s", "out_indices": [0, 1, 2]},
    architectures=tuple(ARCHS),
    naming=LEVIT_NAMES,
)
