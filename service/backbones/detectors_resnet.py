"""Residual networks of DetectoRS (Qiao et al., arXiv:2006.02334) and TridentNet (Li et al., arXiv:1901.01892)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Family, Indices
from service.backbones.openmmlab_detection import DetectionKeys, Options
from service.backbones.resnet import (
    BOTTLENECK_DEPTHS,
    RESNET_NAMES,
    DepthConfig,
    Dilation,
    Place,
    ResNet,
    ResNetSpec,
    conv1x1,
    downsample_of,
    family,
)
from service.backbones.resnet_variants import DetectionGroupKeys
from service.backbones.standardised import like
from service.checkpoints.load import load_strict
from service.config.spec import Description, FeatureInfo, Level, LoadedKeys, WeightsRef

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

IMAGE = "img"
VARIANCE_EPS = 1e-5

# --- DetectoRS ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectoRSSpec(ResNetSpec):
    """What decides the numbers and the names of the weights.

    `standardised` is of the weights of every convolution. `feedback` are the channels of the maps that a recursive
    feature pyramid would send back, 0 for none. `gives_image`: the images are a level too.
    """

    standardised: bool = False
    feedback: int = 0
    gives_image: bool = False

    def features(self) -> tuple[FeatureInfo, ...]:
        """One feature a stage, and the images before them."""
        image = FeatureInfo(-1, IMAGE, self.in_channels, 1, "NCHW")
        return ((image,) if self.gives_image else ()) + super().features()


class StandardisedConv2d(nn.Conv2d):
    """A convolution of standardised weights (Qiao et al., arXiv:1903.10520) scaled by `weight_gamma`, `weight_beta`."""

    weight_gamma: Tensor
    weight_beta: Tensor

    @classmethod
    def like(cls, plain: nn.Conv2d) -> StandardisedConv2d:
        """A standardised convolution of the sizes of a plain one without a bias."""
        made = like(cls, plain)
        for name in ("weight_gamma", "weight_beta"):
            made.register_buffer(name, torch.empty(plain.out_channels, 1, 1, 1))
        return made

    def forward(self, input: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        mean, deviation = moments(self.weight)
        weight = self.weight_gamma * ((self.weight - mean) / deviation) + self.weight_beta
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the weights of each output, [outputs, 1, 1, 1]."""
    flat = weight.flatten(1)
    mean, deviation = flat.mean(dim=1), (flat.var(dim=1) + VARIANCE_EPS).sqrt()
    return mean.reshape(-1, 1, 1, 1), deviation.reshape(-1, 1, 1, 1)


class DetectoRSResNet(ResNet):
    """A ResNet whose weights may be standardised; what a recursive pyramid sends back is not served."""

    spec: DetectoRSSpec

    def __init__(self, spec: DetectoRSSpec) -> None:
        super().__init__(spec)
        if spec.standardised:
            _standardise(self)
        if spec.feedback:
            for stage in range(1, len(spec.widths)):
                first = next(self.get_submodule(f"layer{stage + 1}").children())
                first.add_module("rfp_conv", conv1x1(spec.feedback, spec.widths[stage], bias=True))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`, and the images themselves."""
        stages = [node for node in nodes if node != IMAGE]
        found = super().forward(images, stages) if stages else {}
        return {node: images if node == IMAGE else found[node] for node in nodes}

    def initialise(self) -> None:
        """As a ResNet, with standardised weights as they are."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, StandardisedConv2d):
                module.weight_gamma.fill_(1)
                module.weight_beta.zero_()


def _standardise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, StandardisedConv2d.like(child))
        else:
            _standardise(child)


def with_scales(config: DetectoRSKeys, state: StateDict) -> StateDict:
    """`state` with the scales of standardised weights where it has none: those that leave its weights as they are.

    mmcv does the same where the mean of the scales is not above 0.
    """
    if not config.spec().standardised:
        return state
    found = dict(state)
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 4 and ".rfp_conv." not in name and len(weight):
            scales = state.get(f"{name}_gamma")
            if scales is None or not scales.mean() > 0:
                found[f"{name}_beta"], found[f"{name}_gamma"] = moments(weight.float())
    return found


class DetectoRSConvConfig(BaseModel):
    """mmdet's `conv_cfg`: the plain convolution, or one with standardised weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv", "ConvAWS"]


class DetectoRSKeys(DetectionKeys, DepthConfig):
    """What DetectoRS takes besides; its shortcuts have their pool only where they stride."""

    POOL_AT_STRIDE_1: ClassVar[bool] = False

    depth: Literal[50, 101, 152] = Field(description="Number of layers.")
    conv_cfg: DetectoRSConvConfig | None = Field(  # type: ignore[assignment] # it takes one kind more
        None, description="ConvAWS standardises the weights."
    )
    sac: Options | None = Field(None, description="Switchable atrous convolutions, which are not served.")
    stage_with_sac: Annotated[tuple[bool, ...], Field(min_length=1, max_length=4)] = Field(
        (False, False, False, False), description="Stages that `sac` is for: none is served."
    )
    rfp_inplanes: Annotated[int, Field(strict=True, ge=0, le=4096)] | None = Field(
        None,
        description="Channels of the maps of a recursive feature pyramid: their weights are loaded and not used.",
    )
    output_img: bool = Field(
        False, description="Returns the images, as the library sees them, as a first level."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As mmdet's, and what is not served."""
        if self.sac is not None and any(self.stage_with_sac):
            yield "sac", "switchable atrous convolutions are not served"
        yield from super().faults()

    def spec(self) -> DetectoRSSpec:
        """The neutral spelling."""
        return DetectoRSSpec(
            **vars(super().spec()),
            standardised=self.conv_cfg is not None and self.conv_cfg.type == "ConvAWS",
            feedback=self.rfp_inplanes or 0,
            gives_image=self.output_img,
        )

    def network(self) -> DetectoRSResNet:
        """The network of these keys, without its weights."""
        return DetectoRSResNet(self.spec())

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The images where they are asked for, then the levels."""
        stages = tuple(feature for feature in description.features if feature.node != IMAGE)
        image = (Level(-1, IMAGE, IMAGE),) if self.output_img else ()
        return image + super().levels(replace(description, features=stages))


class DetectoRSResNetKeys(DetectoRSKeys):
    """`mmdet.DetectoRS_ResNet`."""

    TYPE: ClassVar[str] = "mmdet.DetectoRS_ResNet"


class DetectoRSResNeXtKeys(DetectoRSKeys, DetectionGroupKeys):
    """`mmdet.DetectoRS_ResNeXt`."""

    TYPE: ClassVar[str] = "mmdet.DetectoRS_ResNeXt"


def _load(config: DetectoRSKeys, state: StateDict, ref: WeightsRef) -> tuple[ResNet, LoadedKeys]:
    network = building.unset(config.network)
    return network, load_strict(network, with_scales(config, state), ref)


# --- TridentNet -----------------------------------------------------------------------------------


class PlainConvConfig(BaseModel):
    """A `conv_cfg` of the plain convolution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv"]


MAX_BRANCHES = 8


class TridentResNet(ResNet):
    """A ResNet of three stages, the last of which has the dilation of one branch: the weights are all branches'."""

    def block(self, place: Place, downsample: nn.Module | None) -> nn.Module:
        """One residual block; the last stage's shortcut never pools."""
        if place.stage == len(self.spec.widths) - 1 and place.first:
            downsample = downsample_of(replace(self.spec, avg_down=False), place)
        return super().block(place, downsample)


class TridentKeys(DetectionKeys, DepthConfig):
    """`mmdet.TridentResNet`, as it is tested: with one of its branches."""

    TYPE: ClassVar[str] = "mmdet.TridentResNet"

    conv_cfg: PlainConvConfig | None = None  # type: ignore[assignment] # the branches take no other
    depth: Literal[50, 101, 152] = Field(description="Number of layers.")
    num_stages: Literal[3] = Field(description="The type has three stages.")
    out_indices: Indices = Field((0, 1, 2), description="Stages, 0 is layer1.")
    num_branch: Annotated[int, Field(strict=True, ge=1, le=MAX_BRANCHES)] = Field(
        description="Branches that the last stage is trained with."
    )
    test_branch_idx: Annotated[int, Field(strict=True, ge=-1, le=MAX_BRANCHES - 1)] = Field(
        description="The branch that is computed; -1, all of them, is not served."
    )
    trident_dilations: Annotated[tuple[Dilation, ...], Field(min_length=1, max_length=MAX_BRANCHES)] = Field(
        description="The dilation of each branch."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As mmdet's, and what the branches ask for."""
        count = len(self.trident_dilations)
        if count != self.num_branch:
            yield "trident_dilations", f"has {count} entries for {self.num_branch} branches"
        if self.test_branch_idx == -1:
            detail = "-1 gives a map a branch, as if of further images; name one branch and ask once for each"
            yield "test_branch_idx", detail
        if self.test_branch_idx >= count:
            yield "test_branch_idx", f"{self.test_branch_idx} is not a branch of 0 to {count - 1}"
        yield from super().faults()

    def spec(self) -> ResNetSpec:
        """The neutral spelling."""
        spec = super().spec()
        branch = self.trident_dilations[self.test_branch_idx]
        return replace(spec, dilations=(*spec.dilations[:-1], branch))

    def network(self) -> TridentResNet:
        """The network of these keys, without its weights."""
        return TridentResNet(self.spec())


DETECTORS_RESNET: Family[DetectoRSResNetKeys] = replace(
    family(DetectoRSResNetKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS), load=_load
)
DETECTORS_RESNEXT: Family[DetectoRSResNeXtKeys] = replace(
    family(DetectoRSResNeXtKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS), load=_load
)
_TRIDENT_EXAMPLE = {
    "depth": 50,
    "num_stages": 3,
    "strides": [1, 2, 2],
    "dilations": [1, 1, 1],
    "num_branch": 3,
    "test_branch_idx": 1,
    "trident_dilations": [1, 2, 3],
    "out_indices": [2],
}
TRIDENT_RESNET: Family[TridentKeys] = replace(
    family(TridentKeys, naming=RESNET_NAMES, choices=BOTTLENECK_DEPTHS),
    example=lambda type_name: {"type": type_name, **_TRIDENT_EXAMPLE},
)
