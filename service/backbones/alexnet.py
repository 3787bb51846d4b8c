"""LeNet-5 (LeCun et al., 1998) and AlexNet (Krizhevsky, arXiv:1404.5997) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import SharedConfig, make_family
from service.checkpoints.layouts import Naming
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, PreprocessDefaults
from service.errors import InvalidConfig


@dataclass(frozen=True)
class ClassicSpec:
    """What decides the numbers and the names of the weights: without `classes` the last map is what comes out."""

    classes: int
    width: int
    stride: int
    in_channels: int

    def features(self) -> tuple[FeatureInfo, ...]:
        """The last map, or a number a class."""
        if self.classes:
            return (FeatureInfo(0, "0", self.classes, None, "NC"),)
        return (FeatureInfo(0, "0", self.width, self.stride, "NCHW"),)


class Classic(Backbone):
    """Convolutions in `features`, linear layers in `classifier` where there are classes. Nothing can be frozen."""

    MAP_SIDE: ClassVar[int]

    def __init__(self, spec: ClassicSpec, layers: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.add_module("features", layers)
        self.classifier = classifier if spec.classes else None

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The map or the classes' numbers.

        Raises:
            InvalidConfig: classes are asked of an image of another size.
        """
        maps: Tensor = self.get_submodule("features")(images)
        if self.classifier is None:
            return dict.fromkeys(nodes, maps)
        if maps.shape[2:] != (self.MAP_SIDE, self.MAP_SIDE):
            detail = f"classes need a map of {self.MAP_SIDE}x{self.MAP_SIDE}; these images give {list(maps.shape[2:])}"
            raise InvalidConfig("#/backbone/num_classes", detail)
        return dict.fromkeys(nodes, self.classifier(maps.flatten(1)))

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has no rule."""
        return freeze_report(self, freeze, ())


class LeNet5(Classic):
    """Three convolutions for grey images of 32 px."""

    MAP_SIDE: ClassVar[int] = 1

    def __init__(self, spec: ClassicSpec) -> None:
        layers = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 120, 5),
            nn.Tanh(),
        )
        super().__init__(
            spec, layers, nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, max(spec.classes, 1)))
        )


class AlexNet(Classic):
    """Five convolutions; images of 224 px where classes are asked for."""

    MAP_SIDE: ClassVar[int] = 6

    def __init__(self, spec: ClassicSpec) -> None:
        layers = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        # Dropout, which is what the library has here, keeps the numbers in the keys.
        classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, max(spec.classes, 1)),
        )
        super().__init__(spec, layers, classifier)


# --- mmpretrain.LeNet5, mmpretrain.AlexNet --------------------------------------------------------


class ClassicConfig(SharedConfig):
    """The key that both have. There is one output: the last map, or a number a class."""

    num_classes: Annotated[int, Field(strict=True, ge=-1, le=100_000)] = Field(
        -1, description="Above 0: a number a class comes out instead of the last map."
    )

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The one output."""
        return tuple(Level(feature.index, "0", feature.node) for feature in description.features)


class LeNet5Config(ClassicConfig):
    """`mmpretrain.LeNet5`, which is also `mmcls.LeNet5`: for images of one channel."""

    NETWORK: ClassVar[str] = "LeNet5"

    def spec(self) -> ClassicSpec:
        """The neutral spelling."""
        return ClassicSpec(max(self.num_classes, 0), width=120, stride=4, in_channels=1)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(32, 32))


class AlexNetConfig(ClassicConfig):
    """`mmpretrain.AlexNet`, which is also `mmcls.AlexNet`."""

    NETWORK: ClassVar[str] = "AlexNet"

    def spec(self) -> ClassicSpec:
        """The neutral spelling."""
        return ClassicSpec(max(self.num_classes, 0), width=256, stride=32, in_channels=3)

    def input_defaults(self) -> PreprocessDefaults:
        """The size of images that the network is made for."""
        return PreprocessDefaults(size=(224, 224))


ALEXNET_NAMES = Naming(
    "AlexNet",
    own=("mmpretrain", "torchvision"),
    marks=(
        "features.0.weight",
        "features.3.weight",
        "features.6.weight",
        "features.8.weight",
        "features.10.weight",
    ),
)


LENET5 = make_family(LeNet5Config, LeNet5, example={"num_classes": -1})
ALEXNET = make_family(AlexNetConfig, AlexNet, naming=ALEXNET_NAMES, example={"num_classes": -1})
