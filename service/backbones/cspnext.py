"""CSPNeXt (RTMDet, arXiv:2212.07784): mmdet's and mmyolo's spellings of one network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from service.backbones.csp_darknet import Arch
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import PlainConvConfig, make_family
from service.backbones.yolo import (
    CSPLayer,
    CSPRow,
    PoolKernels,
    PyramidPooling,
    StagedBackbone,
    StagedConfig,
    StagedSpec,
    YoloConfig,
    chain_fault,
    cspnext_block,
    deepened,
)

P5 = (
    CSPRow(64, 128, 3, True, False),
    CSPRow(128, 256, 6, True, False),
    CSPRow(256, 512, 6, True, False),
    CSPRow(512, 1024, 3, False, True),
)
ARCHS: Mapping[str, tuple[CSPRow, ...]] = {
    "P5": P5,
    "P6": (*P5[:3], CSPRow(512, 768, 3, True, False), CSPRow(768, 1024, 3, False, True)),
}


@dataclass(frozen=True, kw_only=True)
class CSPNeXtSpec(StagedSpec):
    """What decides a CSPNeXt. `hidden` are the channels of a stage's blocks, `gate` is its channel attention.

    `kernels` of the pyramid are one kernel three times in a row, or several beside each other.
    """

    stem: int
    hidden: tuple[int, ...]
    blocks: tuple[int, ...]
    identity: tuple[bool, ...]
    pyramid: tuple[bool, ...]
    kernels: int | tuple[int, ...]
    gate: bool
    separable: bool


class CSPNeXt(StagedBackbone):
    """A CSPNeXt whose state dict has the libraries' keys."""

    def __init__(self, spec: CSPNeXtSpec) -> None:
        self.spec = spec
        super().__init__(spec)

    def make_stem(self) -> nn.Module:
        """Three 3x3 convolutions, the first of stride 2."""
        spec, conv = self.spec, self.spec.style.conv
        return nn.Sequential(
            conv(spec.in_channels, spec.stem, 3, stride=2),
            conv(spec.stem, spec.stem, 3),
            conv(spec.stem, spec.widths[0], 3),
        )

    def make_stage(self, stage: int) -> list[nn.Module]:
        """A convolution of stride 2, the pyramid where the stage has it, and a layer of blocks."""
        spec, width = self.spec, self.spec.widths[stage + 1]
        conv = spec.style.separable if spec.separable else spec.style.conv
        layers: list[nn.Module] = [conv(spec.widths[stage], width, 3, stride=2)]
        if spec.pyramid[stage]:
            layers.append(PyramidPooling(spec.style, width, width, spec.kernels))
        return [*layers, self._layer(stage)]

    def _layer(self, stage: int) -> nn.Module:
        spec, hidden = self.spec, self.spec.hidden[stage]
        blocks = [
            cspnext_block(spec.style, hidden, identity=spec.identity[stage], separable=spec.separable)
            for _ in range(spec.blocks[stage])
        ]
        return CSPLayer(spec.style, spec.widths[stage + 1], hidden, blocks, gate=spec.gate)


class CSPNeXtKeys(StagedConfig):
    """What both spellings take."""

    NETWORK: ClassVar[str] = "CSPNeXt"

    arch: Arch = Field("P5", description="P6 has a fifth stage.")
    use_depthwise: bool = Field(False, description="Separable 3x3 convolutions.")
    expand_ratio: Annotated[float, Field(ge=0.05, le=4)] = Field(
        0.5, description="Channels of a stage's blocks over those of the stage."
    )
    arch_ovewrite: Annotated[tuple[CSPRow, ...], Field(min_length=1, max_length=6)] | None = Field(
        None, description="Stages in place of arch's: [channels in, out, blocks, shortcuts, pyramid pooling]."
    )
    channel_attention: bool = Field(True, description="Weighs the channels at the end of a stage.")
    conv_cfg: PlainConvConfig | None = None

    def network(self) -> CSPNeXt:
        """The network of these keys, without its weights."""
        return CSPNeXt(self.spec())

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        return self.arch_ovewrite or ARCHS[self.arch]

    def special(self) -> dict[str, Any]:
        """What differs between the two, by fields of the spec."""
        raise NotImplementedError

    def spec(self) -> CSPNeXtSpec:
        """The neutral spelling."""
        rows = self.rows()
        widths = [int(w * self.widen_factor) for w in (rows[0].inputs, *(row.outputs for row in rows))]
        return CSPNeXtSpec(
            widths=tuple(widths),
            style=self.style(),
            stem=int(rows[0].inputs * self.widen_factor // 2),
            hidden=tuple(int(width * self.expand_ratio) for width in widths[1:]),
            blocks=tuple(deepened(row.blocks, self.deepen_factor) for row in rows),
            identity=tuple(row.identity for row in rows),
            pyramid=tuple(row.pyramid for row in rows),
            gate=self.channel_attention,
            separable=self.use_depthwise,
            **self.special(),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, stages that do not follow each other, and too few channels."""
        spec = self.spec()
        if min(spec.stem, *spec.widths[1:]) < 1 or max(spec.widths) < 2:
            yield "widen_factor", f"{self.widen_factor} leaves a layer without channels"
        if min(spec.hidden) < 1:
            yield "expand_ratio", f"{self.expand_ratio} leaves a stage's blocks without channels"
        if (fault := chain_fault(self.rows())) is not None:
            yield "arch_ovewrite", fault
        yield from super().faults()


class DetectionCSPNeXtConfig(CSPNeXtKeys):
    """`mmdet.CSPNeXt`."""

    spp_kernel_sizes: PoolKernels = Field((5, 9, 13), description="Kernels of the pyramid pooling.")

    def special(self) -> dict[str, Any]:
        """Pools beside each other."""
        return {"kernels": self.spp_kernel_sizes}


class YoloCSPNeXtConfig(CSPNeXtKeys, YoloConfig):
    """`mmyolo.CSPNeXt`."""

    input_channels: Literal[3] = Field(3, description="Its stem takes three channels only.")
    norm_cfg: NormConfig = NormConfig(type="BN")

    def special(self) -> dict[str, Any]:
        """Pools in a row, and plugins."""
        return {"kernels": 5, "plugins": self.plugin_specs()}


EXAMPLE = {"deepen_factor": 0.33, "widen_factor": 0.5, "out_indices": [0, 1, 2, 3, 4]}
MMDET = make_family(DetectionCSPNeXtConfig, CSPNeXt, example=EXAMPLE, architectures=("P5", "P6"))
MMYOLO = make_family(YoloCSPNeXtConfig, CSPNeXt, example=EXAMPLE, architectures=("P5", "P6"))
