"""YOLOv6's backbones (arXiv:2301.05586) as mmyolo has them: EfficientRep and CSPBep, in their training form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvModule,
    Scale,
    make_activation,
    make_family,
)
from service.backbones.yolo import (
    PLAIN,
    SILU,
    YOLO_NORM,
    ConvStyle,
    PyramidPooling,
    Row,
    StagedBackbone,
    StagedSpec,
    YoloConfig,
    deepened,
    pyramid,
)

ROWS = (Row(64, 128, 6), Row(128, 256, 12), Row(256, 512, 18), Row(512, 1024, 6))
RELU = ActivationConfig(type="ReLU")


@dataclass(frozen=True)
class BlockSpec:
    """The block that everything is made of.

    `branches`: a 3x3 and a 1x1, each with a norm of its own, and where shapes allow and `identity` a norm alone;
    else one convolution. `alpha` weighs the 1x1. `fused`: the branches as one convolution, for deployment.
    """

    style: ConvStyle
    branches: bool = True
    bias: bool = False
    identity: bool = True
    alpha: bool = False
    fused: bool = False

    def make(self, inputs: int, outputs: int, *, stride: int = 1) -> nn.Module:
        """One block."""
        if self.branches:
            return BranchedConv(self, inputs, outputs, stride)
        return WrappedConv(self, inputs, outputs, stride)


def unbiased_conv(
    style: ConvStyle, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1
) -> ConvModule:
    """A convolution that has no bias even without a norm."""
    return ConvModule(
        inputs, outputs, kernel, stride=stride, bias=False, norm=style.norm, activation=style.activation
    )


class BranchedConv(Scale):
    """mmyolo's `RepVGGBlock`; keys `rbr_dense`, `rbr_1x1`, `rbr_identity`, `alpha`, or fused `rbr_reparam`."""

    def __init__(self, block: BlockSpec, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        norm = block.style.norm
        self.activate = make_activation(block.style.activation)
        self.alpha = nn.Parameter(torch.ones(1)) if block.alpha else None
        self.fused = block.fused
        if block.fused:
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            return
        identity = block.identity and inputs == outputs and stride == 1 and norm is not None
        self.rbr_identity = make_norm(norm, inputs) if identity and norm is not None else None
        self.rbr_dense = _branch(norm, inputs, outputs, 3, stride)
        self.rbr_1x1 = _branch(norm, inputs, outputs, 1, stride)

    def start(self) -> None:
        """The 1x1 weighs as much as the 3x3."""
        if self.alpha is not None:
            nn.init.ones_(self.alpha)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        activated: Tensor = self.activate(self.rbr_reparam(maps) if self.fused else self._sum(maps))
        return activated

    def _sum(self, maps: Tensor) -> Tensor:
        narrow = self.rbr_1x1(maps)
        found: Tensor = self.rbr_dense(maps) + (narrow if self.alpha is None else self.alpha * narrow)
        return found if self.rbr_identity is None else found + self.rbr_identity(maps)


def _branch(norm: NormSpec | None, inputs: int, outputs: int, kernel: int, stride: int) -> ConvModule:
    return ConvModule(inputs, outputs, kernel, stride=stride, bias=False, norm=norm, activation=PLAIN)


class WrappedConv(nn.Module):
    """mmyolo's `ConvWrapper`: one 3x3 convolution; key `block`."""

    def __init__(self, block: BlockSpec, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        style = block.style
        self.block = ConvModule(
            inputs, outputs, 3, stride=stride, bias=block.bias, norm=style.norm, activation=style.activation
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        found: Tensor = self.block(maps)
        return found


class WeighedPair(Scale):
    """mmyolo's `BottleRep`: two blocks and a weighed shortcut; keys `conv1`, `conv2`, `alpha`."""

    def __init__(self, block: BlockSpec, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.conv1 = block.make(width, width)
        self.conv2 = block.make(width, width)

    def start(self) -> None:
        """The shortcut counts in full."""
        nn.init.ones_(self.alpha)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv2(self.conv1(maps)) + self.alpha * maps
        return found


class BlockStage(nn.Module):
    """mmyolo's `RepStageBlock`: blocks after each other; keys `conv1` and, for the others, `block`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.conv1 = blocks[0]
        self.block = nn.Sequential(*blocks[1:])

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.block(self.conv1(maps))
        return found


class PartialStage(nn.Module):
    """mmyolo's `BepC3StageBlock`: pairs of blocks on one half of the channels, the other half beside them."""

    def __init__(
        self,
        style: ConvStyle,
        block: BlockSpec,
        width: int,
        hidden: int,
        pairs: int,
        *,
        inputs: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = unbiased_conv(style, inputs or width, hidden)
        self.conv2 = unbiased_conv(style, inputs or width, hidden)
        self.conv3 = unbiased_conv(style, 2 * hidden, width)
        self.block = BlockStage([WeighedPair(block, hidden) for _ in range(pairs)])

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        halves = torch.cat((self.block(self.conv1(maps)), self.conv2(maps)), 1)
        found: Tensor = self.conv3(halves)
        return found


class PartialPyramid(nn.Module):
    """mmyolo's `CSPSPPFBottleneck`: the pyramid on one half of the channels; keys `conv1` to `conv7`."""

    def __init__(self, style: ConvStyle, width: int) -> None:
        super().__init__()
        hidden = width // 2
        self.conv1 = style.conv(width, hidden)
        self.conv3 = style.conv(hidden, hidden, 3)
        self.conv4 = style.conv(hidden, hidden)
        self.conv2 = style.conv(width, hidden)
        self.conv5 = style.conv(4 * hidden, hidden)
        self.conv6 = style.conv(hidden, hidden, 3)
        self.conv7 = style.conv(2 * hidden, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        pooled = pyramid(self.conv4(self.conv3(self.conv1(maps))), 5)
        found: Tensor = self.conv7(torch.cat((self.conv2(maps), self.conv6(self.conv5(pooled))), 1))
        return found


# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class YOLOv6Spec(StagedSpec):
    """What decides the network. `hidden` are the channels of CSPBep's blocks, empty for EfficientRep."""

    block: BlockSpec
    blocks: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    partial_pyramid: bool = False


class YOLOv6(StagedBackbone):
    """EfficientRep or CSPBep with mmyolo's keys."""

    def __init__(self, spec: YOLOv6Spec) -> None:
        self.spec = spec
        super().__init__(spec)

    def make_stem(self) -> nn.Module:
        """One block of stride 2."""
        return self.spec.block.make(self.spec.in_channels, self.spec.widths[0], stride=2)

    def make_stage(self, stage: int) -> list[nn.Module]:
        """A block of stride 2 with the stage's blocks, and behind the last stage a pyramid."""
        spec, width = self.spec, self.spec.widths[stage + 1]
        first = spec.block.make(spec.widths[stage], width, stride=2)
        layers: list[nn.Module] = [nn.Sequential(first, self._blocks(stage))]
        if stage == len(spec.blocks) - 1:
            partial = spec.partial_pyramid
            layers.append(
                PartialPyramid(spec.style, width) if partial else PyramidPooling(spec.style, width, width)
            )
        return layers

    def _blocks(self, stage: int) -> nn.Module:
        spec, width, blocks = self.spec, self.spec.widths[stage + 1], self.spec.blocks[stage]
        if spec.hidden:
            pairs = max(blocks // 2, 1)
            return PartialStage(spec.style, spec.block, width, spec.hidden[stage], pairs)
        return BlockStage([spec.block.make(width, width) for _ in range(blocks)])


# --- spellings ------------------------------------------------------------------------------------


class BranchedBlockConfig(BaseModel):
    """`block_cfg=dict(type='RepVGGBlock')`; norm and activation are its own, not those of the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["RepVGGBlock"]
    norm_cfg: NormConfig = YOLO_NORM
    act_cfg: ActivationConfig = RELU
    use_se: Literal[False] = False
    use_alpha: bool = Field(False, description="A weight of the 1x1 branch.")
    use_bn_first: bool = Field(True, description="A norm alone as third branch, where shapes allow.")
    deploy: bool = Field(False, description="The branches fused into one convolution.")

    def spec(self) -> BlockSpec:
        """The neutral spelling."""
        return BlockSpec(
            ConvStyle(self.norm_cfg.spec(), self.act_cfg.spec()),
            identity=self.use_bn_first,
            alpha=self.use_alpha,
            fused=self.deploy,
        )


class WrappedBlockConfig(BaseModel):
    """`block_cfg=dict(type='ConvWrapper')`; norm and activation are its own, not those of the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["ConvWrapper"]
    bias: bool = True
    norm_cfg: NormConfig | None = None
    act_cfg: ActivationConfig | None = SILU

    def spec(self) -> BlockSpec:
        """The neutral spelling."""
        norm = None if self.norm_cfg is None else self.norm_cfg.spec()
        activation: ActivationSpec = PLAIN if self.act_cfg is None else self.act_cfg.spec()
        return BlockSpec(ConvStyle(norm, activation), branches=False, bias=self.bias)


BlockConfig = Annotated[BranchedBlockConfig | WrappedBlockConfig, Field(discriminator="type")]


class EfficientRepConfig(YoloConfig):
    """`mmyolo.YOLOv6EfficientRep`."""

    NETWORK: ClassVar[str] = "YOLOv6"

    arch: Literal["P5"] = "P5"
    use_cspsppf: bool = Field(False, description="Pools on one half of the channels only.")
    act_cfg: ActivationConfig | None = Field(RELU, description="Of the pyramid pooling; null is none.")
    block_cfg: BlockConfig = Field(
        BranchedBlockConfig(type="RepVGGBlock"), description="The block that stages are made of."
    )

    def network(self) -> YOLOv6:
        """The network of these keys, without its weights."""
        return YOLOv6(self.spec())

    def hidden(self) -> tuple[int, ...]:
        """The channels of CSPBep's blocks."""
        return ()

    def spec(self) -> YOLOv6Spec:
        """The neutral spelling."""
        return YOLOv6Spec(
            widths=tuple(
                int(width * self.widen_factor) for width in (ROWS[0].inputs, *(row.outputs for row in ROWS))
            ),
            style=self.style(),
            in_channels=self.input_channels,
            plugins=self.plugin_specs(),
            block=self.block_cfg.spec(),
            blocks=tuple(deepened(row.blocks, self.deepen_factor) for row in ROWS),
            hidden=self.hidden(),
            partial_pyramid=self.use_cspsppf,
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what `block_cfg` must not say otherwise."""
        norm = self.block_cfg.norm_cfg
        if norm is not None and (fault := norm.fault()) is not None:
            yield "block_cfg/norm_cfg/num_groups", fault
        if norm is not None and norm.type == "GN":
            yield "block_cfg/norm_cfg/type", "GN is not served in blocks"
        if norm is not None and norm.requires_grad != self.norm_cfg.requires_grad:
            yield "block_cfg/norm_cfg/requires_grad", "must be that of norm_cfg"
        yield from super().faults()


class CSPBepConfig(EfficientRepConfig):
    """`mmyolo.YOLOv6CSPBep`, which takes `use_cspsppf` and does not follow it."""

    use_cspsppf: bool = Field(False, description="The library ignores it here, and so does this.")
    hidden_ratio: Annotated[float, Field(ge=0.05, le=4)] = Field(
        0.5, description="Channels of a stage's blocks over those of the stage."
    )
    act_cfg: ActivationConfig | None = Field(
        SILU, description="Of the 1x1 convolutions and the pyramid pooling; null is none."
    )
    block_cfg: BlockConfig = Field(
        WrappedBlockConfig(type="ConvWrapper"), description="The block that stages are made of."
    )

    def spec(self) -> YOLOv6Spec:
        """The neutral spelling."""
        return replace(super().spec(), partial_pyramid=False)

    def hidden(self) -> tuple[int, ...]:
        """The channels of the blocks."""
        widths = (int(row.outputs * self.widen_factor) for row in ROWS)
        return tuple(int(width * self.hidden_ratio) for width in widths)

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and blocks without channels."""
        if min(self.hidden()) < 1:
            yield "hidden_ratio", f"{self.hidden_ratio} leaves a stage's blocks without channels"
        yield from super().faults()


EXAMPLE = {"deepen_factor": 0.33, "widen_factor": 0.5, "out_indices": [0, 1, 2, 3, 4]}
EFFICIENT_REP = make_family(EfficientRepConfig, YOLOv6, example=EXAMPLE, architectures=("P5",))
CSP_BEP = make_family(CSPBepConfig, YOLOv6, example=EXAMPLE, architectures=("P5",))
