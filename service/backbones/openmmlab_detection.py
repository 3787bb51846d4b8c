"""What mmdet's residual networks take besides, and the defaults that differ from mmpretrain's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from service.backbones.base import CheckpointName, Indices
from service.backbones.block_plugins import Plugins, PluginSpec, plugin_faults
from service.backbones.deformable import DeformConfig, DeformSpec
from service.backbones.resnet import Channels, ResidualConfig, StemKind
from service.config.spec import WeightsRef

Options = Annotated[dict[str, Any], Field(max_length=16)]


class DetectionKeys(ResidualConfig):
    """Keys and defaults of mmdet's residual networks.

    A deep stem names its weights flatly; a pooling shortcut has its pool where it does not stride, too. Which types
    are served with `dcn` and `plugins` is in `HAS_DEFORMABLE` and `HAS_PLUGINS`; `FALLS_BACK`, where
    `fallback_on_stride` has an effect.
    """

    HAS_DEFORMABLE: ClassVar[bool] = False
    HAS_PLUGINS: ClassVar[bool] = False
    FALLS_BACK: ClassVar[bool] = False
    DEEP_STEM: ClassVar[StemKind] = "flat"
    POOL_AT_STRIDE_1: ClassVar[bool] = True

    stem_channels: Channels | None = Field(None, description="null is base_channels.")
    out_indices: Indices = Field((0, 1, 2, 3), description="Stages, 0 is layer1.")
    norm_eval: bool = Field(True, description="Keeps every batch norm in eval mode.")
    dcn: DeformConfig | None = Field(None, description="The kind of deformable convolutions.")
    stage_with_dcn: Annotated[tuple[bool, ...], Field(max_length=4)] = Field(
        (False, False, False, False), description="Which stages have `dcn` for their bottlenecks' 3x3."
    )
    plugins: Plugins | None = Field(
        None, description="Modules inside bottlenecks: ContextBlock, GeneralizedAttention, NonLocal2d."
    )
    pretrained: CheckpointName | None = Field(
        None, description="Deprecated spelling of init_cfg with this checkpoint."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what is not served."""
        yield from self._deform_faults()
        yield from self._plugin_faults()
        if self.pretrained is not None and (self.init_cfg or self.checkpoint) is not None:
            yield "pretrained", "give pretrained or init_cfg, not both"
        yield from super().faults()

    def _deform_faults(self) -> Iterator[tuple[str, str]]:
        if self.dcn is None:
            return
        if len(self.stage_with_dcn) != self.stages():
            yield "stage_with_dcn", f"has {len(self.stage_with_dcn)} entries for {self.stages()} stages"
            return
        spec = self.spec()
        if not any(self.stage_with_dcn):
            return
        if not self.HAS_DEFORMABLE:
            yield "dcn", "deformable convolutions are not served in this type"
        if spec.block == "basic":
            yield "dcn", "only the bottlenecks of depth 50 and above take deformable convolutions"
        if self.conv_cfg is not None:
            yield "conv_cfg", "must be null where there is dcn"
        groups = self.dcn.groups()
        widths = (w for w, deforms in zip(self.middle_widths(), self.stage_with_dcn, strict=True) if deforms)
        if uneven := next((width for width in widths if width % groups), None):
            yield "dcn/deform_groups", f"{groups} groups do not divide {uneven} channels"

    def _plugin_faults(self) -> Iterator[tuple[str, str]]:
        if not self.plugins:
            return
        spec = self.spec()
        if not self.HAS_PLUGINS:
            yield "plugins", "modules inside blocks are not served in this type"
        if spec.block == "basic":
            yield "plugins", "only the bottlenecks of depth 50 and above take modules inside"
        yield from plugin_faults(self.plugins, spec.inner, spec.widths)

    def middle_widths(self) -> tuple[int, ...]:
        """Channels of what may be deformable, by stage."""
        return self.spec().inner

    def deform(self) -> DeformSpec | None:
        """Where 3x3 convolutions are deformable."""
        if self.dcn is None or not any(self.stage_with_dcn):
            return None
        but_first = self.dcn.fallback_on_stride and self.FALLS_BACK
        return DeformSpec(
            self.dcn.type == "DCNv2", self.dcn.groups(), self.stage_with_dcn, but_first=but_first
        )

    def plugin_specs(self) -> tuple[PluginSpec, ...]:
        """What is inside blocks."""
        return tuple(plugin.spec() for plugin in self.plugins or ())

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None means random ones from a seed of `key()`."""
        if self.pretrained is not None:
            return WeightsRef(self.pretrained, pointer="#/backbone/pretrained")
        return super().weights()
