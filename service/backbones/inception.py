"""Inception v3 (Szegedy et al., arXiv:1512.00567): torchvision's layers, whose key names are mmpretrain's too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torchvision.models import Inception3

from service.backbones.base import Backbone
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import SpecConfig, make_family
from service.checkpoints.layouts import Naming
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults

AUXILIARY = "AuxLogits"


@dataclass(frozen=True)
class InceptionSpec:
    """What decides the numbers and the names of the weights; `auxiliary` is a second classifier, for training."""

    classes: int
    auxiliary: bool = False
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """A number a class."""
        return (FeatureInfo(0, "0", self.classes, None, "NC"),)


class InceptionV3(Backbone):
    """Keys `Conv2d_1a_3x3`, …, `Mixed_7c`, `fc`, and `AuxLogits` where there is a second classifier."""

    def __init__(self, spec: InceptionSpec) -> None:
        super().__init__()
        self.features = spec.features()
        layers = Inception3(spec.classes, aux_logits=spec.auxiliary, init_weights=False)
        for name, layer in layers.named_children():
            self.add_module(name, layer)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """[n, 3, h, w] to [n, classes]."""
        features = images
        for name, layer in self.named_children():
            if name != AUXILIARY:
                features = layer(features.flatten(1) if isinstance(layer, nn.Linear) else features)
        return dict.fromkeys(nodes, features)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has no rule."""
        return freeze_report(self, freeze, ())


# --- mmpretrain.InceptionV3 = mmcls.InceptionV3 ---------------------------------------------------


class InceptionV3Config(SpecConfig):
    """`mmpretrain.InceptionV3`, which is also `mmcls.InceptionV3`: with its classifier, for images of 75 px or more."""

    NETWORK: ClassVar[str] = "InceptionV3"

    num_classes: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1000
    aux_logits: bool = Field(
        False, description="Whether the checkpoint has the second classifier, which only training uses."
    )
    dropout: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Training only; changes nothing here."
    )

    def spec(self) -> InceptionSpec:
        """The neutral spelling."""
        return InceptionSpec(self.num_classes, self.aux_logits)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(299, 299))

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The one output."""
        return tuple(Level(feature.index, feature.node, feature.node) for feature in description.features)


# The names are TensorFlow's, which everybody kept.
INCEPTION_V3_NAMES = Naming(
    "InceptionV3",
    own=("mmpretrain", "torchvision", "timm"),
    marks=(
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_6a.branch3x3dbl_1.conv.weight",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
    ),
)


INCEPTION_V3 = make_family(
    InceptionV3Config, InceptionV3, example={"num_classes": 1000}, naming=INCEPTION_V3_NAMES
)
