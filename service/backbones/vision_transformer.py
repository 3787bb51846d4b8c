"""VisionTransformer (Dosovitskiy et al., arXiv:2010.11929) with mmpretrain's key names.

One network gives every output that a config may ask of a layer: its nodes are `11.raw`, `11.cls_token`,
`11.featmap` and, where the network has the norm for it, `11.avg_featmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import (
    Backbone,
    BackboneConfig,
    DropRate,
    Family,
    Indices,
    InputChannels,
    levels_by_index,
)
from service.backbones.freezing import freeze_report
from service.backbones.norms import NORMS, LayerNormConfig, NormSpec, make_norm
from service.backbones.openmmlab import OneForAll, Scale, allocated, settle_computed
from service.backbones.tracing import ceil_div, is_known
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, rules
from service.checkpoints.load import load_strict
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Layout,
    Level,
    LoadedKeys,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import TooLarge

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

MAX_PATCHES = 16_384  # 2048 px in patches of 16
OutType = Literal["raw", "cls_token", "featmap", "avg_featmap"]
OutputKind = OutType | Literal["dist_token"]  # the latter comes with the class token
Activation = Literal["gelu", "quick_gelu", "silu", "relu"]
Interpolation = Literal["bicubic", "bilinear"]
LAYOUTS: dict[OutputKind, Layout] = {
    "raw": "NLC",
    "cls_token": "NC",
    "dist_token": "NC",
    "featmap": "NCHW",
    "avg_featmap": "NC",
}


@dataclass(frozen=True)
class Size:
    """Widths of a transformer; `hidden` is the inner width of its feed-forward network."""

    width: int
    layers: int
    heads: int
    hidden: int


SIZES: dict[str, Size] = {
    name: size
    for names, size in (
        (("s", "small"), Size(768, 8, 8, 2304)),
        (("b", "base", "deit-b", "deit-base"), Size(768, 12, 12, 3072)),
        (("l", "large"), Size(1024, 24, 16, 4096)),
        (("h", "huge"), Size(1280, 32, 16, 5120)),
        (("eva-g", "eva-giant"), Size(1408, 40, 16, 6144)),
        (("deit-t", "deit-tiny"), Size(192, 12, 3, 768)),
        (("deit-s", "deit-small", "dinov2-s", "dinov2-small"), Size(384, 12, 6, 1536)),
        (("dinov2-g", "dinov2-giant"), Size(1536, 40, 24, 6144)),
    )
    for name in names
}


@dataclass(frozen=True)
class VisionTransformerSpec:
    """What decides a VisionTransformer's numbers and the names of its weights.

    `grid` is [rows, columns] of the patches that `pos_embed` is made for. `average_norm` is the norm that
    only `avg_featmap` has. `layer_scale` is the initial factor of the residual branches, 0 for none.
    `drops_cls_token`: there is a class token, which is taken off again before the layers.
    """

    size: Size
    grid: tuple[int, int]
    patch_size: int = 16
    in_channels: int = 3
    patch_bias: bool = True
    qkv_bias: bool = True
    with_cls_token: bool = True
    norm: NormSpec = NormSpec("ln", 1e-6)  # noqa: RUF009 - frozen
    pre_norm: bool = False
    final_norm: bool = True
    average_norm: bool = False
    layer_scale: float = 0.0
    activation: Activation = "gelu"
    swiglu: bool = False
    interpolation: Interpolation = "bicubic"
    drops_cls_token: bool = False

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return int(self.with_cls_token)

    @property
    def native_size(self) -> tuple[int, int]:
        """[height, width] in pixels of the images that `pos_embed` is made for."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def extra_positions(self) -> int:
        """Positions in `pos_embed` before those of the patches."""
        return self.extra_tokens + int(self.drops_cls_token)

    @property
    def has_cls_token(self) -> bool:
        """Whether there is a class token among the weights."""
        return self.with_cls_token or self.drops_cls_token

    @property
    def tokens(self) -> int:
        """Length of `pos_embed`."""
        return self.extra_positions + self.grid[0] * self.grid[1]

    def out_types(self) -> tuple[OutputKind, ...]:
        """The outputs of every layer."""
        types: list[OutputKind] = ["raw"]
        types += ["cls_token"] if self.with_cls_token else []
        types += ["featmap"]
        types += ["avg_featmap"] if self.average_norm else []
        return tuple(types)

    def features(self) -> tuple[FeatureInfo, ...]:
        """Every output of every layer; only the maps have a stride."""
        return tuple(
            FeatureInfo(layer, f"{layer}.{kind}", self.size.width, self._stride(kind), LAYOUTS[kind])
            for layer in range(self.size.layers)
            for kind in self.out_types()
        )

    def _stride(self, kind: OutputKind) -> int | None:
        return self.patch_size if kind == "featmap" else None


def quick_gelu(tokens: Tensor) -> Tensor:
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return tokens * torch.sigmoid(1.702 * tokens)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}


class LayerScale(Scale):
    """A learnt factor a channel (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(width))

    def start(self) -> None:
        """The factors begin alike."""
        nn.init.constant_(self.weight, self.initial)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        return tokens * self.weight


def _layer_scale(spec: VisionTransformerSpec) -> nn.Module:
    return LayerScale(spec.size.width, spec.layer_scale) if spec.layer_scale > 0 else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention; keys `qkv`, `proj`, `gamma1.weight`."""

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        width = spec.size.width
        self.heads = spec.size.heads
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.gamma1 = _layer_scale(spec)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        n, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.gamma1(self.proj(mixed.transpose(1, 2).reshape(n, length, width)))
        return projected


class FeedForward(nn.Module):
    """Two linear layers; keys `layers.0.0`, `layers.1`, `gamma2.weight`."""

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        width, hidden = spec.size.width, spec.size.hidden
        # mmcv nests the first layer with its activation and dropout.
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden)), nn.Linear(hidden, width))
        self.gamma2 = _layer_scale(spec)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        wide = self.activation(self.layers[0](tokens))
        projected: Tensor = self.gamma2(self.layers[1](wide))
        return projected


class SwiGLU(nn.Module):
    """SiLU-gated feed-forward (Shazeer, arXiv:2002.05202); keys `w12`, `w3`, `gamma2.weight`.

    The inner width is two thirds of the configured one, rounded up to a multiple of 8.
    """

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        width = spec.size.width
        hidden = (int(spec.size.hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.gamma2 = _layer_scale(spec)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        projected: Tensor = self.gamma2(self.w3(F.silu(gate) * value))
        return projected


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        self.ln1 = make_norm(spec.norm, spec.size.width)
        self.attn = Attention(spec)
        self.ln2 = make_norm(spec.norm, spec.size.width)
        self.ffn = SwiGLU(spec) if spec.swiglu else FeedForward(spec)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.attn(self.ln1(tokens))
        mixed: Tensor = tokens + self.ffn(self.ln2(tokens))
        return mixed


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each; pads right and bottom to whole patches."""

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        self.patch_size = spec.patch_size
        self.projection = nn.Conv2d(
            spec.in_channels, spec.size.width, spec.patch_size, stride=spec.patch_size, bias=spec.patch_bias
        )

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[n, c, h, w] to tokens [n, rows * columns, width] and (rows, columns).

        Raises:
            TooLarge: more than 16384 patches.
        """
        height, width = images.shape[-2:]
        self._refuse_too_many(ceil_div(height, self.patch_size) * ceil_div(width, self.patch_size))
        padded = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        maps = self.projection(padded)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])

    def _refuse_too_many(self, patches: int) -> None:
        """Attention grows with the square of the patches: an unbounded image would hold the device for hours."""
        if patches > MAX_PATCHES:
            raise TooLarge(f"{patches} patches of {self.patch_size} px; the limit is {MAX_PATCHES}")


def resize_pos_embed(
    pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], extra: int, mode: Interpolation
) -> Tensor:
    """Position embeddings of another grid of patches.

    Args:
        pos_embed: [1, extra + rows * columns, c].
        source: its (rows, columns).
        target: the (rows, columns) wanted.
        extra: tokens before the grid, kept as they are.
        mode: interpolated with `align_corners=False` and no antialiasing, as mmpretrain does.
    """
    if is_known(target, source):
        return pos_embed
    grid = pos_embed[:, extra:].reshape(1, *source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid.float(), size=target, mode=mode, align_corners=False)
    return torch.cat([pos_embed[:, :extra], resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def before(token: Tensor, tokens: Tensor) -> Tensor:
    """[n, l, c] with a learnt token, [1, 1, c], in front."""
    return torch.cat([token.expand(tokens.shape[0], -1, -1), tokens], dim=1)


class VisionTransformer(Backbone):
    """A VisionTransformer whose state dict has mmpretrain's keys; relatives differ in `make_layer` and `embed`."""

    def __init__(self, spec: VisionTransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        width = spec.size.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if spec.has_cls_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, spec.tokens, width))
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.ModuleList(self.make_layer() for _ in range(spec.size.layers))
        self.pre_norm = self._norm(spec.pre_norm)
        self.ln1 = self._norm(spec.final_norm)
        self.ln2 = self._norm(spec.average_norm)

    def make_layer(self) -> nn.Module:
        """One of `layers`."""
        return TransformerLayer(self.spec)

    def _norm(self, wanted: bool) -> nn.Module:
        return make_norm(self.spec.norm, self.spec.size.width) if wanted else nn.Identity()

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs in `nodes`; stops after the deepest layer asked for."""
        tokens, grid = self.embed(images)
        wanted = [(node, *_parse_node(node)) for node in nodes]
        found = {}
        for index in range(max(index for _, index, _ in wanted) + 1):
            tokens = self.run_layer(index, tokens, grid)
            # The final norm belongs to the last layer only: earlier outputs are not normalised.
            last = index == len(self.layers) - 1
            output = self.ln1(tokens) if last else tokens
            for node, asked, kind in wanted:
                if asked == index:
                    found[node] = self.output(output, grid, kind)
        return {node: found[node] for node in nodes}

    def run_layer(self, index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002 - relatives use it
        """[n, l, c] to [n, l, c]; `grid` is (rows, columns) of the patches."""
        mixed: Tensor = self.layers[index](tokens)
        return mixed

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, extra + rows * columns, c], and (rows, columns)."""
        tokens, grid = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = before(self.cls_token, tokens)
        tokens = self.pre_norm(tokens + self.positions(grid))
        return (tokens[:, 1:] if self.spec.drops_cls_token else tokens), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """`pos_embed` for a grid of patches."""
        spec = self.spec
        return resize_pos_embed(self.pos_embed, spec.grid, grid, spec.extra_positions, spec.interpolation)

    def output(self, tokens: Tensor, grid: tuple[int, int], kind: str) -> Tensor:
        """What a layer gives under a kind of output."""
        if kind == "raw":
            return tokens
        if kind == "cls_token":
            return tokens[:, 0]
        patches = tokens[:, self.spec.extra_tokens :]
        if kind == "featmap":
            return patches.transpose(1, 2).reshape(-1, self.spec.size.width, *grid)
        averaged: Tensor = self.ln2(patches.mean(dim=1))
        return averaged

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k >= 1 is the embeddings and k layers, at full depth also the last norms.

        The norms stay in train mode, as they do there.
        """
        stages = freeze.stages or 0
        names = ["cls_token", "pos_embed", "patch_embed", "pre_norm"] if stages > 0 else []
        names += [f"layers.{index}" for index in range(stages)]
        names += ["ln1", "ln2"] if stages == len(self.layers) else []
        return freeze_report(self, freeze, names, norms_follow=False)


def _parse_node(node: str) -> tuple[int, str]:
    index, _, kind = node.partition(".")
    return int(index), kind


def initialise(network: VisionTransformer) -> None:
    """Truncated normal: 0.02 for linear layers and positions, LeCun's for patches; 1 and 0 for norms."""
    for module in network.modules():
        if isinstance(module, NORMS):
            module.reset_parameters()
        elif isinstance(module, Scale):
            module.start()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            _initialise_weight(module)
    for name, parameter in network.named_parameters(recurse=False):
        if name == "cls_token":
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)


def _initialise_weight(module: nn.Linear | nn.Conv2d) -> None:
    std = 0.02 if isinstance(module, nn.Linear) else math.prod(module.weight.shape[1:]) ** -0.5
    nn.init.trunc_normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def fit_pos_embed(state: StateDict, spec: VisionTransformerSpec) -> StateDict:
    """`state` with its `pos_embed` made to fit, as mmpretrain does at load, under whatever prefix.

    Without a class token, a file that has one loses its first position. A square grid of another size is
    resized. What still does not fit is left for the strict load to refuse.
    """
    return {
        name: _fitted(tensor, spec) if name.rpartition(".")[2] == "pos_embed" else tensor
        for name, tensor in state.items()
    }


def _fitted(pos_embed: Tensor, spec: VisionTransformerSpec) -> Tensor:
    if pos_embed.ndim != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[2] != spec.size.width:
        return pos_embed
    length = pos_embed.shape[1]
    if not spec.has_cls_token and (length == spec.tokens + 1 or _is_square(length - 1)):
        pos_embed, length = pos_embed[:, 1:], length - 1
    patches = length - spec.extra_positions
    if length == spec.tokens or not _is_square(patches):
        return pos_embed
    side = math.isqrt(patches)
    return resize_pos_embed(pos_embed, (side, side), spec.grid, spec.extra_positions, spec.interpolation)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


# --- mmpretrain.VisionTransformer = mmcls.VisionTransformer ---------------------------------------

Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
FEED_FORWARDS = {"origin": False, "swiglu_fused": True}
GELUS: dict[str, Activation] = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "mmpretrain.QuickGELU": "quick_gelu",
    "mmcls.QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
# What `output_cls_token` of mmcls 0.x returns for an index, as (suffix of the level's name, node).
WITH_CLS_TOKEN: tuple[tuple[str, OutputKind], ...] = (("", "featmap"), (".cls", "cls_token"))


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=4096)]
    num_layers: Annotated[int, Field(strict=True, ge=1, le=64)]
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)]
    feedforward_channels: Annotated[int, Field(strict=True, ge=1, le=16384)]

    def size(self) -> Size:
        """The neutral spelling."""
        return Size(self.embed_dims, self.num_layers, self.num_heads, self.feedforward_channels)


class PatchConfig(BaseModel):
    """What `patch_cfg` may change of the patch embedding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bias: bool | None = None
    conv_type: Literal["Conv2d"] = "Conv2d"


class ActivationConfig(BaseModel):
    """OpenMMLab's `act_cfg`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["GELU", "QuickGELU", "mmpretrain.QuickGELU", "mmcls.QuickGELU", "ReLU", "SiLU"]


class PlainLayerConfig(BaseModel):
    """What `layer_cfgs` may change of every layer of a relative."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")

    @model_validator(mode="before")
    @classmethod
    def _of_all_layers(cls, raw: Any) -> Any:
        """The library takes a list, too, one entry a layer; here all of them must be the same."""
        if not isinstance(raw, (list, tuple)):
            return raw
        if not raw or any(entry != raw[0] for entry in raw):
            raise ValueError("layers that differ from each other are not served; give one object for all")
        return raw[0]


class LayerConfig(PlainLayerConfig):
    """What `layer_cfgs` may change of every layer."""

    ffn_type: Literal["origin", "swiglu_fused"] = "origin"


def arch_or_object(names: Iterable[str]) -> BeforeValidator:
    """A validator of `arch`: names in lower case, as the library matches them; an unknown one lists those known."""
    known = tuple(names)

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower() not in known:
            raise ValueError(f"is not one of {', '.join(known)}, nor an object")
        return value.lower()

    return BeforeValidator(check)


def size_fault(size: Size) -> Iterator[tuple[str, str]]:
    """What does not fit in the widths of a transformer, as (key, detail)."""
    if size.width % size.heads:
        yield "arch/num_heads", f"{size.heads} heads do not divide {size.width} embed_dims"


class TransformerConfig(BackboneConfig):
    """The keys that VisionTransformer and its relatives in mmpretrain have in common.

    mmcls 0.x had `output_cls_token` (true by default) where mmpretrain has `out_type` (`cls_token` by
    default); both are understood in both scopes, with the default of the scope that was written.
    `NETWORK` names what scopes share, `ARCHS` are the names that `arch` may have. `MMCLS_HAS_CLS_TOKEN` is that
    default of mmcls.
    """

    NETWORK: ClassVar[str]
    ARCHS: ClassVar[Mapping[str, Size]] = SIZES
    MMCLS_HAS_CLS_TOKEN: ClassVar[bool] = True

    arch: str | ArchConfig
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that the position embeddings are for; images of any size are taken."
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    in_channels: InputChannels = 3
    out_indices: Indices = Field((-1,), description="Layers from 0; negative ones count from the end.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    final_norm: bool = True
    out_type: OutType | None = Field(None, description="null is cls_token.")
    output_cls_token: bool | None = Field(
        None,
        description="mmcls 0.x: true returns a map and its class token, false the map. True for mmcls types.",
    )
    with_cls_token: bool = True
    interpolate_mode: Interpolation = "bicubic"
    patch_cfg: PatchConfig = PatchConfig()
    layer_cfgs: Annotated[PlainLayerConfig, OneForAll] = PlainLayerConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_of_scope(cls, raw: Any, info: ValidationInfo) -> Any:
        scope = (info.context or {}).get("scope")
        if scope != "mmcls" or not cls.MMCLS_HAS_CLS_TOKEN or not isinstance(raw, Mapping):
            return raw
        unsaid = raw.get("out_type") is None and raw.get("output_cls_token") is None
        return {**raw, "output_cls_token": True} if unsaid else raw

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.out_type is not None and self.output_cls_token is not None:
            yield "output_cls_token", "is mmcls's older spelling of out_type; give one of them"
        if not self.with_cls_token and "cls_token" in dict(self.outputs()).values():
            key = "out_type" if self.output_cls_token is None else "output_cls_token"
            yield key, f"{key} that returns the class token needs with_cls_token"
        yield from size_fault(self.size())
        rows, columns = self.grid()
        if rows * columns > MAX_PATCHES:
            yield "img_size", f"{rows * columns} patches of {self.patch_size} px; the limit is {MAX_PATCHES}"

    def outputs(self) -> tuple[tuple[str, OutputKind], ...]:
        """What each index returns, as (suffix of the level's name, kind of node)."""
        if self.output_cls_token is not None:
            return WITH_CLS_TOKEN if self.output_cls_token else (("", "featmap"),)
        return (("", self.given_out_type()),)

    def given_out_type(self) -> OutType:
        """`out_type`, or what a null is."""
        return self.out_type or "cls_token"

    def size(self) -> Size:
        """The widths that `arch` names or spells out."""
        return self.ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.size()

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches of an image of `img_size`."""
        height, width = self.image_size()
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def spec(self) -> VisionTransformerSpec:
        """The neutral spelling of the keys that all have."""
        bias = self.patch_cfg.bias
        return VisionTransformerSpec(
            size=self.size(),
            grid=self.grid(),
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            patch_bias=bias if bias is not None else True,
            with_cls_token=self.with_cls_token,
            norm=NormSpec("ln", self.norm_cfg.eps),
            final_norm=self.final_norm,
            average_norm="avg_featmap" in dict(self.outputs()).values(),
            activation=GELUS[self.layer_cfgs.act_cfg.type],
            interpolation=self.interpolate_mode,
            # mmcls makes a class token even where it does not use it; mmpretrain does not.
            drops_cls_token=self.output_cls_token is not None and not self.with_cls_token,
        )

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training or the reply reads makes no second model."""
        return {"type": self.NETWORK, **asdict(self.spec())}

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`: one an index, or a map and its class token."""
        return tuple(
            Level(level.index, f"{level.index}{suffix}", f"{level.index}.{kind}")
            for level in levels_by_index(self.out_indices, description.features)
            for suffix, kind in self.outputs()
        )


class FreezableTransformerConfig(TransformerConfig):
    """Those of them whose layers can be frozen."""

    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        -1, description="k >= 1 freezes the embeddings and k layers."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        layers = self.size().layers
        if self.frozen_stages > layers:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {layers} layers"

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return replace(super().freeze(), stages=stages)


class VisionTransformerConfig(FreezableTransformerConfig):
    """`mmpretrain.VisionTransformer`, which is also `mmcls.VisionTransformer`."""

    NETWORK: ClassVar[str] = "mmpretrain.VisionTransformer"

    arch: Annotated[
        str | ArchConfig, arch_or_object(SIZES), Field(json_schema_extra={"examples": list(SIZES)})
    ] = "base"
    qkv_bias: bool = True
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = 0.0
    layer_cfgs: Annotated[LayerConfig, OneForAll] = LayerConfig()
    pre_norm: bool = False
    avg_token: bool = Field(
        False,
        description="mmcls 1.0rc: the normed mean of the patches in place of their map, as avg_featmap.",
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.avg_token and self.output_cls_token is None:
            yield (
                "avg_token",
                "is mmcls's older spelling; give it with output_cls_token, or out_type avg_featmap",
            )
        yield from super().faults()

    def outputs(self) -> tuple[tuple[str, OutputKind], ...]:
        """What each index returns, as (suffix of the level's name, kind of node)."""
        if not self.avg_token:
            return super().outputs()
        return tuple(
            (suffix, "avg_featmap" if kind == "featmap" else kind) for suffix, kind in super().outputs()
        )

    def spec(self) -> VisionTransformerSpec:
        """The neutral spelling."""
        bias = self.patch_cfg.bias
        return replace(
            super().spec(),
            patch_bias=bias if bias is not None else not self.pre_norm,
            qkv_bias=self.qkv_bias,
            pre_norm=self.pre_norm,
            layer_scale=self.layer_scale_init_value,
            swiglu=FEED_FORWARDS[self.layer_cfgs.ffn_type],
        )


T = TypeVar("T", bound=TransformerConfig)


def make_transformer_family(
    config: type[T],
    network: Callable[[Any], VisionTransformer],
    *,
    example: Mapping[str, Any],
    adapt: Callable[[T, StateDict], StateDict] | None = None,
) -> Family[T]:
    """The family of a VisionTransformer or a relative, made by `network` from its config's `spec()`.

    `adapt` gives a file's tensors by the network's names, before their positions are fitted.
    """

    def describe(given: T) -> Description:
        spec = given.spec()
        return building.describe(
            lambda: network(spec),
            in_channels=spec.in_channels,
            input_defaults=PreprocessDefaults(size=spec.native_size),
            prefix_tokens=spec.extra_tokens,
        )

    def build(given: T) -> VisionTransformer:
        spec = given.spec()
        made = allocated(lambda: network(spec))
        initialise(made)
        return made

    def load(given: T, state: StateDict, ref: WeightsRef) -> tuple[VisionTransformer, LoadedKeys]:
        spec = given.spec()
        made = allocated(lambda: network(spec))
        named = adapt(given, state) if adapt is not None else state
        keys = load_strict(made, fit_pos_embed(named, spec), ref)
        return made, settle_computed(made, named, keys)

    return Family(
        config=config,
        describe=describe,
        build=build,
        load=load,
        example=lambda type_name: {"type": type_name, **example},
        architectures=lambda type_name: tuple(config.ARCHS),  # noqa: ARG005 - the same for every spelling
        naming=VIT_NAMES,
    )


_TIMM_NAMES = {
    **{name: name for name in ("cls_token", "dist_token", "pos_embed")},
    "patch_embed.projection.{leaf}": "patch_embed.proj.{leaf}",
    "pre_norm.{leaf}": "norm_pre.{leaf}",
    "layers.{i}.ln{k}.{leaf}": "blocks.{i}.norm{k}.{leaf}",
    "layers.{i}.ffn.layers.0.0.{leaf}": "blocks.{i}.mlp.fc1.{leaf}",
    "layers.{i}.ffn.layers.1.{leaf}": "blocks.{i}.mlp.fc2.{leaf}",
    "layers.{i}.attn.gamma1.weight": "blocks.{i}.ls1.gamma",
    "layers.{i}.ffn.gamma2.weight": "blocks.{i}.ls2.gamma",
    "layers.{i}.gamma_{k}": "blocks.{i}.gamma_{k}",
    **{
        f"layers.{{i}}.attn.{name}": f"blocks.{{i}}.attn.{name}"
        for name in ("qkv.{leaf}", "proj.{leaf}", "q_bias", "v_bias", "relative_position_bias_table")
    },
    "ln1.{leaf}": "norm.{leaf}",
    "ln2.{leaf}": "fc_norm.{leaf}",
}
_GATED = rules(
    {
        "layers.{i}.ffn.w12.{leaf}": "blocks.{i}.mlp.fc1.{leaf}",
        "layers.{i}.ffn.w3.{leaf}": "blocks.{i}.mlp.fc2.{leaf}",
    }
)
# as DINOv2's own code calls them
_OFFICIAL_GATED = rules(
    {f"layers.{{i}}.ffn.{w}.{{leaf}}": f"blocks.{{i}}.mlp.{w}.{{leaf}}" for w in ("w12", "w3")}
)


def _doubled(weight: Tensor) -> tuple[int, ...]:
    """Twice the inputs of a linear layer; nothing for a tensor that is no such weight."""
    return tuple(2 * side for side in weight.shape[1:2])


def _timm_rules(state: StateDict, ours: bool) -> tuple[KeyRule, ...]:
    """A gated feed-forward has the names of a plain one in timm, and twice the channels between its layers."""
    first, last = (state.get(f"blocks.0.mlp.fc{k}.weight") for k in (1, 2))
    gated = ours or (first is not None and last is not None and first.shape[:1] == _doubled(last))
    return (*(_GATED if gated else ()), *rules(_TIMM_NAMES), *_OFFICIAL_GATED)


_TORCHVISION_LAYER = "encoder.layers.encoder_layer_{i}."
VIT_NAMES = Naming(
    "VisionTransformer",
    own=("mmpretrain",),
    marks=("patch_embed.projection.weight", "layers.0.ln1.weight", "layers.0.attn.qkv.weight"),
    layouts=(
        # Also those of the official ViT, DeiT, DINO, DINOv2, MAE and BEiT: timm's own began with them.
        KeyLayout("timm", _timm_rules),
        KeyLayout(
            "torchvision",
            (
                *rules(
                    {
                        "cls_token": "class_token",
                        "pos_embed": "encoder.pos_embedding",
                        "patch_embed.projection.{leaf}": "conv_proj.{leaf}",
                        "layers.{i}.ln{k}.{leaf}": _TORCHVISION_LAYER + "ln_{k}.{leaf}",
                        "layers.{i}.attn.qkv.{leaf}": _TORCHVISION_LAYER + "self_attention.in_proj_{leaf}",
                        "layers.{i}.attn.proj.{leaf}": _TORCHVISION_LAYER + "self_attention.out_proj.{leaf}",
                        "layers.{i}.ffn.layers.0.0.{leaf}": _TORCHVISION_LAYER + "mlp.0.{leaf}",
                        "layers.{i}.ffn.layers.1.{leaf}": _TORCHVISION_LAYER + "mlp.3.{leaf}",
                        "ln1.{leaf}": "encoder.ln.{leaf}",
                    }
                ),
                # torchvision's own files, which are older than what loads them
                *rules({"layers.{i}.ffn.layers.0.0.{leaf}": _TORCHVISION_LAYER + "mlp.linear_1.{leaf}"}),
                *rules({"layers.{i}.ffn.layers.1.{leaf}": _TORCHVISION_LAYER + "mlp.linear_2.{leaf}"}),
            ),
        ),
    ),
)


VISION_TRANSFORMER = make_transformer_family(
    VisionTransformerConfig,
    VisionTransformer,
    example={"arch": "deit-small", "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
)
