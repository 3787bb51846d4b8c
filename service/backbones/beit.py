"""BEiT and BEiT v2 (Bao et al., arXiv:2106.08254; Peng et al., arXiv:2208.06366) with mmpretrain's key names.

In place of positions, or beside them, attention has learnt biases of relative position, which fit one grid of patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import make_norm
from service.backbones.openmmlab import Computed, OneForAll, Scale
from service.backbones.position_tables import fit_tables, resize_progression
from service.backbones.vision_transformer import (
    SIZES,
    WITH_CLS_TOKEN,
    ArchConfig,
    FeedForward,
    FreezableTransformerConfig,
    OutputKind,
    OutType,
    PlainLayerConfig,
    Size,
    VisionTransformer,
    VisionTransformerSpec,
    arch_or_object,
    before,
    make_transformer_family,
)
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

ARCHS: dict[str, Size] = {
    name: size for name, size in SIZES.items() if name not in ("h", "huge") and "dinov2" not in name
}
# Every layer holds an index of the square of the patches.
MAX_RELATIVE_PATCHES = 1024
# offsets between the class token and patches, which end a table
CLASS_OFFSETS = 3
Bias = Literal["none", "qv", "qkv"]


@dataclass(frozen=True)
class BEiTSpec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights.

    `bias` is which of query, key and value have one. `relative` is whether each layer has biases of relative position,
    `shared` whether all layers have them in common.
    """

    bias: Bias = "qv"
    absolute: bool = False
    relative: bool = True
    shared: bool = False


def relative_position_index(rows: int, columns: int) -> Tensor:
    """[1 + rows * columns, same]: where in the table of biases that of two tokens is; the class token is the first.

    The last three entries of the table are class token to patch, patch to class token, class token to itself.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    down = y[:, None] - y[None, :] + rows - 1
    right = x[:, None] - x[None, :] + columns - 1
    inner = down * (2 * columns - 1) + right
    entries = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(inner, (1, 0, 1, 0))
    index[0], index[:, 0] = entries, entries + 1
    index[0, 0] = entries + 2
    return index


class RelativePositions(Scale, Computed):
    """Base of what has a table of biases; keys `relative_position_bias_table`, `relative_position_index`."""

    relative_position_index: Tensor

    def add_table(self, spec: BEiTSpec) -> None:
        """Register the table and its index."""
        rows, columns = self.grid = spec.grid
        entries, length = (2 * rows - 1) * (2 * columns - 1) + 3, rows * columns + 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, spec.size.heads))
        index = torch.empty(length, length, dtype=torch.long)
        self.register_buffer("relative_position_index", index, persistent=False)

    @property
    def has_table(self) -> bool:
        """Whether there are biases."""
        return "relative_position_bias_table" in self._parameters

    def start(self) -> None:
        """Small biases at first."""
        if self.has_table:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def compute(self) -> None:
        """The index, which follows from the grid of patches."""
        if self.has_table:
            self.relative_position_index.copy_(relative_position_index(*self.grid))

    def biases(self) -> Tensor:
        """[1, heads, length, length]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]


class SharedPositions(RelativePositions):
    """The biases that all layers have in common."""

    def __init__(self, spec: BEiTSpec) -> None:
        super().__init__()
        self.add_table(spec)


class Attention(RelativePositions):
    """Multi-head self-attention; keys `q_bias`, `v_bias`, the table's, `qkv`, `proj`."""

    def __init__(self, spec: BEiTSpec) -> None:
        super().__init__()
        width, self.heads = spec.size.width, spec.size.heads
        self.with_qv_bias = spec.bias == "qv"
        if self.with_qv_bias:
            self.q_bias = nn.Parameter(torch.empty(width))
            self.v_bias = nn.Parameter(torch.empty(width))
        if spec.relative:
            self.add_table(spec)
        self.qkv = nn.Linear(width, 3 * width, bias=spec.bias == "qkv")
        self.proj = nn.Linear(width, width)

    def start(self) -> None:
        """No biases of query and value at first."""
        super().start()
        if self.with_qv_bias:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def forward(self, tokens: Tensor, shared: Tensor | None) -> Tensor:
        """[n, l, c] and [1, heads, l, l] to [n, l, c]."""
        n, length, width = tokens.shape
        bias: Tensor | None = self.qkv.bias
        if self.with_qv_bias:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(tokens, self.qkv.weight, bias)
        query, key, value = qkv.reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.biases().to(query.dtype) if self.has_table else shared
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, width))
        return projected


class BEiTLayer(Scale):
    """Pre-norm attention and feed-forward, each with a scaled residual; keys `gamma_1`, `gamma_2`."""

    def __init__(self, spec: BEiTSpec) -> None:
        super().__init__()
        width, self.initial = spec.size.width, spec.layer_scale
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if spec.layer_scale > 0 else None)
        self.ln1 = make_norm(spec.norm, width)
        self.attn = Attention(spec)
        self.ln2 = make_norm(spec.norm, width)
        self.ffn = PlainFeedForward(spec)

    def start(self) -> None:
        """The residual branches begin at the config's scale."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, self.initial)

    def forward(self, tokens: Tensor, shared: Tensor | None) -> Tensor:
        """[n, l, c] and [1, heads, l, l] to [n, l, c]."""
        attended = self.attn(self.ln1(tokens), shared)
        tokens = tokens + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.ffn(self.ln2(tokens))
        output: Tensor = tokens + (mixed if self.gamma_2 is None else self.gamma_2 * mixed)
        return output


class PlainFeedForward(FeedForward):
    """Two linear layers without a scale of their own: the layer has it."""

    def __init__(self, spec: BEiTSpec) -> None:
        super().__init__(spec)
        self.gamma2 = nn.Identity()


class BEiT(VisionTransformer):
    """A VisionTransformer with biases of relative position; key `rel_pos_bias` where layers share them."""

    spec: BEiTSpec

    def __init__(self, spec: BEiTSpec) -> None:
        super().__init__(spec)
        if not spec.absolute:
            self.register_parameter("pos_embed", None)
        self.rel_pos_bias = SharedPositions(spec) if spec.shared else None

    def make_layer(self) -> nn.Module:
        """One of `layers`."""
        return BEiTLayer(self.spec)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens, [n, extra + rows * columns, c], and (rows, columns).

        Raises:
            InvalidConfig: the biases are made for another grid.
        """
        spec = self.spec
        tokens, grid = self.patch_embed(images)
        if grid != spec.grid and (spec.relative or spec.shared):
            made_for = "x".join(str(side) for side in reversed(spec.native_size))
            detail = (
                f"relative positions are made for images of {made_for} px; resize the images or set img_size"
            )
            raise InvalidConfig("#/backbone/img_size", detail)
        if self.cls_token is not None:
            tokens = before(self.cls_token, tokens)
        return tokens + self.positions(grid) if spec.absolute else tokens, grid

    def run_layer(self, index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002 - one fits
        """[n, l, c] to [n, l, c]."""
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias.biases().to(tokens.dtype)
        mixed: Tensor = self.layers[index](tokens, shared)
        return mixed


# --- mmpretrain.BEiTViT ---------------------------------------------------------------------------

BIASES: dict[bool | str, Bias] = {True: "qkv", False: "none", "qv_bias": "qv"}


class BEiTLayerConfig(PlainLayerConfig):
    """What `layer_cfgs` may change of every layer."""

    bias: bool | Literal["qv_bias"] | None = Field(None, description="Goes before the type's own `bias`.")


class BEiTConfig(FreezableTransformerConfig):
    """`mmpretrain.BEiTViT`, which was `mmcls.BEiT`: images of `img_size` only, unless it has no relative positions."""

    NETWORK: ClassVar[str] = "BEiTViT"
    ARCHS: ClassVar[dict[str, Size]] = ARCHS
    MMCLS_HAS_CLS_TOKEN: ClassVar[bool] = False

    arch: Annotated[
        str | ArchConfig, arch_or_object(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    bias: bool | Literal["qv_bias"] = Field("qv_bias", description="qv_bias leaves out that of the key.")
    final_norm: bool = False
    out_type: OutType | None = Field(None, description="null is avg_featmap.")
    avg_token: bool | None = Field(
        None,
        description="mmcls.BEiT: whether the normed mean of the patches is returned (true, unless said otherwise) or "
        "their map; with output_cls_token, the class token too.",
    )
    layer_cfgs: Annotated[BEiTLayerConfig, OneForAll] = BEiTLayerConfig()
    use_abs_pos_emb: bool = False
    use_rel_pos_bias: bool = Field(True, description="Biases of relative position in each layer.")
    use_shared_rel_pos_bias: bool = Field(False, description="Biases of relative position that layers share.")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = 0.1

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        if self.avg_token is not None and self.out_type is not None:
            yield "avg_token", "is mmcls's older spelling of out_type; give one of them"
        if self._is_spelled_as_mmcls() and not self.with_cls_token:
            yield "with_cls_token", "must be true where the outputs are spelled as mmcls does"
        if self.use_rel_pos_bias and self.use_shared_rel_pos_bias:
            yield "use_shared_rel_pos_bias", "is instead of use_rel_pos_bias; set that to false"
        if not (self.use_rel_pos_bias or self.use_shared_rel_pos_bias):
            return
        if not self.with_cls_token:
            yield "with_cls_token", "relative positions need the class token"
        rows, columns = self.grid()
        if rows * columns > MAX_RELATIVE_PATCHES:
            detail = f"{rows * columns} patches with relative positions; the limit is {MAX_RELATIVE_PATCHES}"
            yield "img_size", detail

    def _is_spelled_as_mmcls(self) -> bool:
        return self.avg_token is not None or self.output_cls_token is not None

    def outputs(self) -> tuple[tuple[str, OutputKind], ...]:
        """What each index returns, as (suffix of the level's name, kind of node)."""
        if not self._is_spelled_as_mmcls():
            return super().outputs()
        patches: OutputKind = "featmap" if self.avg_token is False else "avg_featmap"
        return (("", patches), *WITH_CLS_TOKEN[1:]) if self.output_cls_token else (("", patches),)

    def given_out_type(self) -> OutType:
        """`out_type`, or what a null is."""
        return self.out_type or "avg_featmap"

    def spec(self) -> BEiTSpec:
        """The neutral spelling."""
        own = {
            "bias": BIASES[self.bias if self.layer_cfgs.bias is None else self.layer_cfgs.bias],
            "absolute": self.use_abs_pos_emb,
            "relative": self.use_rel_pos_bias,
            "shared": self.use_shared_rel_pos_bias,
            "layer_scale": self.layer_scale_init_value,
        }
        return BEiTSpec(**{**vars(super().spec()), **own})


SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
SHARED_INDEX = "rel_pos_bias.relative_position_index"


def expand_shared(config: BEiTConfig, state: StateDict) -> StateDict:
    """`state` with the biases that its layers share given to each layer, where the config has them apart."""
    table = next((name for name in state if name == SHARED_TABLE or name.endswith(f".{SHARED_TABLE}")), None)
    if table is None or not config.use_rel_pos_bias:
        return state
    prefix = table.removesuffix(SHARED_TABLE)
    kept = {name: tensor for name, tensor in state.items() if name not in (table, prefix + SHARED_INDEX)}
    layers = range(config.size().layers)
    name = "attn.relative_position_bias_table"
    return kept | {f"{prefix}layers.{layer}.{name}": state[table] for layer in layers}


def fit_positions(config: BEiTConfig, state: StateDict) -> StateDict:
    """`state` with its biases of position in each layer and of the config's grid, as mmpretrain does at load."""
    rows, columns = config.grid()
    entries = (2 * rows - 1) * (2 * columns - 1) + CLASS_OFFSETS
    return fit_tables(expand_shared(config, state), entries, resize_progression, extra=CLASS_OFFSETS)


BEIT = make_transformer_family(
    BEiTConfig,
    BEiT,
    example={"arch": "deit-tiny", "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
    adapt=fit_positions,
)
