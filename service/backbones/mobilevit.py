"""MobileViT (Mehta and Rastegari, arXiv:2110.02178) with mmpretrain's key names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels, levels_by_index
from service.backbones.inverted_residual import BlockSpec, ConvSpec, NestedInvertedResidual, conv
from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
    ConvModule,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    named_arch,
    norm_fault,
    pads_same,
)
from service.backbones.tracing import ceil_div, is_known
from service.backbones.vision_transformer import MAX_PATCHES, Size, TransformerLayer, VisionTransformerSpec
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, below, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import TooLarge

HEADS = 4
PATCH = 2
# What a config's norm and activation do not change: the blocks between the stem and the last convolution.
BLOCKS = ConvSpec(activation=ActivationSpec("silu"))

Width = Annotated[int, Field(strict=True, ge=1, le=2048)]
Stride = Annotated[int, Field(strict=True, ge=1, le=2)]
Count = Annotated[int, Field(strict=True, ge=1, le=32)]
Ratio = Annotated[int, Field(strict=True, ge=1, le=8)]
# channels, stride, blocks, expansion
Convolutional = tuple[Literal["mobilenetv2"], Width, Stride, Count, Ratio]
# channels, stride, width and inner width of the transformer, its layers, expansion
Transforming = tuple[Literal["mobilevit"], Width, Stride, Width, Width, Count, Ratio]
Layer = Convolutional | Transforming

ARCHS: dict[str, tuple[Layer, ...]] = {
    "small": (
        ("mobilenetv2", 32, 1, 1, 4),
        ("mobilenetv2", 64, 2, 3, 4),
        ("mobilevit", 96, 2, 144, 288, 2, 4),
        ("mobilevit", 128, 2, 192, 384, 4, 4),
        ("mobilevit", 160, 2, 240, 480, 3, 4),
    ),
    "x_small": (
        ("mobilenetv2", 32, 1, 1, 4),
        ("mobilenetv2", 48, 2, 3, 4),
        ("mobilevit", 64, 2, 96, 192, 2, 4),
        ("mobilevit", 80, 2, 120, 240, 4, 4),
        ("mobilevit", 96, 2, 144, 288, 3, 4),
    ),
    "xx_small": (
        ("mobilenetv2", 16, 1, 1, 2),
        ("mobilenetv2", 24, 2, 3, 2),
        ("mobilevit", 48, 2, 64, 128, 2, 2),
        ("mobilevit", 64, 2, 80, 160, 4, 2),
        ("mobilevit", 80, 2, 96, 192, 3, 2),
    ),
}


@dataclass(frozen=True)
class MobileViTSpec:
    """What decides the numbers and the names of the weights; `conv` is of the stem and of the last convolution."""

    layers: tuple[Layer, ...]
    conv: ConvSpec
    stem: int = 16
    last_factor: int = 4
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a layer; the last one is that of the last convolution."""
        widths = [layer[1] for layer in self.layers]
        strides = [2 * math.prod(layer[2] for layer in self.layers[: i + 1]) for i in range(len(widths))]
        return map_features([*widths[:-1], widths[-1] * self.last_factor], strides)


def transformer(width: int, hidden: int, layers: int) -> nn.Sequential:
    """Layers of a transformer and a norm, as items `0`, `1`, …"""
    spec = VisionTransformerSpec(
        Size(width, layers, HEADS, hidden), grid=(1, 1), norm=NormSpec("ln"), activation="silu"
    )
    return nn.Sequential(*(TransformerLayer(spec) for _ in range(layers)), nn.LayerNorm(width))


class MobileViTBlock(nn.Module):
    """Attention among the positions that lie alike in their patches; keys `local_rep`, `global_rep`, `conv_proj`, …"""

    def __init__(self, width: int, inner: int, hidden: int, layers: int) -> None:
        super().__init__()
        plain = ConvModule(width, inner, 1, bias=False, norm=None, activation=ActivationSpec("none"))
        self.local_rep = nn.Sequential(conv(BLOCKS, width, width, 3), plain)
        self.global_rep = transformer(inner, hidden, layers)
        self.conv_proj = conv(BLOCKS, inner, width, 1)
        self.conv_fusion = conv(BLOCKS, 2 * width, width, 3)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed = self.conv_proj(self._among_patches(self.local_rep(maps)))
        fused: Tensor = self.conv_fusion(torch.cat((maps, mixed), dim=1))
        return fused

    def _among_patches(self, maps: Tensor) -> Tensor:
        n, channels, *size = maps.shape
        rows, columns = (ceil_div(side, PATCH) for side in size)
        if rows * columns > MAX_PATCHES:
            raise TooLarge(f"{rows * columns} patches of a map; the limit is {MAX_PATCHES}")
        whole = [rows * PATCH, columns * PATCH]
        fits = is_known(size, whole)
        if not fits:
            maps = F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)
        cut = maps.reshape(n, channels, rows, PATCH, columns, PATCH).permute(0, 3, 5, 2, 4, 1)
        mixed = self.global_rep(cut.reshape(n * PATCH**2, rows * columns, channels))
        joined: Tensor = mixed.reshape(n, PATCH, PATCH, rows, columns, channels).permute(0, 5, 3, 1, 4, 2)
        joined = joined.reshape(n, channels, *whole)
        if not fits:
            joined = F.interpolate(joined, size=size, mode="bilinear", align_corners=False)
        return joined


def make_layer(inputs: int, layer: Layer) -> nn.Sequential:
    """Inverted residuals, or one of them and attention."""
    outputs, stride, ratio = layer[1], layer[2], layer[-1]
    if layer[0] == "mobilevit":
        first = BlockSpec(inputs, outputs, inputs * ratio, 3, stride)
        return nn.Sequential(
            NestedInvertedResidual(BLOCKS, first), MobileViTBlock(outputs, layer[3], layer[4], layer[5])
        )
    blocks = [BlockSpec(inputs, outputs, inputs * ratio, 3, stride)]
    blocks += [BlockSpec(outputs, outputs, outputs * ratio, 3, 1)] * (layer[3] - 1)
    return nn.Sequential(*(NestedInvertedResidual(BLOCKS, block) for block in blocks))


class MobileViT(Backbone):
    """Keys `stem`, `layers`, `conv_1x1_exp`."""

    def __init__(self, spec: MobileViTSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = conv(spec.conv, spec.in_channels, spec.stem, 3, stride=2)
        inputs = [spec.stem, *(layer[1] for layer in spec.layers)]
        self.layers = nn.Sequential(
            *(make_layer(width, layer) for width, layer in zip(inputs, spec.layers, strict=False))
        )
        self.conv_1x1_exp = conv(spec.conv, inputs[-1], inputs[-1] * spec.last_factor, 1)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for index in range(deepest(nodes) + 1):
            maps = self.layers[index](maps)
            if index == len(self.layers) - 1:
                maps = self.conv_1x1_exp(maps)
            if str(index) in nodes:
                found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k freezes the first k layers, never the stem.

        `norm_cfg` is of the stem and the last convolution only, and so is its `requires_grad`.
        """
        return frozen_by_stage(
            self,
            freeze,
            lambda k: [f"layers.{layer}" for layer in range(k)],
            configured=("stem", "conv_1x1_exp"),
        )


# --- mmpretrain.MobileViT = mmcls.MobileViT -------------------------------------------------------


class MobileViTConfig(OpenMMLabConfig):
    """`mmpretrain.MobileViT`, which is also `mmcls.MobileViT`."""

    NETWORK: ClassVar[str] = "MobileViT"

    arch: (
        Annotated[str, named_arch(ARCHS)] | Annotated[tuple[Layer, ...], Field(min_length=1, max_length=16)]
    ) = Field("small", json_schema_extra={"examples": list(ARCHS)})
    in_channels: InputChannels = 3
    stem_channels: Width = 16
    last_exp_factor: Annotated[int, Field(strict=True, ge=1, le=16)] = 4
    out_indices: Indices = Field(
        (4,), description="Layers from 0, the last one expanded; larger ones give nothing, as in the library."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=15)] = Field(
        -1, description="k freezes the first k layers; the stem is never frozen."
    )
    conv_cfg: ConvConfig | None = Field(None, description="Of the stem and the last convolution.")
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="Swish")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        for index, layer in enumerate(spec.layers):
            if layer[0] == "mobilevit" and layer[3] % HEADS:
                yield f"arch/{index}/3", f"{HEADS} heads do not divide {layer[3]} channels"
        if self.frozen_stages >= len(spec.layers):
            yield "frozen_stages", f"{self.frozen_stages} is not less than the {len(spec.layers)} layers"
        widths = (spec.stem, spec.layers[-1][1] * spec.last_factor)
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def spec(self) -> MobileViTSpec:
        """The neutral spelling."""
        layers = ARCHS[self.arch] if isinstance(self.arch, str) else self.arch
        ends = ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec(), pads_same(self.conv_cfg))
        return MobileViTSpec(layers, ends, self.stem_channels, self.last_exp_factor, self.in_channels)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`; the library gives nothing for those past the last layer."""
        count = len(description.features)
        within = [index for index in self.out_indices if index < count]
        return levels_by_index(within or self.out_indices, description.features)


_TIMM_NAMES = {
    "stem.{rest}": "stem.{rest}",
    **below(
        "layers.{s}.{b}.",
        "stages.{s}.{b}.",
        {
            "conv.0.{rest}": "conv1_1x1.{rest}",
            "conv.1.{rest}": "conv2_kxk.{rest}",
            "conv.2.{rest}": "conv3_1x1.{rest}",
            "local_rep.0.{rest}": "conv_kxk.{rest}",
            "local_rep.1.conv.{leaf}": "conv_1x1.{leaf}",
            "global_rep.{i}.ln{k}.{leaf}": "transformer.{i}.norm{k}.{leaf}",
            "global_rep.{i}.attn.{rest}": "transformer.{i}.attn.{rest}",
            "global_rep.{i}.ffn.layers.0.0.{leaf}": "transformer.{i}.mlp.fc1.{leaf}",
            "global_rep.{i}.ffn.layers.1.{leaf}": "transformer.{i}.mlp.fc2.{leaf}",
            "conv_proj.{rest}": "conv_proj.{rest}",
            "conv_fusion.{rest}": "conv_fusion.{rest}",
        },
    ),
    "conv_1x1_exp.{rest}": "final_conv.{rest}",
}
_TRANSFORMER = (
    re.compile(r"layers\.(\d+)\.(\d+)\.global_rep\.(\d+)\.ln1\.weight"),
    re.compile(r"stages\.(\d+)\.(\d+)\.transformer\.(\d+)\.norm1\.weight"),
)


def _timm_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    """The norm behind the transformers is one more of them here, and has a name of its own in timm."""
    counts: dict[tuple[str, str], int] = {}
    for name in names:
        found = _TRANSFORMER[0 if ours else 1].fullmatch(name)
        if found is not None:
            place = found[1], found[2]
            counts[place] = max(counts.get(place, 0), int(found[3]) + 1)
    norms = {
        f"layers.{stage}.{block}.global_rep.{count}.{{leaf}}": f"stages.{stage}.{block}.norm.{{leaf}}"
        for (stage, block), count in counts.items()
    }
    return rules({**_TIMM_NAMES, **norms})


MOBILEVIT_NAMES = Naming(
    "MobileViT",
    own=("mmpretrain",),
    marks=(
        "stem.conv.weight",
        "layers.0.0.conv.0.conv.weight",
        "layers.2.1.global_rep.0.ln1.weight",
        "layers.2.1.conv_fusion.conv.weight",
    ),
    layouts=(KeyLayout("timm", _timm_rules),),
)


MOBILEVIT = make_family(
    MobileViTConfig,
    MobileViT,
    example={"arch": "small", "out_indices": [1, 2, 3, 4]},
    architectures=tuple(ARCHS),
    naming=MOBILEVIT_NAMES,
)
