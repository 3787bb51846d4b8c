"""ResNet as its other types spell it: V1c, V1d, CIFAR, ResNeXt, squeeze-and-excitation; mmdet's; mmselfsup's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Indices
from service.backbones.openmmlab import ActivationSpec, SqueezeExcite, make_divisible
from service.backbones.openmmlab_detection import DetectionKeys
from service.backbones.resnet import (
    BOTTLENECK_DEPTHS,
    CONVOLUTIONS,
    RESNET_NAMES,
    DepthConfig,
    Groups,
    Place,
    PretrainKeys,
    ResidualBlock,
    ResNet,
    ResNetSpec,
    StemKind,
    conv1x1,
    conv3x3,
    family,
)
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Freeze

AnyDepth = Literal[18, 34, 50, 101, 152]
BottleneckDepth = Literal[50, 101, 152]
Width = Annotated[int, Field(strict=True, ge=1, le=512)]


# --- mmpretrain: stems ----------------------------------------------------------------------------


class PlainKeys(PretrainKeys):
    """mmpretrain's networks of any depth."""

    depth: AnyDepth = Field(description="Number of layers.")


class V1cKeys(PlainKeys):
    """ResNetV1c (He et al., arXiv:1812.01187): a deep stem."""

    TYPE: ClassVar[str] = "mmpretrain.ResNetV1c"

    deep_stem: Literal[True] = True
    avg_down: Literal[False] = False


class V1dKeys(PlainKeys):
    """ResNetV1d (He et al., arXiv:1812.01187): a deep stem, and shortcuts that pool instead of striding."""

    TYPE: ClassVar[str] = "mmpretrain.ResNetV1d"

    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True


class CifarKeys(PlainKeys):
    """ResNet for small images: a 3x3 convolution of stride 1 as its stem, no max-pool; levels from stride 1."""

    TYPE: ClassVar[str] = "mmpretrain.ResNet_CIFAR"
    FINEST_LEVEL: ClassVar[int] = 1
    PLAIN_STEM: ClassVar[StemKind] = "cifar"

    deep_stem: Literal[False] = False


# --- groups ---------------------------------------------------------------------------------------


class GroupKeys(DepthConfig):
    """Bottlenecks with a grouped 3x3, whose width follows from groups (Xie et al., arXiv:1611.05431)."""

    groups: Groups = Field(32, description="Groups of a bottleneck's 3x3; 1 makes it a ResNet.")

    def conv_groups(self) -> int:
        """Groups of a bottleneck's 3x3."""
        return self.groups

    def inner_width(self, width: int) -> int:
        """Channels of a bottleneck's 3x3 in a stage of `width` channels before expansion."""
        return width if self.groups == 1 else self.grouped_width(width)

    def grouped_width(self, width: int) -> int:
        """`inner_width` of more than one group."""
        raise NotImplementedError


class PretrainGroupKeys(GroupKeys, PretrainKeys):
    """mmpretrain's spelling of groups."""

    width_per_group: Width = Field(4, description="Channels of a group in the first stage.")

    def grouped_width(self, width: int) -> int:
        """`inner_width` of more than one group."""
        return self.groups * self.width_per_group * width // self.base_channels


class DetectionGroupKeys(DetectionKeys, GroupKeys):
    """mmdet's spelling of groups."""

    groups: Groups = Field(1, description="Groups of a bottleneck's 3x3; 1 makes it a ResNet.")
    base_width: Width = Field(4, description="Channels of a group in the first stage.")

    def grouped_width(self, width: int) -> int:
        """`inner_width` of more than one group."""
        return math.floor(width * (self.base_width / self.base_channels)) * self.groups


class ResNeXtKeys(PretrainGroupKeys):
    """`mmpretrain.ResNeXt`."""

    TYPE: ClassVar[str] = "mmpretrain.ResNeXt"

    depth: BottleneckDepth = Field(description="Number of layers.")


# --- squeeze and excitation -----------------------------------------------------------------------


class SEBlock(ResidualBlock):
    """A bottleneck whose channels are weighed before the shortcut is added."""

    def __init__(self, spec: ResNetSpec, place: Place, downsample: nn.Module | None, ratio: int) -> None:
        super().__init__(CONVOLUTIONS[spec.block](spec, place), spec.norm, downsample)
        channels = spec.widths[place.stage]
        hidden = make_divisible(channels // ratio, 8)
        self.se_layer = SqueezeExcite(
            channels, hidden, first=ActivationSpec("relu"), gate=ActivationSpec("sigmoid")
        )

    def residual(self, maps: Tensor) -> Tensor:
        """What is added to the shortcut."""
        weighed: Tensor = self.se_layer(super().residual(maps))
        return weighed


class SEResNet(ResNet):
    """A ResNet or ResNeXt with squeeze-and-excitation."""

    PLAIN_WEIGHTS: ClassVar[tuple[type[nn.Module], ...]] = (SqueezeExcite,)

    def __init__(self, spec: ResNetSpec, ratio: int) -> None:
        self.ratio = ratio
        super().__init__(spec)

    def block(self, place: Place, downsample: nn.Module | None) -> nn.Module:
        """One residual block."""
        return SEBlock(self.spec, place, downsample, self.ratio)


class SEKeys(PretrainKeys):
    """`mmpretrain.SEResNet`."""

    TYPE: ClassVar[str] = "mmpretrain.SEResNet"

    depth: BottleneckDepth = Field(description="Number of layers.")
    se_ratio: Annotated[int, Field(strict=True, ge=1, le=1024)] = Field(
        16, description="Channels of a block over the squeezed ones."
    )

    def network(self) -> ResNet:
        """The network of these keys, without its weights."""
        return SEResNet(self.spec(), self.ratio())

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling."""
        return {**super().architecture(), "se_ratio": self.ratio()}

    def ratio(self) -> int:
        """Channels of a block over the squeezed ones."""
        return self.se_ratio


class SEResNeXtKeys(SEKeys, PretrainGroupKeys):
    """`mmpretrain.SEResNeXt`, which takes an `se_ratio` and does not follow it: its ratio is always 16."""

    TYPE: ClassVar[str] = "mmpretrain.SEResNeXt"

    def ratio(self) -> int:
        """Channels of a block over the squeezed ones."""
        return 16


# --- mmdet ----------------------------------------------------------------------------------------


class DetectionResNetKeys(DetectionKeys, DepthConfig):
    """`mmdet.ResNet`."""

    TYPE: ClassVar[str] = "mmdet.ResNet"
    HAS_DEFORMABLE: ClassVar[bool] = True
    HAS_PLUGINS: ClassVar[bool] = True
    FALLS_BACK: ClassVar[bool] = True

    depth: AnyDepth = Field(description="Number of layers.")


class DetectionV1dKeys(DetectionResNetKeys):
    """`mmdet.ResNetV1d`."""

    TYPE: ClassVar[str] = "mmdet.ResNetV1d"

    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True


class DetectionResNeXtKeys(DetectionGroupKeys):
    """`mmdet.ResNeXt`."""

    TYPE: ClassVar[str] = "mmdet.ResNeXt"
    HAS_DEFORMABLE: ClassVar[bool] = True
    HAS_PLUGINS: ClassVar[bool] = True

    depth: BottleneckDepth = Field(description="Number of layers.")


# --- mmselfsup ------------------------------------------------------------------------------------


class SelfSupervisedKeys(PretrainKeys):
    """mmselfsup's networks: those of mmpretrain, with the stem as level 0."""

    STEM_IS_LEVEL: ClassVar[bool] = True
    FINEST_LEVEL: ClassVar[int] = 2

    out_indices: Indices = Field((4,), description="0 is the stem before its max-pool, 1 to 4 the stages.")
    zero_init_residual: bool = Field(False, description="Start of training; changes nothing here.")


class SelfSupervisedResNetKeys(SelfSupervisedKeys):
    """`mmselfsup.ResNet`."""

    TYPE: ClassVar[str] = "mmselfsup.ResNet"

    depth: AnyDepth = Field(description="Number of layers.")


class SelfSupervisedV1dKeys(SelfSupervisedResNetKeys):
    """`mmselfsup.ResNetV1d`."""

    TYPE: ClassVar[str] = "mmselfsup.ResNetV1d"

    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True


class SelfSupervisedResNeXtKeys(SelfSupervisedKeys, PretrainGroupKeys):
    """`mmselfsup.ResNeXt`."""

    TYPE: ClassVar[str] = "mmselfsup.ResNeXt"

    depth: BottleneckDepth = Field(description="Number of layers.")


class Sobel(nn.Module):
    """Edges of the grey image: two maps, by filters that training leaves alone; keys `sobel.{0,1}`."""

    FILTERS = ((1, 0, -1), (2, 0, -2), (1, 0, -1)), ((1, 2, 1), (0, 0, 0), (-1, -2, -1))

    def __init__(self) -> None:
        super().__init__()
        self.sobel = nn.Sequential(conv1x1(3, 1, bias=True), conv3x3(1, 2, bias=True))

    def initialise(self) -> None:
        """Set the filters."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 0 if name.endswith("bias") else 1 / 3)
        with torch.no_grad():
            dict(self.sobel.named_parameters())["1.weight"].copy_(torch.tensor(self.FILTERS).unsqueeze(1))

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] to [n, 2, h, w]."""
        edges: Tensor = self.sobel(images)
        return edges


class SobelResNet(ResNet):
    """A ResNet over the edges of its images (Caron et al., arXiv:1807.05520)."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__(spec)
        self.sobel_layer = Sobel()

    def initialise(self) -> None:
        """As a ResNet, with the filters set."""
        super().initialise()
        self.sobel_layer.initialise()

    def stem_maps(self, images: Tensor) -> Tensor:
        """What the stem gives, before its max-pool."""
        return super().stem_maps(self.sobel_layer(images))


class SobelKeys(SelfSupervisedResNetKeys):
    """`mmselfsup.ResNetSobel`, whose images have three channels and whose stem has two."""

    TYPE: ClassVar[str] = "mmselfsup.ResNetSobel"

    in_channels: Literal[3] = 3

    def spec(self) -> ResNetSpec:
        """The neutral spelling."""
        return replace(super().spec(), in_channels=2)

    def network(self) -> ResNet:
        """The network of these keys, without its weights."""
        return SobelResNet(self.spec())

    def freeze(self) -> Freeze:
        """As a ResNet's, and the filters."""
        return replace(super().freeze(), constant=("sobel_layer",))


_TIMM_STEM = {
    "stem.2.bn.{leaf}": "bn1.{leaf}",
    **{f"stem.{i}.conv.{{leaf}}": f"conv1.{3 * i}.{{leaf}}" for i in range(3)},
    **{f"stem.{i}.bn.{{leaf}}": f"conv1.{3 * i + 1}.{{leaf}}" for i in range(2)},
}
_MMDET_STEM = {
    **{f"stem.{i}.conv.{{leaf}}": f"stem.{3 * i}.{{leaf}}" for i in range(3)},
    **{f"stem.{i}.bn.{{leaf}}": f"stem.{3 * i + 1}.{{leaf}}" for i in range(3)},
}
# timm and mmdet have something at 0 before the first stage's shortcut too, where nothing is pooled.
_POOLED_SHORTCUT = {"layer1.0.downsample.{i}.{leaf}": "layer1.0.downsample.{i+1}.{leaf}"}
_BLOCKS = {
    f"layer{{s}}.{{b}}.{part}.{{leaf}}": f"layer{{s}}.{{b}}.{part}.{{leaf}}"
    for part in ("conv{k}", "bn{k}", "downsample.{i}")
}
_SPLIT_BLOCKS = {**_BLOCKS, "layer{s}.{b}.conv2.{rest}": "layer{s}.{b}.conv2.{rest}"}
V1C_NAMES = Naming(
    "ResNetV1c",
    own=("mmpretrain",),
    marks=(
        "stem.0.conv.weight",
        "layer1.0.conv1.weight",
        "layer1.0.conv2.weight",
        "layer2.0.downsample.0.weight",
    ),
    layouts=(KeyLayout("timm", rules({**_TIMM_STEM, **_BLOCKS})),),
)
V1D_NAMES = Naming(
    "ResNetV1d",
    own=("mmpretrain",),
    marks=(
        "stem.0.conv.weight",
        "layer1.0.conv1.weight",
        "layer1.0.conv2.weight",
        "layer2.0.downsample.2.weight",
    ),
    layouts=(
        KeyLayout("timm", rules({**_TIMM_STEM, **_POOLED_SHORTCUT, **_BLOCKS})),
        KeyLayout("mmdet", rules({**_MMDET_STEM, **_POOLED_SHORTCUT, **_BLOCKS})),
    ),
)
RESNEST_NAMES = Naming(
    "ResNeSt",
    own=("mmpretrain",),
    marks=("stem.0.conv.weight", "layer1.0.conv2.conv.weight"),
    layouts=(
        KeyLayout("timm", rules({**_TIMM_STEM, **_POOLED_SHORTCUT, **_SPLIT_BLOCKS})),
        KeyLayout("mmdet", rules({**_MMDET_STEM, **_POOLED_SHORTCUT, **_SPLIT_BLOCKS})),
    ),
)
SE_RESNET_NAMES = Naming(
    "SEResNet",
    own=("mmpretrain",),
    marks=(
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.0.se_layer.conv1.conv.weight",
        "layer4.0.se_layer.conv2.conv.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "layer{s}.{b}.se_layer.conv{k}.conv.{leaf}": "layer{s}.{b}.se.fc{k}.{leaf}",
                    "{rest}": "{rest}",
                }
            ),
        ),
    ),
)


RESNET_V1C = family(V1cKeys, naming=V1C_NAMES)
RESNET_V1D = family(V1dKeys, naming=V1D_NAMES)
RESNET_CIFAR = family(CifarKeys)
RESNEXT = family(ResNeXtKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS)
SE_RESNET = family(SEKeys, naming=SE_RESNET_NAMES, choices=BOTTLENECK_DEPTHS)
SE_RESNEXT = family(SEResNeXtKeys, naming=SE_RESNET_NAMES, choices=BOTTLENECK_DEPTHS)
MMDET_RESNET = family(DetectionResNetKeys, naming=RESNET_NAMES)
MMDET_RESNET_V1D = family(DetectionV1dKeys, naming=V1D_NAMES, library="mmdet")
MMDET_RESNEXT = family(DetectionResNeXtKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS)
MMSELFSUP_RESNET = family(SelfSupervisedResNetKeys, naming=RESNET_NAMES, indices=(1, 2, 3, 4))
MMSELFSUP_RESNET_V1D = family(SelfSupervisedV1dKeys, naming=V1D_NAMES, indices=(1, 2, 3, 4))
MMSELFSUP_RESNEXT = family(
    SelfSupervisedResNeXtKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS, indices=(1, 2, 3, 4)
)
MMSELFSUP_RESNET_SOBEL = family(SobelKeys, indices=(1, 2, 3, 4))
