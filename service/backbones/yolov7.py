"""YOLOv7's backbone (arXiv:2207.02696) as mmyolo has it: Tiny, L, X, W, E, D and E2E."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.openmmlab import make_family
from service.backbones.yolo import ConvStyle, Focus, StagedBackbone, StagedSpec, YoloConfig


@dataclass(frozen=True)
class Arch:
    """A row of the table.

    `widths` are of the stem and of the stages; `ratios` those of a stage's inner channels to what its layer
    takes. `stem`: "two" convolutions of stride 2, "three" of which one has, or a "focus". `down` says how a
    stage halves its maps; `halves` that the first one does with half of its channels. `blocks` of two
    convolutions a layer, `layers` beside each other that are summed (0: one, not in a list).
    """

    stem: Literal["two", "three", "focus"]
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    down: Literal["pool", "conv", "both"]
    blocks: int = 0
    layers: int = 0
    halves: bool = False


E_WIDTHS = (80, 160, 320, 640, 960, 1280)
ARCHS: Mapping[str, Arch] = {
    "Tiny": Arch("two", (64, 64, 128, 256, 512), (0.5, 1.0, 1.0, 1.0), "pool"),
    "L": Arch("three", (64, 256, 512, 1024, 1024), (0.5, 0.5, 0.5, 0.25), "both", 2, halves=True),
    "X": Arch("three", (80, 320, 640, 1280, 1280), (0.4, 0.4, 0.4, 0.2), "both", 3, halves=True),
    "W": Arch("focus", (64, 128, 256, 512, 768, 1024), (0.5,) * 5, "conv", 2),
    "E": Arch("focus", E_WIDTHS, (0.4,) * 5, "both", 3),
    "D": Arch("focus", (96, 192, 384, 768, 1152, 1536), (1 / 3,) * 5, "both", 4),
    "E2E": Arch("focus", E_WIDTHS, (0.4,) * 5, "both", 3, layers=2),
}


@dataclass(frozen=True, kw_only=True)
class YOLOv7Spec(StagedSpec):
    """What decides the network: a row of the table with `widths` after `widen_factor`, `half` that of the stem."""

    arch: Arch
    half: int

    def strides(self) -> tuple[int, ...]:
        """Strides of the stem and of the stages; Tiny's stem has the first stage's."""
        if self.arch.stem == "two":
            return (4, *(4 * 2**stage for stage in range(len(self.widths) - 1)))
        return super().strides()

    def halved(self) -> tuple[int, ...]:
        """The channels of which a pool makes one half and a convolution the other."""
        if self.arch.down != "both":
            return ()
        return self.widths[1:-1] if self.arch.halves else self.widths[1:]


class TinyLayer(nn.Module):
    """mmyolo's `TinyDownSampleBlock` (which does not downsample): three convolutions in a row, one beside them."""

    def __init__(self, style: ConvStyle, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.short_conv = style.conv(inputs, hidden)
        steps = (style.conv(inputs, hidden), style.conv(hidden, hidden, 3), style.conv(hidden, hidden, 3))
        self.main_convs = nn.ModuleList(steps)
        self.final_conv = style.conv(4 * hidden, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        parts = [self.short_conv(maps)]
        for conv in self.main_convs:
            maps = conv(maps)
            parts.insert(0, maps)
        found: Tensor = self.final_conv(torch.cat(parts, 1))
        return found


class ELANLayer(nn.Module):
    """mmyolo's `ELANBlock`: every block of 3x3 convolutions goes on to the end, the deepest first.

    A block is `width` wide, which is `hidden` by default, and has `convs` convolutions.
    """

    def __init__(
        self,
        style: ConvStyle,
        inputs: int,
        outputs: int,
        hidden: int,
        blocks: int,
        *,
        width: int | None = None,
        convs: int = 2,
    ) -> None:
        super().__init__()
        width = hidden if width is None else width
        self.main_conv = style.conv(inputs, hidden)
        self.short_conv = style.conv(inputs, hidden)
        self.blocks = nn.ModuleList()
        for place in range(blocks):
            chain = [style.conv(width if place + step else hidden, width, 3) for step in range(convs)]
            self.blocks.append(chain[0] if convs == 1 else nn.Sequential(*chain))
        self.final_conv = style.conv(blocks * width + 2 * hidden, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        short, maps = self.short_conv(maps), self.main_conv(maps)
        parts = [maps, short]
        for block in self.blocks:
            maps = block(maps)
            parts.insert(0, maps)
        found: Tensor = self.final_conv(torch.cat(parts, 1))
        return found


class SummedLayers(nn.Module):
    """mmyolo's `EELANBlock`: layers beside each other."""

    def __init__(self, layers: list[ELANLayer]) -> None:
        super().__init__()
        self.e_elan_blocks = nn.ModuleList(layers)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        found: Tensor = sum(layer(maps) for layer in self.e_elan_blocks)
        return found


class PoolAndConv(nn.Module):
    """mmyolo's `MaxPoolAndStrideConvBlock`: maps halved by a pool and by a convolution; takes even sizes."""

    def __init__(self, style: ConvStyle, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        half = outputs // 2
        self.maxpool_branches = nn.Sequential(nn.MaxPool2d(2, 2), style.conv(inputs, half))
        self.stride_conv_branches = nn.Sequential(
            style.conv(inputs, hidden), style.conv(hidden, half, 3, stride=2)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / 2, w / 2]."""
        return torch.cat((self.stride_conv_branches(maps), self.maxpool_branches(maps)), 1)


class YOLOv7(StagedBackbone):
    """A YOLOv7 backbone whose state dict has mmyolo's keys."""

    def __init__(self, spec: YOLOv7Spec) -> None:
        self.spec = spec
        super().__init__(spec)

    def make_stem(self) -> nn.Module:
        """Two or three convolutions, or a focus."""
        spec, conv, width = self.spec, self.spec.style.conv, self.spec.widths[0]
        if spec.arch.stem == "focus":
            return Focus(spec.style, spec.in_channels, width)
        first = conv(spec.in_channels, spec.half, 3, stride=2 if spec.arch.stem == "two" else 1)
        steps = [first, conv(spec.half, width, 3, stride=2)]
        return nn.Sequential(*steps, *([conv(width, width, 3)] if spec.arch.stem == "three" else []))

    def make_stage(self, stage: int) -> list[nn.Module]:
        """What halves the maps, and a layer."""
        spec, arch = self.spec, self.spec.arch
        given, width = spec.widths[stage], spec.widths[stage + 1]
        if arch.down == "pool":
            pool = [nn.MaxPool2d(2, 2)] if stage > 0 else []
            return [*pool, TinyLayer(spec.style, given, width, int(given * arch.ratios[stage]))]
        inputs = (width // 2 if stage == 0 else given) if arch.halves else width
        return [self._down(stage, given, inputs), self._layer(stage, inputs, width)]

    def _down(self, stage: int, given: int, width: int) -> nn.Module:
        style, arch = self.spec.style, self.spec.arch
        if arch.down == "conv" or (arch.halves and stage == 0):
            return style.conv(given, width, 3, stride=2)
        return PoolAndConv(style, given, width, width // 2 if arch.halves else given)

    def _layer(self, stage: int, inputs: int, outputs: int) -> nn.Module:
        style, arch = self.spec.style, self.spec.arch
        hidden = int(inputs * arch.ratios[stage])
        made = [ELANLayer(style, inputs, outputs, hidden, arch.blocks) for _ in range(max(arch.layers, 1))]
        return SummedLayers(made) if arch.layers else made[0]


class YOLOv7Config(YoloConfig):
    """`mmyolo.YOLOv7Backbone`."""

    NETWORK: ClassVar[str] = "YOLOv7Backbone"

    arch: Literal["Tiny", "L", "X", "W", "E", "D", "E2E"] = Field(
        "L", description="Tiny, L and X have four stages, the others five."
    )
    input_channels: Literal[3] = Field(3, description="Its stem takes three channels only.")

    def network(self) -> YOLOv7:
        """The network of these keys, without its weights."""
        return YOLOv7(self.spec())

    def spec(self) -> YOLOv7Spec:
        """The neutral spelling."""
        arch = ARCHS[self.arch]
        return YOLOv7Spec(
            widths=tuple(int(width * self.widen_factor) for width in arch.widths),
            style=self.style(),
            plugins=self.plugin_specs(),
            arch=arch,
            half=int(arch.widths[0] * self.widen_factor // 2),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and channels that a stage cannot halve."""
        odd = [width for width in self.spec().halved() if width % 2]
        if odd:
            yield "widen_factor", f"{self.widen_factor} leaves {odd[0]} channels, which a stage has to halve"
        yield from super().faults()


EXAMPLE = {"arch": "L", "out_indices": [0, 1, 2, 3, 4]}
YOLOV7 = make_family(YOLOv7Config, YOLOv7, example=EXAMPLE, architectures=tuple(ARCHS))
