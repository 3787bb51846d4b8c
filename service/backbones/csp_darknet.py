"""CSPDarknet as YOLOv5, YOLOX and YOLOv8 have it: mmyolo's three spellings and mmdet's one.

mmdet's and mmyolo's networks of YOLOX are the same network with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.openmmlab import ActivationConfig, ConvModule, PlainConvConfig, make_family
from service.backbones.yolo import (
    Bottleneck,
    ConvStyle,
    CSPLayer,
    CSPRow,
    Focus,
    PoolKernels,
    PyramidPooling,
    StagedBackbone,
    StagedConfig,
    StagedSpec,
    YoloConfig,
    chain_fault,
    darknet_block,
    deepened,
    rounded_up,
)

Arch = Literal["P5", "P6"]
FIRST = (CSPRow(64, 128, 3, True, False),)
V5: Mapping[str, tuple[CSPRow, ...]] = {
    "P5": (
        *FIRST,
        CSPRow(128, 256, 6, True, False),
        CSPRow(256, 512, 9, True, False),
        CSPRow(512, 1024, 3, True, True),
    ),
    "P6": (
        *FIRST,
        CSPRow(128, 256, 6, True, False),
        CSPRow(256, 512, 9, True, False),
        CSPRow(512, 768, 3, True, False),
        CSPRow(768, 1024, 3, True, True),
    ),
}
X: Mapping[str, tuple[CSPRow, ...]] = {
    "P5": (
        *FIRST,
        CSPRow(128, 256, 9, True, False),
        CSPRow(256, 512, 9, True, False),
        CSPRow(512, 1024, 3, False, True),
    ),
    "P6": (
        *FIRST,
        CSPRow(128, 256, 9, True, False),
        CSPRow(256, 512, 9, True, False),
        CSPRow(512, 768, 3, True, False),
        CSPRow(768, 1024, 3, False, True),
    ),
}
V8 = (*FIRST, CSPRow(128, 256, 6, True, False), CSPRow(256, 512, 6, True, False))


@dataclass(frozen=True, kw_only=True)
class CSPDarknetSpec(StagedSpec):
    """What decides a CSPDarknet.

    `stem_kernel` is that of its one convolution, None for a focus. `split`: YOLOv8's layers, of which every
    block's maps go on. `pyramid_first` puts the pyramid before a stage's blocks instead of behind them.
    `separable` says of which of stages' first convolutions and blocks the 3x3 are separable.
    """

    blocks: tuple[int, ...]
    identity: tuple[bool, ...]
    pyramid: tuple[bool, ...]
    kernels: int | tuple[int, ...] = 5
    stem_kernel: int | None = None
    split: bool = False
    pyramid_first: bool = False
    separable: tuple[bool, bool] = (False, False)


class SplitLayer(nn.Module):
    """mmyolo's `CSPLayerWithTwoConv`: a half of the channels, and what each block makes of the other one."""

    def __init__(
        self, style: ConvStyle, width: int, blocks: int, *, identity: bool, inputs: int | None = None
    ) -> None:
        super().__init__()
        half = width // 2
        self.main_conv = style.conv(inputs or width, 2 * half)
        self.final_conv = style.conv((2 + blocks) * half, width)
        self.blocks = nn.ModuleList(
            Bottleneck(style.conv(half, half, 3), style.conv(half, half, 3), identity=identity)
            for _ in range(blocks)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        parts = list(self.main_conv(maps).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        found: Tensor = self.final_conv(torch.cat(parts, 1))
        return found


class CSPDarknet(StagedBackbone):
    """A CSPDarknet whose state dict has the libraries' keys."""

    def __init__(self, spec: CSPDarknetSpec) -> None:
        self.spec = spec
        super().__init__(spec)

    def make_stem(self) -> nn.Module:
        """A focus, or a convolution of stride 2."""
        spec, width = self.spec, self.spec.widths[0]
        if spec.stem_kernel is None:
            return Focus(spec.style, spec.in_channels, width)
        return ConvModule(
            spec.in_channels,
            width,
            spec.stem_kernel,
            stride=2,
            padding=(spec.stem_kernel - 1) // 2,
            norm=spec.style.norm,
            activation=spec.style.activation,
        )

    def make_stage(self, stage: int) -> list[nn.Module]:
        """A convolution of stride 2, a layer of blocks and, where the stage has it, a pyramid."""
        spec, width = self.spec, self.spec.widths[stage + 1]
        conv = spec.style.separable if spec.separable[0] else spec.style.conv
        layers: list[nn.Module] = [conv(spec.widths[stage], width, 3, stride=2), self._layer(stage)]
        if spec.pyramid[stage]:
            pooling = PyramidPooling(spec.style, width, width, spec.kernels)
            layers.insert(1 if spec.pyramid_first else 2, pooling)
        return layers

    def _layer(self, stage: int) -> nn.Module:
        spec, width = self.spec, self.spec.widths[stage + 1]
        identity, hidden = spec.identity[stage], width // 2
        if spec.split:
            return SplitLayer(spec.style, width, spec.blocks[stage], identity=identity)
        blocks = [
            darknet_block(spec.style, hidden, identity=identity, separable=spec.separable[1])
            for _ in range(spec.blocks[stage])
        ]
        return CSPLayer(spec.style, width, hidden, blocks)


# --- mmyolo ---------------------------------------------------------------------------------------


class _YoloDarknet(YoloConfig):
    """What mmyolo's three have in common."""

    NETWORK: ClassVar[str] = "CSPDarknet"

    def network(self) -> CSPDarknet:
        """The network of these keys, without its weights."""
        return CSPDarknet(self.spec())

    def spec(self) -> CSPDarknetSpec:
        """The neutral spelling."""
        return CSPDarknetSpec(**self.common(), **self.special())

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        raise NotImplementedError

    def special(self) -> dict[str, Any]:
        """What differs between the three, by fields of the spec."""
        raise NotImplementedError

    def common(self) -> dict[str, Any]:
        """What follows from the table of stages, by fields of the spec."""
        rows, widen = self.rows(), self.widen_factor
        return {
            "widths": tuple(rounded_up(w, widen) for w in (rows[0].inputs, *(row.outputs for row in rows))),
            "style": self.style(),
            "in_channels": self.input_channels,
            "plugins": self.plugin_specs(),
            "blocks": tuple(deepened(row.blocks, self.deepen_factor) for row in rows),
            "identity": tuple(row.identity for row in rows),
            "pyramid": tuple(row.pyramid for row in rows),
        }


class YOLOv5Config(_YoloDarknet):
    """`mmyolo.YOLOv5CSPDarknet`."""

    arch: Arch = Field("P5", description="P6 has a fifth stage.")

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        return V5[self.arch]

    def special(self) -> dict[str, Any]:
        """A 6x6 stem."""
        return {"stem_kernel": 6}


class YOLOv8Config(_YoloDarknet):
    """`mmyolo.YOLOv8CSPDarknet`."""

    arch: Literal["P5"] = "P5"
    last_stage_out_channels: Annotated[int, Field(strict=True, ge=8, le=4096)] = Field(
        1024, description="Channels of the last stage, before widen_factor."
    )

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        return (*V8, CSPRow(512, self.last_stage_out_channels, 3, True, True))

    def special(self) -> dict[str, Any]:
        """A 3x3 stem and split layers."""
        return {"stem_kernel": 3, "split": True}


class YOLOXConfig(_YoloDarknet):
    """`mmyolo.YOLOXCSPDarknet`."""

    arch: Literal["P5"] = "P5"
    input_channels: Literal[3] = Field(3, description="Its stem takes three channels only.")
    use_depthwise: bool = Field(False, description="Separable convolutions at the start of stages.")
    spp_kernal_sizes: PoolKernels = Field((5, 9, 13), description="Kernels of the pyramid pooling.")

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        return X[self.arch]

    def special(self) -> dict[str, Any]:
        """A focus, and the pyramid before the blocks."""
        # mmyolo makes only the stages' first convolutions separable, mmdet the blocks', too.
        return {
            "kernels": self.spp_kernal_sizes,
            "pyramid_first": True,
            "separable": (self.use_depthwise, False),
        }


# --- mmdet ----------------------------------------------------------------------------------------


class CSPDarknetConfig(StagedConfig):
    """`mmdet.CSPDarknet`."""

    NETWORK: ClassVar[str] = "CSPDarknet"

    arch: Arch = Field("P5", description="P6 has a fifth stage.")
    use_depthwise: bool = Field(False, description="Separable 3x3 convolutions.")
    arch_ovewrite: Annotated[tuple[CSPRow, ...], Field(min_length=1, max_length=6)] | None = Field(
        None, description="Stages in place of arch's: [channels in, out, blocks, shortcuts, pyramid pooling]."
    )
    spp_kernal_sizes: PoolKernels = Field((5, 9, 13), description="Kernels of the pyramid pooling.")
    conv_cfg: PlainConvConfig | None = None
    act_cfg: ActivationConfig | None = Field(ActivationConfig(type="Swish"), description="null is none.")

    def rows(self) -> tuple[CSPRow, ...]:
        """The table of stages."""
        return self.arch_ovewrite or X[self.arch]

    def network(self) -> CSPDarknet:
        """The network of these keys, without its weights."""
        return CSPDarknet(self.spec())

    def spec(self) -> CSPDarknetSpec:
        """The neutral spelling."""
        rows = self.rows()
        return CSPDarknetSpec(
            widths=tuple(
                int(width * self.widen_factor) for width in (rows[0].inputs, *(row.outputs for row in rows))
            ),
            style=self.style(),
            blocks=tuple(deepened(row.blocks, self.deepen_factor) for row in rows),
            identity=tuple(row.identity for row in rows),
            pyramid=tuple(row.pyramid for row in rows),
            kernels=self.spp_kernal_sizes,
            pyramid_first=True,
            separable=(self.use_depthwise, self.use_depthwise),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and stages that do not follow each other."""
        yield from narrow_faults(self)
        if (fault := chain_fault(self.rows())) is not None:
            yield "arch_ovewrite", fault
        yield from super().faults()


def narrow_faults(config: StagedConfig) -> Iterator[tuple[str, str]]:
    """A stage of a single channel cannot be halved."""
    if min(config.spec().widths) < 2:
        yield "widen_factor", f"{config.widen_factor} leaves fewer than 2 channels"


V5_EXAMPLE = {"deepen_factor": 0.33, "widen_factor": 0.5, "out_indices": [0, 1, 2, 3, 4]}
YOLOV5 = make_family(YOLOv5Config, CSPDarknet, example=V5_EXAMPLE, architectures=("P5", "P6"))
YOLOV8 = make_family(YOLOv8Config, CSPDarknet, example=V5_EXAMPLE, architectures=("P5",))
YOLOX = make_family(YOLOXConfig, CSPDarknet, example=V5_EXAMPLE, architectures=("P5",))
CSP_DARKNET = make_family(CSPDarknetConfig, CSPDarknet, example=V5_EXAMPLE, architectures=("P5", "P6"))
