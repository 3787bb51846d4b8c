"""PP-YOLOE's CSPResNet (arXiv:2203.16250) as mmyolo has it, in its training form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig
from service.backbones.openmmlab import ConvModule, HardSigmoid, make_family
from service.backbones.yolo import (
    PLAIN,
    Row,
    StagedBackbone,
    StagedSpec,
    YoloConfig,
    chain_fault,
)
from service.backbones.yolov6 import BlockSpec, BranchedConv

ROWS = (Row(64, 128, 3), Row(128, 256, 6), Row(256, 512, 6), Row(512, 1024, 3))


@dataclass(frozen=True, kw_only=True)
class PPYOLOESpec(StagedSpec):
    """What decides the network.

    `large_stem` has three convolutions instead of two; `shortcut` goes around each block, `alpha` weighs its 1x1
    branch, `gate` is the effective squeeze-and-excitation of a stage.
    """

    blocks: tuple[int, ...]
    large_stem: bool
    shortcut: bool
    alpha: bool
    gate: bool


class Block(nn.Module):
    """mmyolo's `PPYOLOEBasicBlock`: a 3x3 convolution and a branched one; keys `conv1`, `conv2`."""

    def __init__(self, spec: PPYOLOESpec, width: int) -> None:
        super().__init__()
        self.shortcut = spec.shortcut
        self.conv1 = spec.style.conv(width, width, 3)
        branched = BlockSpec(spec.style, identity=False, alpha=spec.alpha)
        self.conv2 = BranchedConv(branched, width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv2(self.conv1(maps))
        return maps + found if self.shortcut else found


class EffectiveGate(nn.Module):
    """mmyolo's `EffectiveSELayer`: channels weighed by a hard sigmoid of their means; key `fc.conv`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = ConvModule(width, width, 1, norm=None, activation=PLAIN)
        self.activate = HardSigmoid()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        gates: Tensor = self.activate(self.fc(maps.mean((2, 3), keepdim=True)))
        return maps * gates


class Stage(nn.Module):
    """mmyolo's `CSPResLayer`: maps halved, blocks on one half of the channels, the other half beside them."""

    def __init__(self, spec: PPYOLOESpec, stage: int) -> None:
        super().__init__()
        style, inputs, outputs = spec.style, spec.widths[stage], spec.widths[stage + 1]
        width = (inputs + outputs) // 2
        half = width // 2
        self.conv_down = style.conv(inputs, width, 3, stride=2)
        self.conv1 = style.conv(width, half)
        self.conv2 = style.conv(width, half)
        self.blocks = nn.Sequential(*(Block(spec, half) for _ in range(spec.blocks[stage])))
        self.conv3 = style.conv(2 * half, outputs)
        self.attn = EffectiveGate(2 * half) if spec.gate else None

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / 2, w / 2]."""
        maps = self.conv_down(maps)
        halves = torch.cat((self.conv1(maps), self.blocks(self.conv2(maps))), 1)
        found: Tensor = self.conv3(halves if self.attn is None else self.attn(halves))
        return found


class CSPResNet(StagedBackbone):
    """PP-YOLOE's backbone with mmyolo's keys."""

    def __init__(self, spec: PPYOLOESpec) -> None:
        self.spec = spec
        super().__init__(spec)

    def make_stem(self) -> nn.Module:
        """Two or three 3x3 convolutions, the first of stride 2."""
        spec, conv, width = self.spec, self.spec.style.conv, self.spec.widths[0]
        middle = [conv(width // 2, width // 2, 3)] if spec.large_stem else []
        return nn.Sequential(
            conv(spec.in_channels, width // 2, 3, stride=2), *middle, conv(width // 2, width, 3)
        )

    def make_stage(self, stage: int) -> list[nn.Module]:
        """One layer."""
        return [Stage(self.spec, stage)]


# --- mmyolo.PPYOLOECSPResNet ----------------------------------------------------------------------


class BlockConfig(BaseModel):
    """`block_cfg`; norm and activation are those of the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["PPYOLOEBasicBlock"]
    shortcut: bool = True
    use_alpha: bool = Field(False, description="A weight of the 1x1 branch.")


class GateActivationConfig(BaseModel):
    """`act_cfg` of the attention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["HSigmoid"]


class GateConfig(BaseModel):
    """`attention_cfg`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["EffectiveSELayer"]
    act_cfg: GateActivationConfig = GateActivationConfig(type="HSigmoid")


class PPYOLOEConfig(YoloConfig):
    """`mmyolo.PPYOLOECSPResNet`."""

    NETWORK: ClassVar[str] = "PPYOLOECSPResNet"

    arch: Literal["P5"] = "P5"
    arch_ovewrite: Annotated[tuple[Row, ...], Field(min_length=1, max_length=6)] | None = Field(
        None, description="Stages in place of arch's: [channels in, out, blocks]."
    )
    block_cfg: BlockConfig = BlockConfig(type="PPYOLOEBasicBlock", use_alpha=True)
    attention_cfg: GateConfig | None = Field(
        GateConfig(type="EffectiveSELayer"), description="null is no attention."
    )
    norm_cfg: NormConfig = NormConfig(type="BN", momentum=0.1, eps=1e-5)
    use_large_stem: bool = Field(False, description="Three convolutions in the stem instead of two.")

    def rows(self) -> tuple[Row, ...]:
        """The table of stages."""
        return self.arch_ovewrite or ROWS

    def network(self) -> CSPResNet:
        """The network of these keys, without its weights."""
        return CSPResNet(self.spec())

    def spec(self) -> PPYOLOESpec:
        """The neutral spelling."""
        rows = self.rows()
        return PPYOLOESpec(
            widths=tuple(
                int(width * self.widen_factor) for width in (rows[0].inputs, *(row.outputs for row in rows))
            ),
            style=self.style(),
            in_channels=self.input_channels,
            plugins=self.plugin_specs(),
            # Unlike the other backbones, a stage may be left without blocks.
            blocks=tuple(round(row.blocks * self.deepen_factor) for row in rows),
            large_stem=self.use_large_stem,
            shortcut=self.block_cfg.shortcut,
            alpha=self.block_cfg.use_alpha,
            gate=self.attention_cfg is not None,
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, stages that do not follow each other, and too few channels."""
        widths = self.spec().widths
        if widths[0] < 2 or min(a + b for a, b in pairwise(widths)) < 4:
            yield "widen_factor", f"{self.widen_factor} leaves a layer without channels"
        if any((a + b) // 2 % 2 for a, b in pairwise(widths)):
            yield "widen_factor", f"{self.widen_factor} leaves a stage an odd number of channels to halve"
        if (fault := chain_fault(self.rows())) is not None:
            yield "arch_ovewrite", fault
        yield from super().faults()


PPYOLOE = make_family(
    PPYOLOEConfig,
    CSPResNet,
    example={"deepen_factor": 0.33, "widen_factor": 0.5, "out_indices": [0, 1, 2, 3, 4]},
    architectures=("P5",),
)
