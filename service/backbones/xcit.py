"""XCiT (El-Nouby et al., arXiv:2106.09681) with mmpretrain's key names.

Layers with attention among channels come first; then the class token joins, and the last layers attend to it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig, NormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvModule,
    Scale,
    batch_norm,
    make_family,
    norm_fault,
)
from service.backbones.token_outputs import TokenConfig, parse_node, token_features, token_output
from service.backbones.tracing import is_tracing
from service.backbones.transformer_layers import FeedForward, by_head
from service.backbones.vision_transformer import Pixels, before
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport, PreprocessDefaults

PatchSize = Literal[8, 16]
# Of the encoding of positions: numbers an axis, and the longest wave.
WAVES, LONGEST_WAVE = 32, 10_000
# What one position adds to the widths of the convolutions that cut patches.
STEM_FRACTIONS: dict[int, tuple[int, ...]] = {16: (8, 4, 2, 1), 8: (4, 2, 1)}


@dataclass(frozen=True)
class XCiTSpec:
    """What decides the numbers and the names of the weights.

    `layers` attend among channels, `class_layers` to the class token. `eps` is of the layer norms, `norm` of the
    convolutions. `layer_scale` is the initial factor of the residual branches. `norms_tokens` is whether the layers of
    the class token norm all tokens. `prefix_tokens` are those before the patches in all `raw` outputs asked for.
    """

    width: int
    layers: int
    class_layers: int
    heads: int
    hidden: int
    patch_size: int
    norm: NormSpec
    activation: ActivationSpec
    eps: float = 1e-6
    qkv_bias: bool = True
    positions: bool = True
    layer_scale: float = 1.0
    norms_tokens: bool = False
    final_norm: bool = True
    in_channels: int = 3
    prefix_tokens: int = 0

    @property
    def depth(self) -> int:
        """Layers of both kinds."""
        return self.layers + self.class_layers

    def stem_widths(self) -> tuple[int, ...]:
        """Channels after each convolution that cuts patches."""
        return tuple(self.width // part for part in STEM_FRACTIONS[self.patch_size])

    def features(self) -> tuple[FeatureInfo, ...]:
        """Every output of every layer."""
        return token_features(
            self.width, self.patch_size, [layer >= self.layers for layer in range(self.depth)]
        )


def layer_norm(spec: XCiTSpec) -> nn.LayerNorm:
    """A norm over the tokens' channels."""
    return nn.LayerNorm(spec.width, eps=spec.eps)


class FourierPositions(nn.Module):
    """Sines and cosines of rows and columns, projected; key `token_projection.conv`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        none = ActivationSpec("none")
        self.token_projection = ConvModule(2 * WAVES, spec.width, 1, norm=None, activation=none)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to what is added to it, [1, width, h, w]."""
        images, _, rows, columns = maps.shape
        weight = self.token_projection.conv.weight
        down, right = (waves(count, device=weight.device) for count in (rows, columns))
        turns = torch.cat(
            (
                down[:, None].expand(rows, columns, WAVES),
                right[None].expand(rows, columns, WAVES),
            ),
            dim=-1,
        )
        # OpenVINO adds within the convolution, and would take what is added to for one image as well.
        turned = turns.permute(2, 0, 1).expand(images if is_tracing() else 1, -1, -1, -1)
        projected: Tensor = self.token_projection(turned.to(weight.dtype))
        return projected


def waves(count: int, *, device: torch.device) -> Tensor:
    """[count, 32]: sine and cosine, by turns, of the positions 1 to `count` scaled to a turn, at falling frequency."""
    positions = torch.arange(1, count + 1, device=device).float()
    positions = positions / (positions[-1:] + 1e-6) * (2 * math.pi)
    steps = torch.arange(0, WAVES, 2, device=device).float()
    angles = positions[:, None] / LONGEST_WAVE ** (steps / WAVES)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class ConvPatchEmbed(nn.Module):
    """Convolutions that halve the image until a position is a patch; key `proj`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        inputs, last, layers = spec.in_channels, len(spec.stem_widths()) - 1, []
        for index, width in enumerate(spec.stem_widths()):
            activation = spec.activation if index < last else ActivationSpec("none")
            layers.append(ConvModule(inputs, width, 3, stride=2, norm=spec.norm, activation=activation))
            inputs = width
        self.proj = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, rows, columns]."""
        maps: Tensor = self.proj(images)
        return maps


class ActivateThenNorm(ConvModule):
    """A convolution whose activation comes before its norm."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        activated: Tensor = self.activate(self.conv(maps))
        return activated if self.norm_name is None else getattr(self, self.norm_name)(activated)


class LocalInteraction(nn.Module):
    """Two depthwise convolutions of the patches; keys `conv1`, `conv2`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        width = spec.width
        self.conv1 = ActivateThenNorm(
            width, width, 3, groups=width, bias=True, norm=spec.norm, activation=spec.activation
        )
        self.conv2 = ConvModule(width, width, 3, groups=width, norm=None, activation=ActivationSpec("none"))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
        mixed: Tensor = self.conv2(self.conv1(maps))
        return mixed.flatten(2).transpose(1, 2)


class ChannelAttention(Scale):
    """Attention among the channels of a head; keys `temperature`, `qkv`, `proj`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.temperature = nn.Parameter(torch.empty(spec.heads, 1, 1))
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.width, spec.width)

    def start(self) -> None:
        """Cosines as they are at first."""
        nn.init.ones_(self.temperature)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        n, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # [n, heads, channels, l]
        cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        mixed = (cosines * self.temperature).softmax(dim=-1) @ value
        projected: Tensor = self.proj(mixed.permute(0, 3, 1, 2).reshape(n, length, width))
        return projected


class ClassAttention(nn.Module):
    """Attention of the class token to all tokens; keys `q`, `k`, `v`, `proj`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        width, self.heads = spec.width, spec.heads
        self.q = nn.Linear(width, width, bias=spec.qkv_bias)
        self.k = nn.Linear(width, width, bias=spec.qkv_bias)
        self.v = nn.Linear(width, width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to what the class token becomes, [n, 1, c]."""
        query, key, value = self.q(tokens[:, :1]), self.k(tokens), self.v(tokens)
        query, key, value = (by_head(part, self.heads) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class ScaledLayer(Scale):
    """Base of layers with a learnt factor a channel on each branch: `gamma1`, …"""

    gamma1: nn.Parameter
    gamma2: nn.Parameter
    gamma3: nn.Parameter

    def add_factors(self, spec: XCiTSpec, *names: str) -> None:
        """Register the factors."""
        self.initial = spec.layer_scale
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(spec.width)))

    def start(self) -> None:
        """The residual branches begin at the config's scale."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, self.initial)


class ChannelLayer(ScaledLayer):
    """Attention among channels, among neighbours, and feed-forward; keys `norm1`, `attn`, `norm3`, `local_mp`, …"""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        self.add_factors(spec, "gamma1", "gamma3", "gamma2")
        self.norm1 = layer_norm(spec)
        self.attn = ChannelAttention(spec)
        self.norm3 = layer_norm(spec)
        self.local_mp = LocalInteraction(spec)
        self.norm2 = layer_norm(spec)
        self.ffn = FeedForward(spec.width, spec.hidden, spec.activation)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.gamma1 * self.attn(self.norm1(tokens))
        tokens = tokens + self.gamma3 * self.local_mp(self.norm3(tokens), grid)
        mixed: Tensor = tokens + self.gamma2 * self.ffn(self.norm2(tokens))
        return mixed


class ClassLayer(ScaledLayer):
    """Attention and feed-forward of the class token; keys `norm1`, `attn`, `norm2`, `ffn`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        self.norms_tokens, self.is_scaled = spec.norms_tokens, spec.layer_scale > 0
        if self.is_scaled:
            self.add_factors(spec, "gamma1", "gamma2")
        self.norm1 = layer_norm(spec)
        self.attn = ClassAttention(spec)
        self.norm2 = layer_norm(spec)
        self.ffn = FeedForward(spec.width, spec.hidden, spec.activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, 1 + l, c] to the same shape.

        The tokens of patches get their norm added and are doubled, as in the official code.
        """
        normed = self.norm1(tokens)
        attended = torch.cat((self.attn(normed), normed[:, 1:]), dim=1)
        tokens = tokens + (self.gamma1 * attended if self.is_scaled else attended)
        token, patches = tokens[:, :1], tokens[:, 1:]
        if self.norms_tokens:
            token, patches = self.norm2(tokens).split((1, patches.shape[1]), dim=1)
        else:
            token = self.norm2(token)
        mixed = self.ffn(token)
        return torch.cat((token + (self.gamma2 * mixed if self.is_scaled else mixed), 2 * patches), dim=1)


class XCiT(Backbone, Scale):
    """Keys `cls_token`, `patch_embed`, `pos_embed`, `xca_layers`, `ca_layers`, `norm`."""

    def __init__(self, spec: XCiTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.patch_embed = ConvPatchEmbed(spec)
        self.pos_embed = FourierPositions(spec) if spec.positions else None
        self.xca_layers = nn.ModuleList(ChannelLayer(spec) for _ in range(spec.layers))
        self.ca_layers = nn.ModuleList(ClassLayer(spec) for _ in range(spec.class_layers))
        self.norm = layer_norm(spec) if spec.final_norm else nn.Identity()

    def start(self) -> None:
        """A small class token at first."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs in `nodes`; stops after the deepest layer asked for."""
        maps = self.patch_embed(images)
        grid = maps.shape[2], maps.shape[3]
        if self.pos_embed is not None:
            maps = maps + self.pos_embed(maps)
        tokens, found = maps.flatten(2).transpose(1, 2), {}
        wanted = [(node, *parse_node(node)) for node in nodes]
        for index in range(max(index for _, index, _ in wanted) + 1):
            tokens = self.run_layer(index, tokens, grid)
            has_token = index >= self.spec.layers
            for node, asked, kind in wanted:
                if asked == index:
                    found[node] = token_output(tokens, grid, kind, has_cls_token=has_token)
        return {node: found[node] for node in nodes}

    def run_layer(self, index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens after a layer, [n, l, c]; the class token joins before the first layer that attends to it."""
        of_class = index - self.spec.layers
        if of_class < 0:
            mixed: Tensor = self.xca_layers[index](tokens, grid)
            return mixed
        tokens = before(self.cls_token, tokens) if of_class == 0 else tokens
        tokens = self.ca_layers[of_class](tokens)
        # Only the last layer of the class token is normed.
        return self.norm(tokens) if index == self.spec.depth - 1 else tokens

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 and above the embeddings, k the first k-1 layers.

        The class token follows where a layer of its own could be frozen, the last norm at the number of layers exactly.
        """
        stages, spec = freeze.stages, self.spec
        if stages is None:
            return freeze_report(self, freeze, ())
        names = ["pos_embed", "patch_embed"]
        names += ["cls_token"] if stages > spec.layers else []
        of_class = max(stages - 1 - spec.layers, 0)
        names += [f"xca_layers.{layer}" for layer in range(min(stages - 1, spec.layers))]
        names += [f"ca_layers.{layer}" for layer in range(of_class)]
        names += ["norm"] if stages == spec.depth else []
        return freeze_report(self, freeze, names)


# --- mmpretrain.XCiT = mmcls.XCiT -----------------------------------------------------------------


class XCiTConfig(TokenConfig):
    """`mmpretrain.XCiT`, which is also `mmcls.XCiT`."""

    NETWORK: ClassVar[str] = "XCiT"

    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Size that images are brought to by default; any other is taken."
    )
    patch_size: PatchSize = 16
    in_channels: InputChannels = 3
    embed_dims: Annotated[int, Field(strict=True, ge=8, le=4096)] = 768
    depth: Annotated[int, Field(strict=True, ge=0, le=64)] = Field(
        12, description="Layers with attention among channels."
    )
    cls_attn_layers: Annotated[int, Field(strict=True, ge=0, le=16)] = Field(
        2, description="Layers of the class token, counted on after the others."
    )
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)] = 12
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = True
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    use_pos_embed: bool = True
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = 1.0
    tokens_norm: bool = Field(False, description="Whether layers of the class token norm all tokens.")
    final_norm: bool = True
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=128)] = Field(
        -1, description="-1 nothing, 0 and 1 the embeddings, k > 1 the first k - 1 layers too."
    )
    bn_norm_cfg: NormConfig = batch_norm()
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        if any(side % self.patch_size for side in self.image_size()):
            yield "img_size", f"patches of {self.patch_size} px do not divide {list(self.image_size())}"
        if not spec.depth:
            yield "depth", "there must be a layer"
        if self.embed_dims % self.num_heads:
            yield "num_heads", f"{self.num_heads} heads do not divide {self.embed_dims} embed_dims"
        if not spec.hidden:
            yield "mlp_ratio", f"leaves nothing of {self.embed_dims} embed_dims"
        if not self.final_norm and self.cls_attn_layers:
            yield "final_norm", "layers of the class token end in a norm: final_norm must be true"
        if self.frozen_stages > spec.depth + 1:
            yield "frozen_stages", f"{self.frozen_stages} is more than {spec.depth} layers and 1"
        if self.frozen_stages == spec.depth and not self.final_norm:
            yield "frozen_stages", f"{self.frozen_stages} would freeze the last norm; final_norm is false"
        yield from self._norm_faults(spec)

    def _norm_faults(self, spec: XCiTSpec) -> Iterator[tuple[str, str]]:
        if (fault := norm_fault(self.bn_norm_cfg, spec.stem_widths())) is not None:
            yield f"bn_{fault[0]}", fault[1]
        if self.bn_norm_cfg.requires_grad != self.norm_cfg.requires_grad:
            yield "bn_norm_cfg/requires_grad", "must be that of norm_cfg"

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def spec(self) -> XCiTSpec:
        """The neutral spelling."""
        return XCiTSpec(
            width=self.embed_dims,
            layers=self.depth,
            class_layers=self.cls_attn_layers,
            heads=self.num_heads,
            hidden=int(self.embed_dims * self.mlp_ratio),
            patch_size=self.patch_size,
            norm=self.bn_norm_cfg.spec(),
            activation=self.act_cfg.spec(),
            eps=self.norm_cfg.eps,
            qkv_bias=self.qkv_bias,
            positions=self.use_pos_embed,
            layer_scale=self.layer_scale_init_value,
            norms_tokens=self.tokens_norm,
            final_norm=self.final_norm,
            in_channels=self.in_channels,
            prefix_tokens=int(self._all_have_the_class_token()),
        )

    def _all_have_the_class_token(self) -> bool:
        depth = self.depth + self.cls_attn_layers
        layers = [index if index >= 0 else index + depth for index in self.out_indices]
        return self.out_type == "raw" and min(layers) >= self.depth

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return replace(super().freeze(), stages=stages, all_norms=not self.norm_cfg.requires_grad)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())


_TIMM_BLOCK = {
    "local_mp.conv1.bn.{leaf}": "local_mp.bn.{leaf}",
    "local_mp.conv{k}.conv.{leaf}": "local_mp.conv{k}.{leaf}",
    "ffn.layers.0.0.{leaf}": "mlp.fc1.{leaf}",
    "ffn.layers.1.{leaf}": "mlp.fc2.{leaf}",
    "gamma{k}": "gamma{k}",
    "norm{k}.{leaf}": "norm{k}.{leaf}",
    "attn.{rest}": "attn.{rest}",
}
XCIT_NAMES = Naming(
    "XCiT",
    own=("mmpretrain",),
    marks=("patch_embed.proj.0.conv.weight", "xca_layers.0.attn.temperature", "ca_layers.0.attn.q.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "cls_token": "cls_token",
                    # between the convolutions there are activations
                    **{
                        f"patch_embed.proj.{i}.conv.{{leaf}}": f"patch_embed.proj.{2 * i}.0.{{leaf}}"
                        for i in range(4)
                    },
                    **{
                        f"patch_embed.proj.{i}.bn.{{leaf}}": f"patch_embed.proj.{2 * i}.1.{{leaf}}"
                        for i in range(4)
                    },
                    "pos_embed.token_projection.conv.{leaf}": "pos_embed.token_projection.{leaf}",
                    **below("xca_layers.{i}.", "blocks.{i}.", _TIMM_BLOCK),
                    **below("ca_layers.{i}.", "cls_attn_blocks.{i}.", _TIMM_BLOCK),
                    "norm.{leaf}": "norm.{leaf}",
                }
            ),
        ),
    ),
)


XCIT = make_family(
    XCiTConfig,
    XCiT,
    example={"embed_dims": 128, "num_heads": 4, "out_type": "featmap", "out_indices": [3, 7, 11]},
    prefix_tokens=lambda spec: spec.prefix_tokens,
    naming=XCIT_NAMES,
)
