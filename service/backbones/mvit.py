"""MViT v2 (Li et al., arXiv:2112.01526) with mmpretrain's key names: attention among what convolutions pool.

Each output has a norm of its own, and the next block takes what is normed: other outputs make another network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.inverted_residual import stage_lengths
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import Scale, SpecConfig, make_family, map_features, named_arch
from service.backbones.output_norms import asked_stages, may_lack_output_norms, without_output_norms
from service.backbones.poolformer import PatchSpec
from service.backbones.tracing import is_known
from service.backbones.vision_transformer import MAX_PATCHES, Interpolation, resize_pos_embed
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, below, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults
from service.errors import TooLarge

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# Biases of an image that a block holds at once: 256 MB in float32.
MAX_BIASES = 1 << 26

Factor = Annotated[int, Field(strict=True, ge=1, le=8)]
Kernel = Annotated[int, Field(strict=True, ge=1, le=15)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]


class ArchConfig(BaseModel):
    """An `arch` spelled out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed_dims: Annotated[int, Field(strict=True, ge=1, le=2048)]
    num_layers: Annotated[int, Field(strict=True, ge=1, le=96)]
    num_heads: Annotated[int, Field(strict=True, ge=1, le=64)]
    downscale_indices: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=1, le=96)], ...], Field(max_length=5)
    ]


ARCHS: dict[str, ArchConfig] = {
    name: ArchConfig(embed_dims=width, num_layers=layers, num_heads=heads, downscale_indices=downscales)
    for name, width, layers, heads, downscales in (
        ("tiny", 96, 10, 1, (1, 3, 8)),
        ("small", 96, 16, 1, (1, 3, 14)),
        ("base", 96, 24, 1, (2, 5, 21)),
        ("large", 144, 48, 2, (2, 8, 44)),
    )
}


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks differ in: widths, heads, strides of what is pooled, and the grid that positions are for."""

    inputs: int
    inner: int
    outputs: int
    heads: int
    query_stride: int
    key_stride: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class MViTSpec:
    """What decides the numbers and the names of the weights.

    `downscales` are the blocks that halve the map, `outputs` the scales with an output norm. `grid` is [rows, columns]
    of the patches that positions are for. `widens_in_attention` is whether the block that halves the map widens it in
    its attention; otherwise the one before does, in its feed-forward network.
    """

    width: int
    layers: int
    heads: int
    downscales: tuple[int, ...]
    outputs: tuple[int, ...]
    grid: tuple[int, int]
    patch: PatchSpec = PatchSpec(7, 4, 3)  # noqa: RUF009 - frozen
    patch_bias: bool = True
    in_channels: int = 3
    pool: tuple[int, int] = (3, 3)
    width_factor: int = 2
    head_factor: int = 2
    key_stride: int = 4
    relative: bool = True
    residual: bool = True
    widens_in_attention: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    eps: float = 1e-6
    absolute: bool = False
    interpolation: Interpolation = "bicubic"

    def last_blocks(self) -> tuple[int, ...]:
        """The last block of each scale."""
        return tuple(block - 1 for block in (*self.downscales, self.layers))

    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks, in order."""
        found: list[BlockSpec] = []
        width, heads, key_stride, grid = self.width, self.heads, self.key_stride, self.grid
        for block in range(self.layers):
            halves = block in self.downscales
            heads *= self.head_factor if halves else 1
            key_stride = max(key_stride // 2, 1) if halves else key_stride
            widens = halves if self.widens_in_attention else block + 1 in self.downscales
            outputs = width * self.width_factor if widens else width
            inner = outputs if self.widens_in_attention else width
            stride = 2 if halves else 1
            found.append(BlockSpec(width, inner, outputs, heads, stride, key_stride, grid))
            width, grid = outputs, (grid[0] // stride, grid[1] // stride)
        return tuple(found)

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a scale."""
        blocks, last = self.blocks(), self.last_blocks()
        return map_features(
            [blocks[block].outputs for block in last], [self.patch.stride * 2**i for i in range(len(last))]
        )


def relative_positions(table: Tensor, queries: int, keys: int) -> Tensor:
    """[queries, keys, c] of a table of distances, [l, c], which is resized where it is of another number.

    The coarser of queries and keys is taken to lie on the grid of the finer.
    """
    distances = 2 * max(queries, keys) - 1
    if not is_known((distances,), table.shape[:1]):
        resized = F.interpolate(table.float().t()[None], size=distances, mode="linear")
        table = resized[0].t().to(table.dtype)
    at_queries = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    key_step = max(queries / keys, 1.0)
    at_keys = torch.arange(keys, device=table.device)[None, :] * key_step
    return table[(at_queries - at_keys + (keys - 1) * key_step).long()]


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, l, c] to [n, c, rows, columns] of `grid`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


class Attention(Scale):
    """Attention whose queries, keys and values are pooled first; keys `rel_pos_h`, `qkv`, `proj`, `pool_q`, …"""

    def __init__(self, spec: MViTSpec, block: BlockSpec) -> None:
        super().__init__()
        self.heads, self.residual, self.relative = block.heads, spec.residual, spec.relative
        width = block.inner // block.heads
        if spec.relative:
            side, strides = block.grid[0], (block.query_stride, block.key_stride)
            length = 2 * max(side // stride for stride in strides) - 1
            self.rel_pos_h = nn.Parameter(torch.empty(length, width))
            self.rel_pos_w = nn.Parameter(torch.empty(length, width))
        self.qkv = nn.Linear(block.inputs, 3 * block.inner, bias=spec.qkv_bias)
        self.proj = nn.Linear(block.inner, block.inner)
        strides_of = {"q": block.query_stride, "k": block.key_stride, "v": block.key_stride}
        padding = (spec.pool[0] // 2, spec.pool[1] // 2)
        for part, stride in strides_of.items():
            pool = nn.Conv2d(width, width, spec.pool, stride, padding, groups=width, bias=False)
            self.add_module(f"pool_{part}", pool)
            self.add_module(f"norm_{part}", nn.LayerNorm(width, eps=spec.eps))

    def start(self) -> None:
        """Small biases at first."""
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """[n, l, c] of a grid to [n, m, inner] of the grid of the queries, which comes with it.

        Raises:
            TooLarge: more biases than are held at once.
        """
        n, length, _ = tokens.shape
        parts = self.qkv(tokens).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        (query, pooled), (key, keys), (value, _) = (
            self._pooled(part, name, grid) for part, name in zip(parts, "qkv", strict=True)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self._biases(query, pooled, keys))
        mixed = mixed + query if self.residual else mixed
        return self.proj(mixed.transpose(1, 2).flatten(2)), pooled

    def _pooled(self, part: Tensor, name: str, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """[n, heads, c, l] of a grid to [n, heads, m, c] of another."""
        n, heads, width = part.shape[:3]
        maps = self.get_submodule(f"pool_{name}")(part.reshape(n * heads, width, *grid))
        normed: Tensor = self.get_submodule(f"norm_{name}")(maps.flatten(2).transpose(1, 2))
        return normed.reshape(n, heads, -1, width), (maps.shape[2], maps.shape[3])

    def _biases(self, query: Tensor, grid: tuple[int, int], keys: tuple[int, int]) -> Tensor | None:
        """[n, heads, queries, keys]: what queries find in the rows and columns of the keys."""
        if not self.relative:
            return None
        if (count := self.heads * math.prod(grid) * math.prod(keys)) > MAX_BIASES:
            raise TooLarge(f"{count} biases of relative position an image; the limit is {MAX_BIASES}")
        at = query.reshape(*query.shape[:2], *grid, -1)
        rows = torch.einsum("nbhwc,hkc->nbhwk", at, relative_positions(self.rel_pos_h, grid[0], keys[0]))
        columns = torch.einsum("nbhwc,wkc->nbhwk", at, relative_positions(self.rel_pos_w, grid[1], keys[1]))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class FeedForward(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, inputs] to [n, l, outputs]."""
        mixed: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return mixed


class Block(nn.Module):
    """Attention and feed-forward, each with a residual; keys `norm1`, `attn`, `norm2`, `mlp`, `proj`."""

    def __init__(self, spec: MViTSpec, block: BlockSpec) -> None:
        super().__init__()
        self.block, self.widens_in_attention = block, spec.widens_in_attention
        self.norm1 = nn.LayerNorm(block.inputs, eps=spec.eps)
        self.attn = Attention(spec, block)
        self.norm2 = nn.LayerNorm(block.inner, eps=spec.eps)
        self.mlp = FeedForward(block.inner, int(block.inner * spec.mlp_ratio), block.outputs)
        widens = block.inputs != block.outputs
        self.proj = nn.Linear(block.inputs, block.outputs) if widens else None

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """[n, l, c] of a grid to [n, m, outputs] of the next grid, which comes with it."""
        normed = self.norm1(tokens)
        attended, pooled = self.attn(normed, grid)
        skip = self.proj(normed) if self.proj is not None and self.widens_in_attention else tokens
        tokens = self._halved(skip, grid) + attended
        normed = self.norm2(tokens)
        skip = self.proj(normed) if self.proj is not None and not self.widens_in_attention else tokens
        return skip + self.mlp(normed), pooled

    def _halved(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        stride = self.block.query_stride
        if stride == 1:
            return tokens
        maps = as_map(tokens, grid)
        return F.max_pool2d(maps, stride + 1, stride, (stride + 1) // 2).flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Overlapping patches; key `projection`."""

    def __init__(self, spec: MViTSpec) -> None:
        super().__init__()
        self.stride = spec.patch.stride
        self.projection = nn.Conv2d(
            spec.in_channels,
            spec.width,
            spec.patch.kernel,
            stride=spec.patch.stride,
            padding=spec.patch.padding,
            bias=spec.patch_bias,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[n, c, h, w] to [n, rows * columns, width] and (rows, columns).

        Raises:
            TooLarge: more than 16384 patches.
        """
        patches = math.prod(images.shape[2:]) // self.stride**2
        if patches > MAX_PATCHES:
            raise TooLarge(f"about {patches} patches of {self.stride} px; the limit is {MAX_PATCHES}")
        maps = self.projection(images)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


class MViT(Backbone, Scale):
    """Keys `pos_embed`, `patch_embed`, `blocks`, and `norm0` … of the outputs."""

    def __init__(self, spec: MViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.pos_embed = (
            nn.Parameter(torch.empty(1, math.prod(spec.grid), spec.width)) if spec.absolute else None
        )
        self.patch_embed = PatchEmbed(spec)
        self.blocks = nn.ModuleList(Block(spec, block) for block in spec.blocks())
        self.scales = {
            block: scale for scale, block in enumerate(spec.last_blocks()) if scale in spec.outputs
        }
        for scale in self.scales.values():
            self.add_module(f"norm{scale}", nn.LayerNorm(self.features[scale].channels, eps=spec.eps))

    def start(self) -> None:
        """Small positions at first."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the scales in `nodes`; stops after the deepest of them."""
        tokens, grid = self.patch_embed(images)
        if self.pos_embed is not None:
            spec = self.spec
            tokens = tokens + resize_pos_embed(self.pos_embed, spec.grid, grid, 0, spec.interpolation)
        found: dict[str, Tensor] = {}
        for index, block in enumerate(self.blocks):
            tokens, grid = block(tokens, grid)
            if index not in self.scales:
                continue
            scale = self.scales[index]
            tokens = self.get_submodule(f"norm{scale}")(tokens)
            found[str(scale)] = as_map(tokens, grid)
            if found.keys() >= set(nodes):
                break
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every scale
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """The norms where `norm_cfg` says so: the library has no rule for more."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.MViT = mmcls.MViT -----------------------------------------------------------------


class PatchConfig(BaseModel):
    """`patch_cfg`: the convolution that cuts an image into patches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel_size: Annotated[int, Field(strict=True, ge=1, le=64)]
    stride: Annotated[int, Field(strict=True, ge=1, le=64)]
    padding: Annotated[int, Field(strict=True, ge=0, le=32)]
    bias: bool = True


class MViTConfig(SpecConfig):
    """`mmpretrain.MViT`, which is also `mmcls.MViT`."""

    NETWORK: ClassVar[str] = "MViT"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that positions are for; images of any size are taken."
    )
    in_channels: InputChannels = 3
    out_scales: Indices = Field(
        (-1,), description="Scales, 0 at stride 4; each has a norm, which deeper ones take part in."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    use_abs_pos_embed: bool = False
    interpolate_mode: Interpolation = "bicubic"
    pool_kernel: tuple[Kernel, Kernel] = (3, 3)
    dim_mul: Factor = 2
    head_mul: Factor = 2
    adaptive_kv_stride: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    rel_pos_spatial: bool = Field(True, description="Biases of relative position.")
    residual_pooling: bool = Field(True, description="Pooled queries are added to what attention gives.")
    dim_mul_in_attention: bool = Field(
        True, description="Whether the attention that halves the map widens it, or the block before."
    )
    rel_pos_zero_init: bool = Field(False, description="Training only; changes nothing here.")
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = True
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    patch_cfg: PatchConfig = PatchConfig(kernel_size=7, stride=4, padding=3)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        rows, columns = self.grid()
        if not 0 < rows * columns <= MAX_PATCHES:
            yield "img_size", f"{rows * columns} patches; 1 to {MAX_PATCHES} are served"
        if self.rel_pos_spatial and rows != columns:
            yield "img_size", "relative positions need a square image"
        if any(side % 2 == 0 for side in self.pool_kernel):
            yield "pool_kernel", f"{list(self.pool_kernel)} must be odd"
        yield from self._arch_faults()

    def _arch_faults(self) -> Iterator[tuple[str, str]]:
        arch = self.plan()
        downscales = arch.downscale_indices
        if any(later <= earlier for earlier, later in pairwise(downscales)):
            yield "arch/downscale_indices", f"{list(downscales)} do not increase"
        if downscales and downscales[-1] >= arch.num_layers:
            yield "arch/downscale_indices", f"{downscales[-1]} is not one of the {arch.num_layers} layers"
        for block in self.spec().blocks():
            if block.inner > 8192:
                yield "dim_mul", f"{block.inner} channels; the limit is 8192"
            if block.inner % block.heads:
                yield "head_mul", f"{block.heads} heads do not divide {block.inner} channels"
            if min(block.grid) < block.query_stride:
                yield "img_size", "the image is too small for so many downscale_indices"

    def plan(self) -> ArchConfig:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches of an image of `img_size`."""
        patch = self.patch_cfg
        rows, columns = (
            (side + 2 * patch.padding - patch.kernel_size) // patch.stride + 1 for side in self.image_size()
        )
        return max(rows, 0), max(columns, 0)

    def spec(self) -> MViTSpec:
        """The neutral spelling."""
        arch, patch = self.plan(), self.patch_cfg
        strides = [patch.stride * 2**scale for scale in range(len(arch.downscale_indices) + 1)]
        return MViTSpec(
            arch.embed_dims,
            arch.num_layers,
            arch.num_heads,
            arch.downscale_indices,
            asked_stages(self.out_scales, self.strides, strides),
            self.grid(),
            patch=PatchSpec(patch.kernel_size, patch.stride, patch.padding),
            patch_bias=patch.bias,
            in_channels=self.in_channels,
            pool=self.pool_kernel,
            width_factor=self.dim_mul,
            head_factor=self.head_mul,
            key_stride=self.adaptive_kv_stride,
            relative=self.rel_pos_spatial,
            residual=self.residual_pooling,
            widens_in_attention=self.dim_mul_in_attention,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            eps=self.norm_cfg.eps,
            absolute=self.use_abs_pos_embed,
            interpolation=self.interpolate_mode,
        )

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that positions are for."""
        return PreprocessDefaults(size=self.image_size())

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_scales`."""
        return levels_by_index(self.out_scales, description.features, pointer="#/backbone/out_scales")


def _optional(config: MViTConfig, state: StateDict) -> Callable[[str], bool]:
    return may_lack_output_norms(state, last=len(config.plan().downscale_indices))


_TIMM_BLOCK = {
    "proj.{leaf}": "shortcut_proj_attn.{leaf}",
    **{f"{part}.{{rest}}": f"{part}.{{rest}}" for part in ("norm1", "norm2", "attn", "mlp")},
}
_WIDENING = re.compile(r"blocks\.(\d{1,4})\.proj\.weight")
_EMBEDDING = {
    "patch_embed.projection.{leaf}": "patch_embed.proj.{leaf}",
    **{name: name for name in ("pos_embed", "pos_embed_h", "pos_embed_w", "cls_token")},
}


def _timm_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    """timm counts the blocks of each stage: the first of one has more channels than those before it."""
    if ours:
        starts = [0, *sorted(int(found[1]) for name in names if (found := _WIDENING.fullmatch(name)))]
    else:
        lengths = stage_lengths(names, r"stages\.(\d+)\.blocks\.(\d+)\.")
        starts = [0, *accumulate(lengths)][: len(lengths)]
    found_names = dict(_EMBEDDING)
    # What a stage's rules would give numbers below 0 is left to those of the stage before.
    for stage, start in reversed(tuple(enumerate(starts))):
        found_names |= below(f"blocks.{{b+{start}}}.", f"stages.{stage}.blocks.{{b}}.", _TIMM_BLOCK)
    return rules({**found_names, "norm3.{leaf}": "norm.{leaf}"})


MVIT_NAMES = Naming(
    "MViT",
    own=("mmpretrain",),
    marks=("patch_embed.projection.weight", "blocks.0.attn.pool_q.weight", "blocks.0.attn.norm_q.weight"),
    layouts=(
        KeyLayout("timm", _timm_rules),
        KeyLayout(
            "official", rules({**_EMBEDDING, "blocks.{rest}": "blocks.{rest}", "norm3.{leaf}": "norm.{leaf}"})
        ),
        KeyLayout(
            "detectron2",
            rules(
                {**_EMBEDDING, "blocks.{rest}": "blocks.{rest}", "norm{s}.{leaf}": "scale{s+2}_norm.{leaf}"}
            ),
            differs="detectron2's MViT has fewer keys in the last blocks of its second and third stages",
        ),
    ),
)


MVIT = make_family(
    MViTConfig,
    MViT,
    example={"arch": "tiny", "out_scales": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    optional=_optional,
    naming=MVIT_NAMES,
)
