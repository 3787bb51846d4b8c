"""MLP-Mixer (Tolstikhin et al., arXiv:2105.01601) with mmpretrain's key names.

Its outputs are tokens with their channels first, [n, c, l], as mmpretrain gives them to `GlobalAveragePooling(dim=1)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    OneForAll,
    SpecConfig,
    deepest,
    make_family,
    named_arch,
)
from service.backbones.transformer_layers import FeedForward
from service.backbones.vision_transformer import MAX_PATCHES, Pixels
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    PreprocessDefaults,
)

# channels, layers, inner widths of the networks over tokens and over channels
ARCHS: dict[str, tuple[int, int, int, int]] = {
    name: plan
    for names, plan in (
        (("s", "small"), (512, 8, 256, 2048)),
        (("b", "base"), (768, 12, 384, 3072)),
        (("l", "large"), (1024, 24, 512, 4096)),
    )
    for name in names
}


@dataclass(frozen=True)
class MlpMixerSpec:
    """What decides the numbers and the names of the weights; images are `image` [height, width] and nothing else."""

    width: int
    layers: int
    tokens_hidden: int
    channels_hidden: int
    image: tuple[int, int]
    patch: tuple[int, int]
    activation: ActivationSpec
    eps: float = 1e-5
    in_channels: int = 3
    patch_bias: bool = True
    linears: int = 2

    @property
    def tokens(self) -> int:
        """How many patches an image has, those past its border included."""
        rows, columns = (math.ceil(side / patch) for side, patch in zip(self.image, self.patch, strict=True))
        return rows * columns

    def features(self) -> tuple[FeatureInfo, ...]:
        """The tokens of every layer."""
        return tuple(FeatureInfo(i, str(i), self.width, None, "NCL") for i in range(self.layers))


class PatchEmbed(nn.Module):
    """Patches projected; pads right and bottom to whole patches. Key `projection`."""

    def __init__(self, spec: MlpMixerSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.projection = nn.Conv2d(
            spec.in_channels, spec.width, spec.patch, stride=spec.patch, bias=spec.patch_bias
        )

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, l, width]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        projected: Tensor = self.projection(padded)
        return projected.flatten(2).transpose(1, 2)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels; keys `ln1`, `token_mix`, `ln2`, `channel_mix`."""

    def __init__(self, spec: MlpMixerSpec) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.token_mix = FeedForward(spec.tokens, spec.tokens_hidden, spec.activation, linears=spec.linears)
        self.ln2 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.channel_mix = FeedForward(
            spec.width, spec.channels_hidden, spec.activation, linears=spec.linears
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to the same shape."""
        tokens = tokens + self.token_mix(self.ln1(tokens).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = tokens + self.channel_mix(self.ln2(tokens))
        return mixed


class MlpMixer(Backbone):
    """Keys `patch_embed`, `layers`, `ln1`: only the output of the last layer is normed."""

    def __init__(self, spec: MlpMixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.ModuleList(MixerBlock(spec) for _ in range(spec.layers))
        self.ln1 = nn.LayerNorm(spec.width, eps=spec.eps)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Tokens of the layers in `nodes`, [n, c, l]; stops after the deepest of them.

        Raises:
            ValueError: images of another size than the one that the tokens are mixed for.
        """
        if tuple(images.shape[-2:]) != self.spec.image:
            raise ValueError(f"images must be {self.spec.image[0]}x{self.spec.image[1]}")
        tokens, found = self.patch_embed(images), {}
        for index in range(deepest(nodes) + 1):
            tokens = self.layers[index](tokens)
            if str(index) in nodes:
                output = self.ln1(tokens) if index == len(self.layers) - 1 else tokens
                found[str(index)] = output.transpose(1, 2)
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """MlpMixer has no `frozen_stages`; `norm_cfg.requires_grad` holds."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.MlpMixer = mmcls.MlpMixer ---------------------------------------------------------

Width = Annotated[int, Field(strict=True, ge=1, le=16_384)]
PatchSide = Annotated[int, Field(strict=True, ge=1, le=256)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=8192)]
    num_layers: Annotated[int, Field(strict=True, ge=1, le=128)]
    tokens_mlp_dims: Width
    channels_mlp_dims: Width


class PatchConfig(BaseModel):
    """What `patch_cfg` may change of the patch embedding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: InputChannels = 3
    bias: bool = True
    conv_type: Literal["Conv2d"] = "Conv2d"


class LayerConfig(BaseModel):
    """What `layer_cfgs` may change of every layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_fcs: Annotated[int, Field(strict=True, ge=2, le=8)] = Field(2, description="Linear layers of a mix.")
    act_cfg: ActivationConfig | None = Field(None, description="null is the act_cfg of the network.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")


class MlpMixerConfig(SpecConfig):
    """`mmpretrain.MlpMixer`, which is also `mmcls.MlpMixer`: images of `img_size` only."""

    NETWORK: ClassVar[str] = "MlpMixer"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(224, description="The only size that images may have.")
    patch_size: PatchSide | tuple[PatchSide, PatchSide] = 16
    out_indices: Indices = Field(
        (-1,), description="Layers from 0; negative ones count from the end. Tokens, channels first."
    )
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    patch_cfg: PatchConfig = PatchConfig()
    layer_cfgs: Annotated[LayerConfig, OneForAll] = LayerConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if (tokens := self.spec().tokens) > MAX_PATCHES:
            yield "img_size", f"{tokens} patches; the limit is {MAX_PATCHES}"

    def spec(self) -> MlpMixerSpec:
        """The neutral spelling."""
        arch, patch = self.arch, self.patch_size
        width, layers, tokens_hidden, channels_hidden = (
            ARCHS[arch] if isinstance(arch, str) else arch.model_dump().values()
        )
        return MlpMixerSpec(
            width,
            layers,
            tokens_hidden,
            channels_hidden,
            image=self.image_size(),
            patch=patch if isinstance(patch, tuple) else (patch, patch),
            activation=(self.layer_cfgs.act_cfg or self.act_cfg).spec(),
            eps=self.norm_cfg.eps,
            in_channels=self.patch_cfg.in_channels,
            patch_bias=self.patch_cfg.bias,
            linears=self.layer_cfgs.num_fcs,
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


MLP_MIXER_NAMES = Naming(
    "MlpMixer",
    own=("mmpretrain",),
    marks=(
        "patch_embed.projection.weight",
        "layers.0.token_mix.layers.0.0.weight",
        "layers.0.channel_mix.layers.1.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "patch_embed.projection.{leaf}": "stem.proj.{leaf}",
                    "layers.{i}.ln{k}.{leaf}": "blocks.{i}.norm{k}.{leaf}",
                    "layers.{i}.token_mix.layers.0.0.{leaf}": "blocks.{i}.mlp_tokens.fc1.{leaf}",
                    "layers.{i}.token_mix.layers.1.{leaf}": "blocks.{i}.mlp_tokens.fc2.{leaf}",
                    "layers.{i}.channel_mix.layers.0.0.{leaf}": "blocks.{i}.mlp_channels.fc1.{leaf}",
                    "layers.{i}.channel_mix.layers.1.{leaf}": "blocks.{i}.mlp_channels.fc2.{leaf}",
                    "ln1.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


MLP_MIXER = make_family(
    MlpMixerConfig,
    MlpMixer,
    example={"arch": "small", "patch_size": 32},
    architectures=tuple(ARCHS),
    naming=MLP_MIXER_NAMES,
)
