"""detrex's `ConvNeXt`: the network of mmpretrain's with the key names of its authors' code."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from service.backbones.base import DropRate, InputChannels
from service.backbones.convnext import CONVNEXT_NAMES, Block, ConvNeXt, ConvNeXtSpec, first_stages
from service.backbones.detrex import StagesConfig, Width, freeze_of, without_output_norms
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import make_family
from service.backbones.output_norms import asked_stages
from service.config.spec import Freeze, FreezeReport

STRIDES = (4, 8, 16, 32)
StageBlocks = Annotated[int, Field(strict=True, ge=0, le=64)]
StageIndex = Annotated[int, Field(strict=True, ge=0, le=3)]


class DetrexBlock(Block):
    """Keys `gamma`, `dwconv`, `norm`, `pwconv1`, `pwconv2`."""

    CONVOLUTIONS = ("dwconv", "pwconv1", "pwconv2")


class DetrexConvNeXt(ConvNeXt):
    """Keys `downsample_layers`, `stages`, `norm0`, …"""

    BLOCK = DetrexBlock

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """detrex's rule: k is the first k stages with their downsampling; output norms never."""
        return freeze_report(self, freeze, first_stages(freeze.stages or 0), norms_follow=False)


class DetrexConvNeXtConfig(StagesConfig):
    """`detrex.ConvNeXt`: four stages."""

    NETWORK: ClassVar[str] = "detrex.ConvNeXt"

    in_chans: InputChannels = 3
    depths: tuple[StageBlocks, StageBlocks, StageBlocks, StageBlocks] = Field(
        (3, 3, 9, 3), description="Blocks of the stages."
    )
    dims: tuple[Width, Width, Width, Width] = Field(
        (96, 192, 384, 768), description="Channels of the stages."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    layer_scale_init_value: Annotated[float, Field(ge=0, le=100)] = Field(
        1e-6, description="0 leaves the layer scale out."
    )
    out_indices: Annotated[tuple[StageIndex, ...], Field(min_length=1, max_length=4)] = Field(
        (0, 1, 2, 3), description="Stages, 0 at stride 4, named p0 to p3; each has a norm of its own."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="k freezes the first k stages with their downsampling; 0 and -1 nothing."
    )

    def freeze(self) -> Freeze:
        """`frozen_stages`."""
        return freeze_of(self.frozen_stages)

    def spec(self) -> ConvNeXtSpec:
        """The neutral spelling."""
        return ConvNeXtSpec(
            blocks=self.depths,
            widths=self.dims,
            outputs=asked_stages(self.out_indices, self.strides, STRIDES),
            pooled=False,
            in_channels=self.in_chans,
            layer_scale=self.layer_scale_init_value,
        )


EXAMPLE: dict[str, Any] = {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768], "out_indices": [1, 2, 3]}
DETREX_CONVNEXT = make_family(
    DetrexConvNeXtConfig,
    DetrexConvNeXt,
    example=EXAMPLE,
    optional=without_output_norms,
    naming=CONVNEXT_NAMES,
    library="official",
)
