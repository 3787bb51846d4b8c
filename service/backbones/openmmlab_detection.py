"""What mmdet's residual networks take besides, and the defaults that differ from mmpretrain's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from service.backbones.base import CheckpointName, Indices
from service.backbones.resnet import Channels, ResidualConfig, StemKind
from service.config.spec import WeightsRef

Options = Annotated[dict[str, Any], Field(max_length=16)]


class DetectionKeys(ResidualConfig):
    """Keys and defaults of mmdet's residual networks.

    A deep stem names its weights flatly; a pooling shortcut has its pool where it does not stride, too.
    """

    DEEP_STEM: ClassVar[StemKind] = "flat"
    POOL_AT_STRIDE_1: ClassVar[bool] = True

    stem_channels: Channels | None = Field(None, description="null is base_channels.")
    out_indices: Indices = Field((0, 1, 2, 3), description="Stages, 0 is layer1.")
    norm_eval: bool = Field(True, description="Keeps every batch norm in eval mode.")
    dcn: Options | None = Field(None, description="Deformable convolutions, which are not served.")
    stage_with_dcn: Annotated[tuple[bool, ...], Field(max_length=4)] = Field(
        (False, False, False, False), description="Stages that `dcn` is for: none is served."
    )
    plugins: Annotated[tuple[Options, ...], Field(max_length=16)] | None = Field(
        None, description="Modules inside blocks, which are not served."
    )
    pretrained: CheckpointName | None = Field(
        None, description="Deprecated spelling of init_cfg with this checkpoint."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what is not served."""
        if self.dcn is not None and any(self.stage_with_dcn):
            yield "dcn", "deformable convolutions are not served"
        if self.plugins:
            yield "plugins", "modules inside blocks are not served"
        if self.pretrained is not None and (self.init_cfg or self.checkpoint) is not None:
            yield "pretrained", "give pretrained or init_cfg, not both"
        yield from super().faults()

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None means random ones from a seed of `key()`."""
        if self.pretrained is not None:
            return WeightsRef(self.pretrained, pointer="#/backbone/pretrained")
        return super().weights()
