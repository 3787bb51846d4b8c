"""ViTSAM, the image encoder of Segment Anything (Kirillov et al., arXiv:2304.02643), with mmpretrain's key names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.convnext import ChannelNorm
from service.backbones.freezing import freeze_report, norm_names
from service.backbones.norms import LayerNormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    Scale,
    SpecConfig,
    make_family,
    named_arch,
)
from service.backbones.swin import cut_windows, join_windows
from service.backbones.token_outputs import parse_node
from service.backbones.tracing import is_known
from service.backbones.transformer_layers import FeedForward, by_head
from service.backbones.vision_transformer import (
    MAX_PATCHES,
    Interpolation,
    PatchConfig,
    PatchEmbed,
    Pixels,
    Size,
    VisionTransformerSpec,
    resize_pos_embed,
    size_fault,
)
from service.backbones.vision_transformer import ArchConfig as PlainArchConfig
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

Layer = Annotated[int, Field(strict=True, ge=0, le=63)]
RELATIVE = re.compile(r"(?:.*\.)?layers\.(\d+)\.attn\.rel_pos_([hw])")
REDUCTION_EPS = 1e-6


class ArchConfig(PlainArchConfig):
    """An `arch` spelled out; all layers but `global_attn_indexes` attend in windows."""

    global_attn_indexes: Annotated[tuple[Layer, ...], Field(max_length=64)]


def _arch(width: int, layers: int, heads: int, of_all: tuple[int, ...]) -> ArchConfig:
    return ArchConfig(
        embed_dims=width,
        num_layers=layers,
        num_heads=heads,
        feedforward_channels=4 * width,
        global_attn_indexes=of_all,
    )


ARCHS: dict[str, ArchConfig] = {
    name: arch
    for names, arch in (
        (("b", "base"), _arch(768, 12, 12, (2, 5, 8, 11))),
        (("l", "large"), _arch(1024, 24, 16, (5, 11, 17, 23))),
        (("h", "huge"), _arch(1280, 32, 16, (7, 15, 23, 31))),
    )
    for name in names
}


@dataclass(frozen=True)
class LayerSpec:
    """One layer: `window` is the side of its windows, 0 for attention among all patches."""

    window: int
    hidden: int
    linears: int = 2
    qkv_bias: bool = True
    activation: ActivationSpec = ActivationSpec("gelu")  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class SAMSpec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights; `outputs` are channels to which maps are reduced, or 0."""

    layers: tuple[LayerSpec, ...] = ()
    absolute: bool = True
    relative: bool = True
    outputs: int = 256

    def extent(self, layer: int) -> tuple[int, int]:
        """[rows, columns] that the relative positions of a layer are for."""
        window = self.layers[layer].window
        return (window, window) if window else self.grid

    def features(self) -> tuple[FeatureInfo, ...]:
        """The map of every layer and its mean."""
        width = self.outputs or self.size.width
        found = []
        for layer in range(len(self.layers)):
            found.append(FeatureInfo(layer, f"{layer}.featmap", width, self.patch_size, "NCHW"))
            found.append(FeatureInfo(layer, f"{layer}.avg_featmap", width, None, "NC"))
        return tuple(found)


def resized(relative: Tensor, length: int) -> Tensor:
    """[l, c] of relative positions of another reach: [length, c], interpolated linearly."""
    if is_known((length,), relative.shape[:1]):
        return relative
    return F.interpolate(relative.T[None].float(), size=length, mode="linear")[0].T.to(relative.dtype)


def relative_rows(relative: Tensor, side: int) -> Tensor:
    """[side, side, c]: of [2 side - 1, c] (or of another reach), that of each pair of positions."""
    steps = torch.arange(side, device=relative.device)
    return resized(relative, 2 * side - 1)[steps[:, None] - steps[None] + side - 1]


class Attention(Scale):
    """Multi-head self-attention; keys `rel_pos_h`, `rel_pos_w`, `qkv`, `proj`."""

    def __init__(self, spec: SAMSpec, layer: int) -> None:
        super().__init__()
        width, self.heads, self.is_relative = spec.size.width, spec.size.heads, spec.relative
        if spec.relative:
            rows, columns = spec.extent(layer)
            self.rel_pos_h = nn.Parameter(torch.empty(2 * rows - 1, width // self.heads))
            self.rel_pos_w = nn.Parameter(torch.empty(2 * columns - 1, width // self.heads))
        self.qkv = nn.Linear(width, 3 * width, bias=spec.layers[layer].qkv_bias)
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """No biases of position at first."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, rows * columns, c] to the same shape."""
        query, key, value = (by_head(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        if self.is_relative:
            mixed = self._with_positions(query, key, value, grid)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _with_positions(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention whose logits have a bias of the rows and one of the columns, each a product with the query.

        The biases go in as further channels, which a key has 1 of for its row and 1 for its column: as a mask they
        would be a number for every pair of patches.
        """
        rows, columns = grid
        width = query.shape[-1]
        maps = query.reshape(*query.shape[:2], rows, columns, width)
        down = torch.einsum("nhyxc,ykc->nhyxk", maps, relative_rows(self.rel_pos_h, rows)).flatten(2, 3)
        right = torch.einsum("nhyxc,xkc->nhyxk", maps, relative_rows(self.rel_pos_w, columns)).flatten(2, 3)
        of_row = torch.eye(rows, dtype=key.dtype, device=key.device).repeat_interleave(columns, dim=0)
        of_column = torch.eye(columns, dtype=key.dtype, device=key.device).repeat(rows, 1)
        places = torch.cat((of_row, of_column), dim=1).expand(*key.shape[:2], -1, -1)
        query = torch.cat((query * width**-0.5, down, right), dim=-1)
        key = torch.cat((key, places), dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, F.pad(value, (0, rows + columns)), scale=1.0)
        return mixed[..., :width]


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual; keys `ln1`, `attn`, `ln2`, `ffn`."""

    def __init__(self, spec: SAMSpec, layer: int) -> None:
        super().__init__()
        width, own = spec.size.width, spec.layers[layer]
        self.window = own.window
        self.ln1 = nn.LayerNorm(width, eps=spec.norm.eps)
        self.attn = Attention(spec, layer)
        self.ln2 = nn.LayerNorm(width, eps=spec.norm.eps)
        self.ffn = FeedForward(width, own.hidden, own.activation, linears=own.linears)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, rows, columns, c] to the same shape."""
        maps = maps + self._attended(self.ln1(maps))
        mixed: Tensor = maps + self.ffn(self.ln2(maps))
        return mixed

    def _attended(self, maps: Tensor) -> Tensor:
        _, rows, columns, _ = maps.shape
        if not self.window:
            attended: Tensor = self.attn(maps.flatten(1, 2), (rows, columns))
            return attended.reshape(maps.shape)
        padded = F.pad(maps, (0, 0, 0, -columns % self.window, 0, -rows % self.window))
        windows = self.attn(cut_windows(padded, self.window), (self.window, self.window))
        return join_windows(windows, self.window, *padded.shape[1:3])[:, :rows, :columns]


class ViTSAM(Backbone, Scale):
    """Keys `pos_embed`, `patch_embed`, `layers`, `channel_reduction`."""

    def __init__(self, spec: SAMSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        width = spec.size.width
        self.pos_embed = nn.Parameter(torch.empty(1, *spec.grid, width)) if spec.absolute else None
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.ModuleList(TransformerLayer(spec, layer) for layer in range(len(spec.layers)))
        self.channel_reduction = reduction(width, spec.outputs) if spec.outputs else None

    def start(self) -> None:
        """Small positions."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs in `nodes`; stops after the deepest layer asked for."""
        maps, found = self.embed(images), {}
        wanted = [(node, *parse_node(node)) for node in nodes]
        for index in range(max(index for _, index, _ in wanted) + 1):
            maps = self.layers[index](maps)
            kinds = {kind: node for node, asked, kind in wanted if asked == index}
            # The layers work on NHWC; the wire promises NCHW.
            output = self.reduced(maps.permute(0, 3, 1, 2).contiguous()) if kinds else maps
            for kind, node in kinds.items():
                found[node] = output if kind == "featmap" else output.mean(dim=(2, 3))
        return {node: found[node] for node in nodes}

    def embed(self, images: Tensor) -> Tensor:
        """Patches with their positions, [n, rows, columns, c]."""
        tokens, grid = self.patch_embed(images)
        if self.pos_embed is not None:
            spec = self.spec
            tokens = tokens + resize_pos_embed(
                self.pos_embed.flatten(1, 2), spec.grid, grid, 0, spec.interpolation
            )
        maps: Tensor = tokens.reshape(tokens.shape[0], *grid, -1)
        return maps

    def reduced(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to [n, outputs, h, w]."""
        if self.channel_reduction is None:
            return maps
        narrow: Tensor = self.channel_reduction(maps)
        return narrow

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k >= 1 is the embeddings and k layers, at full depth also the reduction of channels.

        The norms stay in train mode. `norm_cfg` is not of those of the reduction.
        """
        stages = freeze.stages or 0
        names = ["pos_embed", "patch_embed"] if stages > 0 else []
        names += [f"layers.{index}" for index in range(stages)]
        names += ["channel_reduction"] if stages == len(self.layers) else []
        if freeze.all_norms:
            names += [name for name in norm_names(self) if name.startswith("layers.")]
        return freeze_report(self, replace(freeze, all_norms=False), names, norms_follow=False)


def reduction(inputs: int, outputs: int) -> nn.Sequential:
    """The neck of the image encoder: a 1x1 and a 3x3 convolution, each with a norm over channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        ChannelNorm(outputs, eps=REDUCTION_EPS),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        ChannelNorm(outputs, eps=REDUCTION_EPS),
    )


# --- mmpretrain.ViTSAM ----------------------------------------------------------------------------


class LayerConfig(BaseModel):
    """What `layer_cfgs` may change of a layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_fcs: Annotated[int, Field(strict=True, ge=2, le=8)] = 2
    feedforward_channels: Annotated[int, Field(strict=True, ge=1, le=16384)] | None = Field(
        None, description="null is that of arch."
    )
    qkv_bias: bool | None = Field(None, description="null is that of the backbone.")
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")


class ViTSAMConfig(SpecConfig):
    """`mmpretrain.ViTSAM`."""

    NETWORK: ClassVar[str] = "ViTSAM"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that the positions are for; images of any size are taken."
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    in_channels: InputChannels = 3
    out_channels: Annotated[int, Field(strict=True, ge=0, le=4096)] = Field(
        256, description="Of what is returned; 0 leaves out the convolutions that reduce it."
    )
    out_indices: Indices = Field((-1,), description="Layers from 0; negative ones count from the end.")
    out_type: Literal["raw", "featmap", "avg_featmap"] = Field(
        "raw", description="raw and featmap are the map."
    )
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    qkv_bias: bool = True
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    window_size: Annotated[int, Field(strict=True, ge=0, le=64)] = Field(
        14, description="In patches; 0 is attention among all of them in every layer."
    )
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        -1,
        description="k >= 1 freezes the embeddings and k layers, all layers the reduction of channels too.",
    )
    interpolate_mode: Interpolation = "bicubic"
    patch_cfg: PatchConfig = PatchConfig()
    layer_cfgs: LayerConfig | Annotated[tuple[LayerConfig, ...], Field(max_length=64)] = LayerConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        arch = self.plan()
        layers, given = arch.num_layers, self.layer_cfgs
        yield from size_fault(arch.size())
        if isinstance(given, tuple) and len(given) < layers:
            yield "layer_cfgs", f"has {len(given)} entries for {layers} layers"
        if self.frozen_stages > layers:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {layers} layers"
        if self.frozen_stages > 0 and not self.use_abs_pos:
            yield "frozen_stages", "freezes absolute positions, which use_abs_pos leaves out"
        rows, columns = self.grid()
        if rows * columns > MAX_PATCHES:
            yield "img_size", f"{rows * columns} patches of {self.patch_size} px; the limit is {MAX_PATCHES}"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches of an image of `img_size`."""
        height, width = self.image_size()
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def layers(self) -> tuple[LayerSpec, ...]:
        """The neutral spelling of each layer."""
        arch, given = self.plan(), self.layer_cfgs
        each = given if isinstance(given, tuple) else (given,) * arch.num_layers
        return tuple(
            LayerSpec(
                window=0 if index in arch.global_attn_indexes else self.window_size,
                hidden=layer.feedforward_channels or arch.feedforward_channels,
                linears=layer.num_fcs,
                qkv_bias=self.qkv_bias if layer.qkv_bias is None else layer.qkv_bias,
                activation=layer.act_cfg.spec(),
            )
            for index, layer in enumerate(each[: arch.num_layers])
        )

    def spec(self) -> SAMSpec:
        """The neutral spelling."""
        arch: ArchConfig = self.plan()
        return SAMSpec(
            size=Size(arch.embed_dims, arch.num_layers, arch.num_heads, arch.feedforward_channels),
            grid=self.grid(),
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            patch_bias=self.patch_cfg.bias is not False,
            with_cls_token=False,
            norm=NormSpec("ln", self.norm_cfg.eps),
            interpolation=self.interpolate_mode,
            layers=self.layers(),
            absolute=self.use_abs_pos,
            relative=self.use_rel_pos,
            outputs=self.out_channels,
        )

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages=stages, all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        kind = "avg_featmap" if self.out_type == "avg_featmap" else "featmap"
        levels = levels_by_index(self.out_indices, description.features)
        return tuple(Level(level.index, str(level.index), f"{level.index}.{kind}") for level in levels)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())


def fit_positions(config: ViTSAMConfig, state: StateDict) -> StateDict:
    """`state` with positions of another grid or window resized, as mmpretrain does at load."""
    spec = config.spec()
    return {name: _fitted(name, tensor, spec) for name, tensor in state.items()}


def _fitted(name: str, tensor: Tensor, spec: SAMSpec) -> Tensor:
    if name.rpartition(".")[2] == "pos_embed" and tensor.ndim == 4:
        source = tensor.shape[1], tensor.shape[2]
        fitted = resize_pos_embed(tensor.flatten(1, 2), source, spec.grid, 0, spec.interpolation)
        return fitted.reshape(1, *spec.grid, -1)
    match = RELATIVE.fullmatch(name)
    if match is None or int(match[1]) >= len(spec.layers) or tensor.ndim != 2 or not len(tensor):
        return tensor
    rows, columns = spec.extent(int(match[1]))
    return resized(tensor, 2 * (rows if match[2] == "h" else columns) - 1)


_TIMM_NAMES = {
    "pos_embed": "pos_embed",
    "patch_embed.projection.{leaf}": "patch_embed.proj.{leaf}",
    "layers.{i}.ln{k}.{leaf}": "blocks.{i}.norm{k}.{leaf}",
    "layers.{i}.attn.{rest}": "blocks.{i}.attn.{rest}",
    "layers.{i}.ffn.layers.0.0.{leaf}": "blocks.{i}.mlp.fc1.{leaf}",
    "layers.{i}.ffn.layers.1.{leaf}": "blocks.{i}.mlp.fc2.{leaf}",
    "channel_reduction.{i}.{leaf}": "neck.{i}.{leaf}",
}
_OFFICIAL_NAMES = {
    **_TIMM_NAMES,
    "layers.{i}.ffn.layers.0.0.{leaf}": "blocks.{i}.mlp.lin1.{leaf}",
    "layers.{i}.ffn.layers.1.{leaf}": "blocks.{i}.mlp.lin2.{leaf}",
}
VIT_SAM_NAMES = Naming(
    "ViTSAM",
    own=("mmpretrain",),
    marks=(
        "patch_embed.projection.weight",
        "layers.0.ln1.weight",
        "layers.0.attn.rel_pos_h",
        "layers.0.attn.qkv.weight",
        "channel_reduction.0.weight",
    ),
    layouts=(
        KeyLayout("timm", rules(_TIMM_NAMES)),
        # segment-anything's files have them below `image_encoder.`
        KeyLayout("official", rules(_OFFICIAL_NAMES)),
    ),
)


VIT_SAM = make_family(
    ViTSAMConfig,
    ViTSAM,
    example={"arch": "base", "img_size": 224, "out_indices": [2, 5, 8, 11]},
    architectures=tuple(ARCHS),
    adapt=fit_positions,
    naming=VIT_SAM_NAMES,
)
