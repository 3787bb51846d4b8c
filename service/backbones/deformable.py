"""Deformable convolutions with mmcv's key names: v1 (Dai et al., arXiv:1703.06211) and v2 (arXiv:1811.11168)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


@dataclass(frozen=True)
class DeformSpec:
    """Where a network's 3x3 convolutions are deformable, and of which kind.

    `modulated` weighs each sample too; `groups` of channels have offsets of their own; `stages` says for each stage
    whether it has them. `but_first`: not in the first block of the first of these stages.
    """

    modulated: bool
    groups: int
    stages: tuple[bool, ...]
    but_first: bool = False

    def is_at(self, stage: int, *, first: bool) -> bool:
        """Whether a block of this stage, the first there or a later one, has it."""
        skipped = self.but_first and first and stage == self.stages.index(True)
        return self.stages[stage] and not skipped


class DeformConv2d(nn.Conv2d):
    """A 3x3 convolution that samples where another one, `conv_offset`, says."""

    def __init__(
        self, inputs: int, outputs: int, spec: DeformSpec, *, stride: int, dilation: int, groups: int = 1
    ) -> None:
        super().__init__(
            inputs, outputs, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.modulated = spec.modulated
        numbers = (3 if spec.modulated else 2) * 9 * spec.groups
        self.conv_offset = nn.Conv2d(inputs, numbers, 3, stride, padding=dilation, dilation=dilation)

    def forward(self, input: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        from torchvision.ops import deform_conv2d

        offset, mask = self.conv_offset(input), None
        if self.modulated:
            first, second, mask = torch.chunk(offset, 3, dim=1)
            offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        found: Tensor = deform_conv2d(
            input,
            offset,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )
        return found


class DeformConfig(BaseModel):
    """OpenMMLab's `dcn`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["DCN", "DCNv2"] = Field(description="DCNv2 weighs its samples too.")
    deform_groups: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        1, description="Groups of channels with offsets of their own."
    )
    deformable_groups: Annotated[int, Field(strict=True, ge=1, le=64)] | None = Field(
        None, description="What deform_groups was called."
    )
    fallback_on_stride: bool = Field(
        False,
        description="True leaves the first block of the first deformable stage plain in ResNet and ResNetV1d, and "
        "nothing elsewhere: mmdet forgets it after the first block.",
    )

    def groups(self) -> int:
        """Groups of channels, by either name."""
        return self.deform_groups if self.deformable_groups is None else self.deformable_groups
