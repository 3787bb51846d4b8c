"""DeiT with a distillation token (Touvron et al., arXiv:2012.12877) with mmpretrain's key names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.vision_transformer import (
    SIZES,
    ArchConfig,
    OutputKind,
    VisionTransformer,
    VisionTransformerConfig,
    VisionTransformerSpec,
    arch_or_object,
    before,
    make_transformer_family,
)


@dataclass(frozen=True)
class DistilledSpec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights."""

    @property
    def extra_tokens(self) -> int:
        """The class token and the distillation token."""
        return 2

    def out_types(self) -> tuple[OutputKind, ...]:
        """The outputs of every layer."""
        return (*super().out_types(), "dist_token")


class DistilledVisionTransformer(VisionTransformer):
    """A VisionTransformer with a second token behind the class token; key `dist_token`.

    `frozen_stages` leaves the distillation token trainable, as mmpretrain does.
    """

    cls_token: nn.Parameter

    def __init__(self, spec: DistilledSpec) -> None:
        super().__init__(spec)
        self.dist_token = nn.Parameter(torch.empty(1, 1, spec.size.width))

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, 2 + rows * columns, c], and (rows, columns)."""
        patches, grid = self.patch_embed(images)
        tokens = before(self.cls_token, before(self.dist_token, patches))
        return tokens + self.positions(grid), grid

    def output(self, tokens: Tensor, grid: tuple[int, int], kind: str) -> Tensor:
        """What a layer gives under a kind of output."""
        return tokens[:, 1] if kind == "dist_token" else super().output(tokens, grid, kind)


# --- mmpretrain.DistilledVisionTransformer = mmcls.DistilledVisionTransformer ---------------------


class DistilledConfig(VisionTransformerConfig):
    """`mmpretrain.DistilledVisionTransformer`: where it returns the class token, the distillation token follows."""

    NETWORK: ClassVar[str] = "DistilledVisionTransformer"

    arch: Annotated[
        str | ArchConfig, arch_or_object(SIZES), Field(json_schema_extra={"examples": list(SIZES)})
    ] = "deit-base"
    with_cls_token: Literal[True] = True
    pre_norm: Literal[False] = False

    def outputs(self) -> tuple[tuple[str, OutputKind], ...]:
        """What each index returns, as (suffix of the level's name, kind of node)."""
        outputs = super().outputs()
        return (*outputs, (".dist", "dist_token")) if "cls_token" in dict(outputs).values() else outputs

    def spec(self) -> DistilledSpec:
        """The neutral spelling."""
        return DistilledSpec(**vars(super().spec()))


DISTILLED_VISION_TRANSFORMER = make_transformer_family(
    DistilledConfig,
    DistilledVisionTransformer,
    example={"arch": "deit-tiny", "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
)
