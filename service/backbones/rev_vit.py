"""RevVisionTransformer (Mangalam et al., "Reversible Vision Transformers", CVPR 2022) with mmpretrain's key names.

Two streams pass through every layer: attention of the one is added to the other, and feed-forward the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, InputChannels
from service.backbones.freezing import freeze_report
from service.backbones.norms import LayerNormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    OneForAll,
    Scale,
    SpecConfig,
    make_family,
)
from service.backbones.token_outputs import token_features, token_output
from service.backbones.transformer_layers import FeedForward
from service.backbones.vision_transformer import (
    MAX_PATCHES,
    SIZES,
    ArchConfig,
    Attention,
    Interpolation,
    OutType,
    PatchConfig,
    PatchEmbed,
    Pixels,
    Size,
    VisionTransformerSpec,
    arch_or_object,
    before,
    fit_pos_embed,
    resize_pos_embed,
    size_fault,
)
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

Fusion = Literal["add", "max", "min", "avg", "concat"]
FUSIONS: dict[Fusion, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "avg": lambda one, other: (one + other) / 2,
    "concat": lambda one, other: torch.cat((one, other), dim=-1),
}
ARCHS: dict[str, Size] = {
    name: SIZES[name]
    for name in (
        *("s", "small", "b", "base", "l", "large", "h", "huge"),
        *("deit-t", "deit-tiny", "deit-s", "deit-small", "deit-b", "deit-base"),
    )
}


@dataclass(frozen=True)
class RevSpec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights; `fusion` makes one stream of two."""

    fusion: Fusion = "concat"
    linears: int = 2
    feed_forward: ActivationSpec = ActivationSpec("gelu")  # noqa: RUF009 - frozen

    def features(self) -> tuple[FeatureInfo, ...]:
        """Every output of the last layer."""
        width = self.size.width * (2 if self.fusion == "concat" else 1)
        return token_features(width, self.patch_size, [self.with_cls_token])


class RevLayer(nn.Module):
    """Attention and feed-forward, each from one stream to the other; keys `ln1`, `attn`, `ln2`, `ffn`."""

    def __init__(self, spec: RevSpec) -> None:
        super().__init__()
        size, eps = spec.size, spec.norm.eps
        self.ln1 = nn.LayerNorm(size.width, eps=eps)
        self.attn = Attention(spec)
        self.ln2 = nn.LayerNorm(size.width, eps=eps)
        self.ffn = FeedForward(size.width, size.hidden, spec.feed_forward, linears=spec.linears)

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two streams, [n, l, c] each, to the same shapes."""
        one = one + self.attn(self.ln1(other))
        return one, other + self.ffn(self.ln2(one))


class RevVisionTransformer(Backbone, Scale):
    """Keys `cls_token`, `pos_embed`, `patch_embed`, `layers`, `ln1`."""

    def __init__(self, spec: RevSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        width = spec.size.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if spec.with_cls_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, spec.tokens, width))
        self.patch_embed = PatchEmbed(spec)
        self.layers = nn.ModuleList(RevLayer(spec) for _ in range(spec.size.layers))
        self.ln1 = nn.LayerNorm(2 * width, eps=spec.norm.eps) if spec.final_norm else nn.Identity()

    def start(self) -> None:
        """Small positions, and a class token of zeros."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs in `nodes`."""
        tokens, grid = self.embed(images)
        one = other = tokens
        for layer in self.layers:
            one, other = layer(one, other)
        streams = self.ln1(torch.cat((one, other), dim=-1)).chunk(2, dim=-1)
        fused, has_token = FUSIONS[self.spec.fusion](*streams), self.spec.with_cls_token
        kinds = {node: node.partition(".")[2] for node in nodes}
        return {
            node: token_output(fused, grid, kind, has_cls_token=has_token) for node, kind in kinds.items()
        }

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, extra + rows * columns, c], and (rows, columns)."""
        tokens, grid = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = before(self.cls_token, tokens)
        spec = self.spec
        positions = resize_pos_embed(self.pos_embed, spec.grid, grid, spec.extra_tokens, spec.interpolation)
        return tokens + positions, grid

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k >= 1 is the embeddings and k layers, at full depth also the last norm.

        The norms stay in train mode, as they do there.
        """
        stages = freeze.stages or 0
        names = ["cls_token", "pos_embed", "patch_embed"] if stages > 0 else []
        names += [f"layers.{index}" for index in range(stages)]
        names += ["ln1"] if stages == len(self.layers) else []
        return freeze_report(self, freeze, names, norms_follow=False)


# --- mmpretrain.RevVisionTransformer = mmcls.RevVisionTransformer ---------------------------------


class LayerConfig(BaseModel):
    """What `layer_cfgs` may change of every layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_fcs: Annotated[int, Field(strict=True, ge=2, le=8)] = 2
    act_cfg: ActivationConfig = ActivationConfig(type="GELU")
    qkv_bias: bool | None = Field(None, description="null is that of the backbone.")
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    attn_drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")


class RevVisionTransformerConfig(SpecConfig):
    """`mmpretrain.RevVisionTransformer`, which is also `mmcls.RevVisionTransformer`. There is one output."""

    NETWORK: ClassVar[str] = "RevVisionTransformer"

    arch: Annotated[
        str | ArchConfig, arch_or_object(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    img_size: Pixels | tuple[Pixels, Pixels] = Field(
        224, description="Image size that the positions are for; images of any size are taken."
    )
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    in_channels: InputChannels = 3
    drop_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    qkv_bias: bool = True
    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    final_norm: bool = True
    out_type: OutType = Field("avg_featmap", description="What of the last layer is returned.")
    avg_token: bool | None = Field(
        None, description="mmcls's older spelling: out_type avg_featmap where true, featmap where false."
    )
    output_cls_token: Literal[False] | None = Field(
        None, description="mmcls's older spelling; it has no class token either."
    )
    with_cls_token: bool = False
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        -1, description="k >= 1 freezes the embeddings and k layers, all layers the last norm too."
    )
    interpolate_mode: Interpolation = "bicubic"
    patch_cfg: PatchConfig = PatchConfig()
    layer_cfgs: Annotated[LayerConfig, OneForAll] = LayerConfig()
    fusion_mode: Fusion = Field("concat", description="How the two streams become one.")
    no_custom_backward: bool = Field(False, description="Training only; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        size = self.size()
        yield from size_fault(size)
        if self.avg_token is not None and "out_type" in self.model_fields_set:
            yield "avg_token", "is mmcls's older spelling of out_type; give one of them"
        if not self.with_cls_token and self.out_type == "cls_token":
            yield "with_cls_token", "must be true where out_type is cls_token"
        if self.frozen_stages > size.layers:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {size.layers} layers"
        rows, columns = self.grid()
        if rows * columns > MAX_PATCHES:
            yield "img_size", f"{rows * columns} patches of {self.patch_size} px; the limit is {MAX_PATCHES}"

    def size(self) -> Size:
        """The widths that `arch` names or spells out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.size()

    def image_size(self) -> tuple[int, int]:
        """[height, width] of `img_size`."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def grid(self) -> tuple[int, int]:
        """[rows, columns] of the patches of an image of `img_size`."""
        height, width = self.image_size()
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def spec(self) -> RevSpec:
        """The neutral spelling."""
        layer = self.layer_cfgs
        return RevSpec(
            size=self.size(),
            grid=self.grid(),
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            patch_bias=self.patch_cfg.bias is not False,
            qkv_bias=self.qkv_bias if layer.qkv_bias is None else layer.qkv_bias,
            with_cls_token=self.with_cls_token,
            norm=NormSpec("ln", self.norm_cfg.eps),
            final_norm=self.final_norm,
            interpolation=self.interpolate_mode,
            fusion=self.fusion_mode,
            linears=layer.num_fcs,
            feed_forward=layer.act_cfg.spec(),
        )

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages=stages, all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:  # noqa: ARG002 - there is one
        """The one output."""
        older: dict[bool | None, OutType] = {True: "avg_featmap", False: "featmap", None: self.out_type}
        return (Level(0, "0", f"0.{older[self.avg_token]}"),)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=self.image_size())


def _fitted(config: RevVisionTransformerConfig, state: StateDict) -> StateDict:
    return fit_pos_embed(state, config.spec())


REV_VISION_TRANSFORMER = make_family(
    RevVisionTransformerConfig,
    RevVisionTransformer,
    example={"arch": "deit-small", "out_type": "featmap"},
    architectures=tuple(ARCHS),
    adapt=_fitted,
    prefix_tokens=lambda spec: spec.extra_tokens,
)
