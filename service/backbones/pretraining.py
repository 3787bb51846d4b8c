"""Encoders of mmpretrain's masked pretraining, as they compute features: without a mask, as fine-tuning takes them.

Each is a network that is served anyway, with defaults of its own, parameters that only the masked images need
(they are loaded and not used), and positions that are constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate
from service.backbones.beit import BEiT, BEiTConfig, BEiTSpec, fit_positions
from service.backbones.freezing import freeze_report, in_module_order
from service.backbones.hivit import ARCHS as HIVIT_ARCHS
from service.backbones.hivit import HiViT, HiViTConfig, HiViTSpec
from service.backbones.mixmim import ARCHS as MIXMIM_ARCHS
from service.backbones.mixmim import MixMIMConfig, MixMIMTransformer
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import make_family
from service.backbones.swin import ARCHS as SWIN_ARCHS
from service.backbones.swin import (
    SWIN_NAMES,
    SwinSpec,
    SwinTransformer,
    SwinTransformerConfig,
    fit_windows,
    optional_output_norms,
)
from service.backbones.vision_transformer import (
    SIZES,
    ArchConfig,
    OutType,
    PatchConfig,
    Size,
    TransformerConfig,
    VisionTransformer,
    VisionTransformerConfig,
    VisionTransformerSpec,
    arch_or_object,
    make_transformer_family,
)
from service.config.spec import Freeze, FreezeReport

Ratio = Annotated[float, Field(ge=0, lt=1)]
POSITIONS = ("pos_embed",)


class Pretraining(Backbone):
    """Mixed into a network: the token that stands for masked patches, `spec.mask_token` wide, 0 for none."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        width: int = spec.mask_token
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if width else None

    def start(self) -> None:
        """A small token."""
        begin = getattr(super(), "start", None)
        if begin is not None:
            begin()
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)


# --- ViT ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainingViTSpec(VisionTransformerSpec):
    """A VisionTransformer with a token for masked patches, or without (0)."""

    mask_token: int = 0


class PretrainingViT(Pretraining, VisionTransformer):
    """A VisionTransformer that may have a token for masked patches."""


class PretrainingViTConfig(TransformerConfig):
    """The keys that MAE's, MILAN's and MaskFeat's encoders have in common."""

    MMCLS_HAS_CLS_TOKEN: ClassVar[bool] = False

    arch: Annotated[
        str | ArchConfig, arch_or_object(SIZES), Field(json_schema_extra={"examples": list(SIZES)})
    ] = "b"
    in_channels: Literal[3] = 3
    out_type: OutType | None = Field("raw", description="What comes out of each layer; raw is all tokens.")
    output_cls_token: None = None
    with_cls_token: Literal[True] = True


class MAEViTConfig(PretrainingViTConfig):
    """`mmpretrain.MAEViT`: positions are constant."""

    NETWORK: ClassVar[str] = "MAEViT"

    mask_ratio: Ratio = Field(0.75, description="Pretraining only; nothing is masked here.")

    def spec(self) -> PretrainingViTSpec:
        """The neutral spelling."""
        return PretrainingViTSpec(**vars(super().spec()))

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`, and the positions."""
        return replace(super().freeze(), constant=POSITIONS)


class MaskFeatViTConfig(PretrainingViTConfig):
    """`mmpretrain.MaskFeatViT`."""

    NETWORK: ClassVar[str] = "MaskFeatViT"

    def spec(self) -> PretrainingViTSpec:
        """The neutral spelling."""
        return PretrainingViTSpec(**vars(super().spec()), mask_token=self.size().width)


# --- MoCo v3 --------------------------------------------------------------------------------------

MOCO_SIZES = {**SIZES, **dict.fromkeys(("mocov3-s", "mocov3-small"), Size(384, 12, 12, 1536))}


class MoCoV3ViT(VisionTransformer):
    """A VisionTransformer with MoCo v3's rule of freezing."""

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """0 is the embeddings, k the embeddings and k layers, whose norms are in eval; at full depth the last norm."""
        stages = freeze.stages if freeze.stages is not None else -1
        layers = [f"layers.{index}" for index in range(stages)]
        report = freeze_report(self, freeze, layers)
        constant = ["cls_token", "pos_embed"] if stages >= 0 else []
        roots = ["patch_embed"] if stages >= 0 else []
        roots += ["ln1"] if stages == len(self.layers) else []
        constant += [name for name, _ in self.named_parameters() if name.partition(".")[0] in roots]
        return in_module_order(self, freeze, (*report.parameters, *constant), report.norms)


class MoCoV3ViTConfig(VisionTransformerConfig):
    """`mmpretrain.MoCoV3ViT`."""

    ARCHS: ClassVar[dict[str, Size]] = MOCO_SIZES
    MMCLS_HAS_CLS_TOKEN: ClassVar[bool] = False

    arch: Annotated[
        str | ArchConfig, arch_or_object(MOCO_SIZES), Field(json_schema_extra={"examples": list(MOCO_SIZES)})
    ] = "base"
    patch_size: Annotated[int, Field(strict=True, ge=1, le=256)] = Field(
        description="Pixels a side of a patch."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = Field(
        -1, description="0 freezes the embeddings, k the embeddings and k layers."
    )
    stop_grad_conv1: bool = Field(False, description="Freezes the projection of patches.")
    norm_eval: bool = Field(False, description="Of batch norms, which this type has not.")

    def freeze(self) -> Freeze:
        """The library's `frozen_stages` and `stop_grad_conv1`."""
        return replace(super().freeze(), constant=("patch_embed.projection",) if self.stop_grad_conv1 else ())


class SelfSupervisedMoCoV3ViTConfig(MoCoV3ViTConfig):
    """`mmselfsup.MoCoV3ViT`, which returns a map and its class token unless `output_cls_token` is false."""

    out_type: None = None
    output_cls_token: bool | None = Field(
        True, description="True returns a map and its class token, false the map."
    )


# --- BEiT -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainingBEiTSpec(BEiTSpec):
    """A BEiT with a token for masked patches, or without (0); `whole_patches`: what is left of an image is cut off."""

    mask_token: int = 0
    whole_patches: bool = False


class PretrainingBEiT(Pretraining, BEiT):
    """A BEiT that may cut images to whole patches instead of padding them."""

    spec: PretrainingBEiTSpec

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens, [n, extra + rows * columns, c], and (rows, columns)."""
        if self.spec.whole_patches:
            side = self.spec.patch_size
            height, width = (max(length // side, 1) * side for length in images.shape[2:])
            images = images[:, :, :height, :width]
        return super().embed(images)


class UnpaddedPatchConfig(PatchConfig):
    """What `patch_cfg` may change of the patch embedding, its padding included."""

    padding: Literal[0, "corner"] = Field("corner", description="0 cuts images to whole patches.")


class PretrainingBEiTConfig(BEiTConfig):
    """The keys that BEiT's and CAE's encoders have in common."""

    final_norm: bool = True
    out_type: OutType | None = Field("raw", description="What comes out of each layer; raw is all tokens.")
    output_cls_token: None = None
    with_cls_token: Literal[True] = True
    avg_token: None = None
    use_rel_pos_bias: bool = Field(False, description="Biases of relative position in each layer.")
    patch_cfg: UnpaddedPatchConfig = UnpaddedPatchConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        if self.patch_cfg.padding == 0 and any(side % self.patch_size for side in self.image_size()):
            yield "img_size", f"is not a multiple of patches of {self.patch_size} px, which are not padded"

    def spec(self) -> PretrainingBEiTSpec:
        """The neutral spelling."""
        return PretrainingBEiTSpec(**vars(super().spec()), whole_patches=self.patch_cfg.padding == 0)


class BEiTPretrainViTConfig(PretrainingBEiTConfig):
    """`mmpretrain.BEiTPretrainViT`."""

    NETWORK: ClassVar[str] = "BEiTPretrainViT"

    bias: Literal["qv_bias"] = "qv_bias"
    use_shared_rel_pos_bias: bool = Field(True, description="Biases of relative position that layers share.")
    patch_cfg: UnpaddedPatchConfig = UnpaddedPatchConfig(padding=0)

    def spec(self) -> PretrainingBEiTSpec:
        """The neutral spelling."""
        return replace(super().spec(), mask_token=self.size().width)


class CAEPretrainViTConfig(PretrainingBEiTConfig):
    """`mmpretrain.CAEPretrainViT`: positions are constant."""

    NETWORK: ClassVar[str] = "CAEPretrainViT"

    use_abs_pos_emb: Literal[True] = Field(True, description="The library fails without.")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = Field(
        description="Where the scales of the residuals start; 0 is none."
    )

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_cfg.requires_grad`, and the positions."""
        return replace(super().freeze(), constant=POSITIONS)


# --- Swin -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimMIMSpec(SwinSpec):
    """A Swin Transformer with a token for masked patches, or without (0)."""

    mask_token: int = 0


class SimMIMSwinTransformer(Pretraining, SwinTransformer):
    """A Swin Transformer with a token for masked patches."""


class SimMIMConfig(SwinTransformerConfig):
    """`mmpretrain.SimMIMSwinTransformer`: patches of one size, windows by `stage_cfgs`."""

    NETWORK: ClassVar[str] = "SimMIMSwinTransformer"

    patch_size: Literal[4] = 4
    window_size: Literal[7] = Field(7, description="Another one goes into stage_cfgs.")
    out_after_downsample: Literal[False] = False
    interpolate_mode: Literal["bicubic"] = "bicubic"

    def spec(self) -> SimMIMSpec:
        """The neutral spelling."""
        spec = super().spec()
        return SimMIMSpec(**vars(spec), mask_token=spec.widths()[0])


# --- HiViT ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainingHiViTSpec(HiViTSpec):
    """A HiViT with a token for masked patches, or without (0)."""

    mask_token: int = 0


class PretrainingHiViT(Pretraining, HiViT):
    """A HiViT that may have a token for masked patches."""


class PretrainingHiViTConfig(HiViTConfig):
    """`mmpretrain.MAEHiViT`: positions are constant."""

    NETWORK: ClassVar[str] = "MAEHiViT"

    norm_cfg: LayerNormConfig = LayerNormConfig(type="LN", eps=1e-6)
    ape: Literal[True] = Field(True, description="The library fails without.")
    mask_ratio: Ratio = Field(0.75, description="Pretraining only; nothing is masked here.")

    def spec(self) -> PretrainingHiViTSpec:
        """The neutral spelling."""
        return PretrainingHiViTSpec(**vars(super().spec()))

    def freeze(self) -> Freeze:
        """mmpretrain's `norm_cfg.requires_grad`, and the positions."""
        return replace(super().freeze(), constant=POSITIONS)


class ITPNConfig(PretrainingHiViTConfig):
    """`mmpretrain.iTPNHiViT`."""

    NETWORK: ClassVar[str] = "iTPNHiViT"

    reconstruction_type: Literal["pixel", "clip"] = Field(
        "pixel", description="clip has a token for masked patches, which is loaded and not used."
    )

    def spec(self) -> PretrainingHiViTSpec:
        """The neutral spelling."""
        width = self.plan().embed_dims if self.reconstruction_type == "clip" else 0
        return replace(super().spec(), mask_token=width)


# --- MixMIM ---------------------------------------------------------------------------------------


class MixMIMPretrainConfig(MixMIMConfig):
    """`mmpretrain.MixMIMPretrainTransformer`."""

    mask_ratio: Ratio = Field(0.5, description="Pretraining only; nothing is masked here.")
    range_mask_ratio: DropRate = Field(0.0, description="Pretraining only; nothing is masked here.")


_VIT_EXAMPLE = {"arch": "deit-tiny", "out_type": "featmap", "out_indices": [2, 5, 8, 11]}
MAE_VIT = make_transformer_family(MAEViTConfig, PretrainingViT, example=_VIT_EXAMPLE)
MASKFEAT_VIT = make_transformer_family(MaskFeatViTConfig, PretrainingViT, example=_VIT_EXAMPLE)
_MOCO_EXAMPLE = {"arch": "mocov3-small", "patch_size": 16, "out_indices": [2, 5, 8, 11]}
MOCO_V3_VIT = make_transformer_family(
    MoCoV3ViTConfig, MoCoV3ViT, example={**_MOCO_EXAMPLE, "out_type": "featmap"}
)
MMSELFSUP_MOCO_V3_VIT = make_transformer_family(
    SelfSupervisedMoCoV3ViTConfig, MoCoV3ViT, example=_MOCO_EXAMPLE
)
BEIT_PRETRAIN_VIT = make_transformer_family(
    BEiTPretrainViTConfig, PretrainingBEiT, example=_VIT_EXAMPLE, adapt=fit_positions
)
CAE_PRETRAIN_VIT = make_transformer_family(
    CAEPretrainViTConfig,
    PretrainingBEiT,
    example={**_VIT_EXAMPLE, "layer_scale_init_value": 0.1},
    adapt=fit_positions,
)
SIMMIM_SWIN = make_family(
    SimMIMConfig,
    SimMIMSwinTransformer,
    example={"arch": "tiny", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(SWIN_ARCHS),
    adapt=fit_windows,
    optional=optional_output_norms,
    naming=SWIN_NAMES,
)
MAE_HIVIT = make_family(
    PretrainingHiViTConfig,
    PretrainingHiViT,
    example={"arch": "tiny", "out_indices": [9]},
    architectures=tuple(HIVIT_ARCHS),
)
ITPN_HIVIT = make_family(
    ITPNConfig,
    PretrainingHiViT,
    example={"arch": "tiny", "out_indices": [9]},
    architectures=tuple(HIVIT_ARCHS),
)
MIXMIM_PRETRAIN = make_family(
    MixMIMPretrainConfig, MixMIMTransformer, example={"arch": "base"}, architectures=tuple(MIXMIM_ARCHS)
)
