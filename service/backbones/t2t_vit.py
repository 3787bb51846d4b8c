"""T2T-ViT (Yuan et al., arXiv:2101.11986) with mmpretrain's key names, computed as mmpretrain 1.x computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.freezing import freeze_report, norm_names
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, Computed, Scale, make_family
from service.backbones.token_outputs import TokenConfig, parse_node, token_features, token_output
from service.backbones.tracing import is_tracing
from service.backbones.transformer_layers import FeedForward, by_head
from service.backbones.vision_transformer import MAX_PATCHES, Interpolation, before, resize_pos_embed
from service.config.spec import FeatureInfo, Freeze, FreezeReport, PreprocessDefaults
from service.errors import TooLarge

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

STRIDE = 16
GELU = ActivationSpec("gelu")
LONGEST_WAVE = 10_000


@dataclass(frozen=True)
class SplitSpec:
    """Patches that overlap: kernel, stride and padding in pixels."""

    kernel: int
    stride: int
    padding: int

    def size(self, side: int) -> int:
        """How many there are along a side."""
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


FIRST_SPLIT, SPLIT = SplitSpec(7, 4, 2), SplitSpec(3, 2, 1)


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the encoder; `hidden` is the inner width of its feed-forward network of `linears` layers."""

    width: int
    heads: int
    hidden: int
    linears: int = 2
    qkv_bias: bool = False
    eps: float = 1e-5
    activation: ActivationSpec = GELU


@dataclass(frozen=True)
class T2TSpec:
    """What decides the numbers and the names of the weights.

    `side` is of the square of patches that the positions are for, `token_width` the width of the tokens that are not
    patches yet. `eps` is of the last norm.
    """

    width: int
    layers: tuple[LayerSpec, ...]
    side: int
    token_width: int = 64
    with_cls_token: bool = True
    final_norm: bool = True
    eps: float = 1e-5
    interpolation: Interpolation = "bicubic"
    in_channels: int = 3

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return int(self.with_cls_token)

    @property
    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches that the positions are for."""
        return self.side, self.side

    def features(self) -> tuple[FeatureInfo, ...]:
        """Every output of every layer."""
        return token_features(self.width, STRIDE, [self.with_cls_token] * len(self.layers))


class Attention(nn.Module):
    """Multi-head self-attention from one width to another; keys `qkv`, `proj`.

    mmpretrain 1.x multiplies by the root of a head's width, where the original network divides by it. That makes the
    softmax so sharp that the order of operations decides its largest entry: it is the library's, in whatever batch.
    """

    def __init__(self, spec: LayerSpec, inputs: int, *, adds_value: bool) -> None:
        super().__init__()
        self.heads, self.adds_value = spec.heads, adds_value
        self.qkv = nn.Linear(inputs, 3 * spec.width, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, inputs] to [n, l, c]."""
        qkv = self.qkv(tokens)
        query, key, value = (by_head(part, self.heads) for part in qkv.chunk(3, dim=-1))
        # Image by image: the map of attention among the first tokens is large. A trace has no turns.
        turns = 1 if is_tracing() else len(tokens)
        images = zip(*(part.chunk(turns) for part in (query, key, value)), strict=True)
        mixed = torch.cat([attend(*parts) for parts in images])
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return qkv[..., -projected.shape[-1] :] + projected if self.adds_value else projected


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of [n, heads, l, c], whose logits are multiplied by the root of c, to the same shape."""
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** -0.5
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


class Layer(nn.Module):
    """Pre-norm attention and feed-forward; keys `ln1`, `attn`, `ln2`, `ffn`.

    Between different widths there is no residual around the attention: the values are added.
    """

    def __init__(self, spec: LayerSpec, inputs: int | None = None) -> None:
        super().__init__()
        self.is_residual = inputs is None
        inputs = spec.width if inputs is None else inputs
        self.ln1 = nn.LayerNorm(inputs, eps=spec.eps)
        self.attn = Attention(spec, inputs, adds_value=not self.is_residual)
        self.ln2 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.ffn = FeedForward(spec.width, spec.hidden, spec.activation, linears=spec.linears)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, inputs] to [n, l, c]."""
        attended = self.attn(self.ln1(tokens))
        tokens = tokens + attended if self.is_residual else attended
        mixed: Tensor = tokens + self.ffn(self.ln2(tokens))
        return mixed


class TokensToToken(nn.Module):
    """Three splits into overlapping patches with attention between; keys `attention1`, `attention2`, `project`."""

    def __init__(self, spec: T2TSpec) -> None:
        super().__init__()
        width = spec.token_width
        layer = LayerSpec(width, heads=1, hidden=width)
        self.attention1 = Layer(layer, spec.in_channels * FIRST_SPLIT.kernel**2)
        self.attention2 = Layer(layer, width * SPLIT.kernel**2)
        self.project = nn.Linear(width * SPLIT.kernel**2, spec.width)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[n, c, h, w] to tokens [n, rows * columns, width] and (rows, columns).

        Raises:
            TooLarge: more than 16384 tokens after the first split.
        """
        tokens, grid = split(images, FIRST_SPLIT)
        for attention in (self.attention1, self.attention2):
            tokens = attention(tokens)
            tokens, grid = split(tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid), SPLIT)
        return self.project(tokens), grid


def split(maps: Tensor, spec: SplitSpec) -> tuple[Tensor, tuple[int, int]]:
    """[n, c, h, w] to overlapping patches, [n, rows * columns, c * kernel²], and (rows, columns)."""
    grid = spec.size(maps.shape[2]), spec.size(maps.shape[3])
    if math.prod(grid) > MAX_PATCHES:
        raise TooLarge(f"{math.prod(grid)} tokens; the limit is {MAX_PATCHES}")
    patches = F.unfold(maps, spec.kernel, padding=spec.padding, stride=spec.stride)
    return patches.transpose(1, 2), grid


def sinusoids(length: int, width: int) -> Tensor:
    """[1, length, width]: sine and cosine, by turns, of the positions at falling frequency."""
    channels = torch.arange(width, dtype=torch.float64)
    waves = LONGEST_WAVE ** (2 * channels.div(2, rounding_mode="floor") / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] / waves
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())[None].float()


class T2TViT(Backbone, Scale, Computed):
    """Keys `cls_token`, `pos_embed`, `tokens_to_token`, `encoder`, `norm`.

    The positions are computed, and a checkpoint may have others.
    """

    pos_embed: Tensor

    def __init__(self, spec: T2TSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width)) if spec.with_cls_token else None
        self.register_buffer("pos_embed", torch.empty(1, spec.side**2 + spec.extra_tokens, spec.width))
        self.tokens_to_token = TokensToToken(spec)
        self.encoder = nn.ModuleList(Layer(layer) for layer in spec.layers)
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps) if spec.final_norm else nn.Identity()

    def start(self) -> None:
        """A small class token."""
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def compute(self) -> None:
        """The positions, which follow from the size of the grid."""
        self.pos_embed.copy_(sinusoids(self.pos_embed.shape[1], self.spec.width))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs in `nodes`; stops after the deepest layer asked for."""
        tokens, grid = self.embed(images)
        wanted, found = [(node, *parse_node(node)) for node in nodes], {}
        for index in range(max(index for _, index, _ in wanted) + 1):
            tokens = self.encoder[index](tokens)
            # Only the last layer is normed.
            tokens = self.norm(tokens) if index == len(self.encoder) - 1 else tokens
            for node, asked, kind in wanted:
                if asked == index:
                    has_token = self.spec.with_cls_token
                    found[node] = token_output(tokens, grid, kind, has_cls_token=has_token)
        return {node: found[node] for node in nodes}

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, extra + rows * columns, c], and (rows, columns)."""
        tokens, grid = self.tokens_to_token(images)
        if self.cls_token is not None:
            tokens = before(self.cls_token, tokens)
        spec = self.spec
        positions = resize_pos_embed(self.pos_embed, spec.grid, grid, spec.extra_tokens, spec.interpolation)
        return tokens + positions, grid

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every output
        """All weights but the positions, which are computed where a file has none."""
        return frozenset(name for name in self.state_dict() if name != "pos_embed")

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing but the encoder's and the last norm where `norm_cfg` says so: the library has no rule."""
        norms = [name for name in norm_names(self) if not name.startswith("tokens_to_token.")]
        names = norms if freeze.all_norms else []
        return freeze_report(self, replace(freeze, all_norms=False), names, norms_follow=False)


# --- mmpretrain.T2T_ViT = mmcls.T2T_ViT -----------------------------------------------------------


class TokensConfig(BaseModel):
    """What `t2t_cfg` may change of the splits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_dims: Annotated[int, Field(strict=True, ge=1, le=1024)] = 64
    use_performer: Literal[False] = False


class LayerConfig(BaseModel):
    """What `layer_cfgs` may change of a layer of the encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)] = 6
    feedforward_channels: Annotated[int, Field(strict=True, ge=1, le=16384)] | None = Field(
        None, description="null is three times embed_dims."
    )
    num_fcs: Annotated[int, Field(strict=True, ge=2, le=8)] = 2
    qkv_bias: bool = False
    qk_scale: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="Changes nothing: the library does not use its value."
    )
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    norm_cfg: LayerNormConfig | None = Field(None, description="null is that of the backbone.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")


class T2TConfig(TokenConfig):
    """`mmpretrain.T2T_ViT`, which is also `mmcls.T2T_ViT`."""

    NETWORK: ClassVar[str] = "T2T_ViT"

    img_size: Annotated[int, Field(strict=True, ge=STRIDE, le=2048)] = Field(
        224, description="Side of the images that the positions are for; images of any size are taken."
    )
    in_channels: InputChannels = 3
    embed_dims: Annotated[int, Field(strict=True, ge=1, le=4096)] = 384
    num_layers: Annotated[int, Field(strict=True, ge=1, le=64)] = 14
    out_indices: Indices = Field((-1,), description="Layers from 0; negative ones count from the end.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    final_norm: bool = True
    with_cls_token: bool = True
    interpolate_mode: Interpolation = "bicubic"
    t2t_cfg: TokensConfig = TokensConfig()
    layer_cfgs: LayerConfig | Annotated[tuple[LayerConfig, ...], Field(max_length=64)] = LayerConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if not self.with_cls_token and self.out_type == "cls_token":
            yield "with_cls_token", "must be true where out_type is cls_token"
        if isinstance(self.layer_cfgs, tuple) and len(self.layer_cfgs) < self.num_layers:
            yield "layer_cfgs", f"has {len(self.layer_cfgs)} entries for {self.num_layers} layers"
            return
        for layer in self.layers():
            if self.embed_dims % layer.num_heads:
                yield "layer_cfgs", f"{layer.num_heads} heads do not divide {self.embed_dims} embed_dims"
            if layer.norm_cfg and layer.norm_cfg.requires_grad != self.norm_cfg.requires_grad:
                yield "layer_cfgs", "norm_cfg.requires_grad must be that of the backbone's norm_cfg"

    def layers(self) -> tuple[LayerConfig, ...]:
        """What each layer is configured as."""
        given = self.layer_cfgs
        return given[: self.num_layers] if isinstance(given, tuple) else (given,) * self.num_layers

    def _layer(self, given: LayerConfig) -> LayerSpec:
        hidden = given.feedforward_channels
        return LayerSpec(
            width=self.embed_dims,
            heads=given.num_heads,
            hidden=3 * self.embed_dims if hidden is None else hidden,
            linears=given.num_fcs,
            qkv_bias=given.qkv_bias,
            eps=(given.norm_cfg or self.norm_cfg).eps,
            activation=given.act_cfg.spec(),
        )

    def spec(self) -> T2TSpec:
        """The neutral spelling."""
        return T2TSpec(
            width=self.embed_dims,
            layers=tuple(self._layer(layer) for layer in self.layers()),
            side=self.img_size // STRIDE,
            token_width=self.t2t_cfg.token_dims,
            with_cls_token=self.with_cls_token,
            final_norm=self.final_norm,
            eps=self.norm_cfg.eps,
            interpolation=self.interpolate_mode,
            in_channels=self.in_channels,
        )

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(self.img_size, self.img_size))


def fit_positions(config: T2TConfig, state: StateDict) -> StateDict:
    """`state` with the positions of a square grid of another size resized, as mmpretrain does at load."""
    spec = config.spec()
    return {
        name: _fitted(tensor, spec) if name.rpartition(".")[2] == "pos_embed" else tensor
        for name, tensor in state.items()
    }


def _fitted(positions: Tensor, spec: T2TSpec) -> Tensor:
    if positions.ndim != 3 or positions.shape[0] != 1 or positions.shape[1] <= spec.extra_tokens:
        return positions
    patches = positions.shape[1] - spec.extra_tokens
    side = math.isqrt(patches)
    if side**2 != patches:
        return positions
    return resize_pos_embed(positions, (side, side), spec.grid, spec.extra_tokens, spec.interpolation)


def _may_be_computed(config: T2TConfig, state: StateDict) -> Callable[[str], bool]:  # noqa: ARG001 - always
    return lambda name: name == "pos_embed"


T2T_VIT = make_family(
    T2TConfig,
    T2TViT,
    example={"embed_dims": 384, "num_layers": 14, "out_type": "featmap", "out_indices": [4, 9, 13]},
    adapt=fit_positions,
    optional=_may_be_computed,
    prefix_tokens=lambda spec: spec.extra_tokens,
)
