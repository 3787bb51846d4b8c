"""EVA-02 (Fang et al., arXiv:2303.11331) with mmpretrain's key names: rotated queries and keys, gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import DropRate
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import Computed, OneForAll
from service.backbones.tracing import is_known
from service.backbones.transformer_layers import by_head
from service.backbones.vision_transformer import (
    ArchConfig,
    FreezableTransformerConfig,
    PlainLayerConfig,
    Size,
    VisionTransformer,
    VisionTransformerSpec,
    arch_or_object,
    make_transformer_family,
)
from service.config.spec import Freeze, FreezeReport

LONGEST_WAVE = 10_000.0
ARCHS: dict[str, Size] = {
    name: size
    for names, size in (
        (("t", "ti", "tiny"), Size(192, 12, 3, 512)),
        (("s", "small"), Size(384, 12, 6, 1024)),
        (("b", "base"), Size(768, 12, 12, 2048)),
        (("l", "large"), Size(1024, 24, 16, 2730)),
    )
    for name in names
}


@dataclass(frozen=True)
class EVA02Spec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights.

    `hidden` is the inner width of the feed-forward networks, in which `inner_norm` puts a norm. `scale` multiplies the
    products of queries and keys; None is one over the root of a head's width.
    """

    hidden: int = 0
    inner_norm: bool = False
    layer_eps: float = 1e-5
    projection_bias: bool = True
    scale: float | None = None

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.size.width // self.size.heads


class Rotation(Computed):
    """Angles by which queries and keys of a grid of patches are turned; computed `freqs_cos`, `freqs_sin`.

    Positions are scaled to the width of half a head whatever the grid; the first half of the channels turns with the
    rows, the second with the columns.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, spec: EVA02Spec) -> None:
        super().__init__()
        self.grid, self.half_width = spec.grid, spec.head_width // 2
        shape = spec.grid[0] * spec.grid[1], spec.head_width
        self.register_buffer("freqs_cos", torch.empty(shape), persistent=False)
        self.register_buffer("freqs_sin", torch.empty(shape), persistent=False)

    def compute(self) -> None:
        """The angles of the grid that the network is made for."""
        angles = self.angles(self.grid, self.freqs_cos.device)
        self.freqs_cos.copy_(angles.cos())
        self.freqs_sin.copy_(angles.sin())

    def angles(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[rows * columns, channels of a head]."""
        steps = torch.arange(0, self.half_width, 2, device=device).float()
        frequencies = 1.0 / LONGEST_WAVE ** (steps / self.half_width)
        down, right = (
            ((torch.arange(count, device=device) / count * self.half_width)[:, None] * frequencies).repeat(
                1, 2
            )
            for count in grid
        )
        rows = down[:, None].expand(*grid, self.half_width)
        columns = right[None].expand(*grid, self.half_width)
        return torch.cat((rows, columns), dim=-1).flatten(0, 1)

    def tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a grid."""
        if is_known(grid, self.grid):
            return self.freqs_cos, self.freqs_sin
        angles = self.angles(grid, self.freqs_cos.device)
        return angles.cos().to(self.freqs_cos.dtype), angles.sin().to(self.freqs_sin.dtype)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, heads, extra + l, c] with the patches turned, pairs of neighbouring channels together."""
        cosines, sines = self.tables(grid)
        extra = tokens.shape[2] - cosines.shape[0]
        patches = tokens[:, :, extra:]
        even, odd = patches.reshape(*patches.shape[:-1], -1, 2).unbind(-1)
        across = torch.stack((-odd, even), dim=-1).flatten(-2)
        turned = patches * cosines + across * sines
        return torch.cat((tokens[:, :, :extra], turned), dim=2).to(tokens.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; keys `qkv`, `proj`, and the computed `rope` that all layers share."""

    def __init__(self, spec: EVA02Spec, rope: Rotation) -> None:
        super().__init__()
        width = spec.size.width
        self.heads, self.scale = spec.size.heads, spec.scale
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width, bias=spec.projection_bias)
        self.rope = rope

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        query, key, value = (by_head(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        query, key = self.rope(query, grid), self.rope(key, grid)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class SwiGLU(nn.Module):
    """SiLU-gated feed-forward (Shazeer, arXiv:2002.05202); keys `w12`, `norm`, `w3`."""

    def __init__(self, spec: EVA02Spec) -> None:
        super().__init__()
        self.w12 = nn.Linear(spec.size.width, 2 * spec.hidden)
        self.norm = nn.LayerNorm(spec.hidden, eps=spec.layer_eps) if spec.inner_norm else nn.Identity()
        self.w3 = nn.Linear(spec.hidden, spec.size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        projected: Tensor = self.w3(self.norm(F.silu(gate) * value))
        return projected


class EVA02Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual; keys `norm1`, `attn`, `norm2`, `mlp`."""

    def __init__(self, spec: EVA02Spec, rope: Rotation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.size.width, eps=spec.layer_eps)
        self.attn = Attention(spec, rope)
        self.norm2 = nn.LayerNorm(spec.size.width, eps=spec.layer_eps)
        self.mlp = SwiGLU(spec)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.attn(self.norm1(tokens), grid)
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed


class ViTEVA02(VisionTransformer):
    """A VisionTransformer with layers of its own; computed `rope`."""

    spec: EVA02Spec

    def __init__(self, spec: EVA02Spec) -> None:
        super().__init__(spec)
        self.rope = Rotation(spec)
        self.layers = nn.ModuleList(EVA02Layer(spec, self.rope) for _ in range(spec.size.layers))

    def make_layer(self) -> nn.Module:
        """A place for one of `layers`, which need what is not there yet."""
        return nn.Identity()

    def run_layer(self, index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        mixed: Tensor = self.layers[index](tokens, grid)
        return mixed

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k >= 1 is the embeddings, the number of layers also the last norms, never a layer.

        It freezes before it makes these layers. The norms stay in train mode.
        """
        stages = freeze.stages or 0
        names = ["cls_token", "pos_embed", "patch_embed", "pre_norm"] if stages > 0 else []
        names += ["ln1", "ln2"] if stages == len(self.layers) else []
        return freeze_report(self, freeze, names, norms_follow=False)


# --- mmpretrain.ViTEVA02 --------------------------------------------------------------------------


class LayerConfig(PlainLayerConfig):
    """What `layer_cfgs` may change of every layer."""

    sub_ln: bool | None = Field(None, description="null is that of the backbone.")
    qkv_bias: bool | None = Field(None, description="null is that of the backbone.")
    proj_bias: bool = True
    qk_scale: Annotated[float, Field(gt=0, le=1e3)] | None = Field(
        None, description="null is one over the root of a head's width."
    )
    feedforward_channels: Annotated[int, Field(strict=True, ge=1, le=16384)] | None = Field(
        None, description="null is that of arch."
    )
    norm_cfg: LayerNormConfig | None = Field(None, description="null is that of the backbone.")
    attn_drop: DropRate = Field(0.0, description="Training only; changes nothing here.")
    proj_drop: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")


class ViTEVA02Config(FreezableTransformerConfig):
    """`mmpretrain.ViTEVA02`."""

    NETWORK: ClassVar[str] = "ViTEVA02"
    ARCHS: ClassVar[dict[str, Size]] = ARCHS
    MMCLS_HAS_CLS_TOKEN: ClassVar[bool] = False

    arch: Annotated[
        str | ArchConfig, arch_or_object(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    sub_ln: bool = Field(False, description="A norm inside the feed-forward networks.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    proj_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    qkv_bias: bool = True
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="Changes nothing: the library's layers of this type have no scale."
    )
    pre_norm: bool = False
    layer_cfgs: Annotated[LayerConfig, OneForAll] = LayerConfig()
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        -1,
        description="k >= 1 freezes the embeddings, the number of layers also the last norms; layers never.",
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        size, layer = self.size(), self.layer_cfgs
        if size.width // size.heads % 4:
            yield "arch/num_heads", f"a head's width of {size.width // size.heads} is not a multiple of 4"
        if "act_cfg" in layer.model_fields_set:
            yield "layer_cfgs/act_cfg", "layers of this type are gated by SiLU"
        if layer.norm_cfg is not None and layer.norm_cfg.requires_grad != self.norm_cfg.requires_grad:
            yield "layer_cfgs/norm_cfg", "requires_grad must be that of the backbone's norm_cfg"

    def spec(self) -> EVA02Spec:
        """The neutral spelling."""
        layer, bias, plain = self.layer_cfgs, self.patch_cfg.bias, super().spec()
        return replace(
            EVA02Spec(**vars(plain)),
            patch_bias=bias if bias is not None else not self.pre_norm,
            qkv_bias=self.qkv_bias if layer.qkv_bias is None else layer.qkv_bias,
            pre_norm=self.pre_norm,
            hidden=layer.feedforward_channels or plain.size.hidden,
            inner_norm=self.sub_ln if layer.sub_ln is None else layer.sub_ln,
            layer_eps=(layer.norm_cfg or self.norm_cfg).eps,
            projection_bias=layer.proj_bias,
            scale=layer.qk_scale,
        )


VIT_EVA02 = make_transformer_family(
    ViTEVA02Config,
    ViTEVA02,
    example={"arch": "tiny", "patch_size": 14, "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
)
