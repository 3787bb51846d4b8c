"""detrex's two wrappers of torchvision: `TorchvisionBackbone`, by graph nodes, and `TorchvisionResNet`, DETR's own.

The first is the same model as `torchvision.<model>` and shares it. The second makes constants of all batch norms
and ends behind the deepest layer asked for; its keys begin with `body.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones import building, torchvision
from service.backbones.base import Backbone, BackboneConfig, Family, levels_by_stride
from service.backbones.detectron2_resnet import FrozenBatchNorm2d, initialise
from service.backbones.freezing import norm_names
from service.backbones.tables import TorchvisionEntry, nearest, torchvision_models
from service.backbones.torchvision import NodeMap, NodeName, TorchvisionConfig
from service.checkpoints.load import load_strict
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    WeightsRef,
)
from service.errors import UnknownBackbone

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# --- detrex.TorchvisionBackbone -------------------------------------------------------------------

MODEL, EXTRACTOR = "model.", "feature_extractor."
RESNET_NODES = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}


class TorchvisionBackboneConfig(TorchvisionConfig):
    """`detrex.TorchvisionBackbone`: a torchvision model by name, with the levels of a ResNet by default."""

    model_name: Annotated[str, Field(min_length=1, max_length=128)] = "resnet50"
    return_nodes: NodeMap | None = Field(
        RESNET_NODES, description="Nodes to return, and what to call their levels."
    )
    suppress_diff_warnings: StrictBool = Field(False, description="No effect.")

    def entry(self) -> TorchvisionEntry:
        """What the table knows of the model.

        Raises:
            UnknownBackbone: torchvision has no such model.
        """
        entry = torchvision_models().get(self.model_name)
        if entry is None:
            names = nearest(self.model_name, torchvision_models())
            raise UnknownBackbone(
                "torchvision model", self.model_name, names, pointer="#/backbone/model_name"
            )
        return entry


def _load_backbone(
    config: TorchvisionBackboneConfig, state: StateDict, ref: WeightsRef
) -> tuple[Backbone, LoadedKeys]:
    """As `torchvision.<model>` loads; detrex's own files have the weights twice, and count twice."""
    twice = {
        name
        for name in state
        if (place := name.find(EXTRACTOR)) >= 0
        and f"{name[:place]}{MODEL}{name[place + len(EXTRACTOR) :]}" in state
    }
    once = {name: tensor for name, tensor in state.items() if name not in twice}
    backbone, keys = torchvision.load(config, once, ref)
    return backbone, replace(keys, loaded=keys.loaded + len(twice))


def _backbone_example(type_name: str) -> Mapping[str, Any]:
    nodes = {"layer2": "res3", "layer3": "res4", "layer4": "res5"}
    return {"type": type_name, "model_name": "resnet50", "pretrained": False, "return_nodes": nodes}


def _every_model(type_name: str) -> Sequence[str]:  # noqa: ARG001 - there is one type
    return list(torchvision_models())


TORCHVISION_BACKBONE = Family(
    config=TorchvisionBackboneConfig,
    describe=torchvision.describe,
    build=torchvision.build,
    load=_load_backbone,
    example=_backbone_example,
    architectures=_every_model,
)

# --- detrex.TorchvisionResNet ---------------------------------------------------------------------

ResNetName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
BASIC_RESNETS = ("resnet18", "resnet34")
# Modules in order; the strides are those of their outputs, without dilation.
LAYERS = {
    "conv1": 2,
    "bn1": 2,
    "relu": 2,
    "maxpool": 4,
    "layer1": 4,
    "layer2": 8,
    "layer3": 16,
    "layer4": 32,
}
TRAINED = ("layer2", "layer3", "layer4")
LayerName = Literal["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]


class TorchvisionResNetConfig(BackboneConfig):
    """`detrex.TorchvisionResNet`."""

    name: ResNetName
    train_backbone: StrictBool = Field(
        description="True freezes the stem and layer1, false everything; batch norms are constants in both."
    )
    return_layers: Annotated[dict[LayerName, NodeName], Field(min_length=1, max_length=8)] = Field(
        {"layer4": "res5"}, description="Layers to return, and what to call their levels."
    )
    dilation: StrictBool = Field(
        False, description="Dilates layer4 instead of striding; its first block keeps a dilation of 1."
    )

    TYPE: ClassVar[str] = "detrex.TorchvisionResNet"

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.dilation and self.name in BASIC_RESNETS:
            yield "dilation", f"{self.name} has basic blocks, which torchvision does not dilate"
        if len(set(self.return_layers.values())) != len(self.return_layers):
            yield "return_layers", "two levels have the same name"

    def built_layers(self) -> tuple[str, ...]:
        """The modules up to the deepest that is asked for."""
        names = list(LAYERS)
        asked = names if self.strides is not None else self.return_layers
        return tuple(names[: max(names.index(name) for name in asked) + 1])

    def architecture(self) -> dict[str, Any]:
        """The network, up to its last layer."""
        dilated = self.dilation and "layer4" in self.built_layers()
        return {"type": self.TYPE, "name": self.name, "dilation": dilated, "layers": self.built_layers()}

    def freeze(self) -> Freeze:
        """`train_backbone`, in torchvision's stages: the stem and `layer1`, or all four."""
        return Freeze(1 if self.train_backbone else len(TRAINED) + 1, norm_eval=True)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named as the config does, else after their layers."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        names = {str(node): name for node, name in self.return_layers.items()}
        return tuple(Level(level.index, names.get(level.node, level.node), level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The layers of `return_layers` in the order given."""
        known = {feature.node: feature.index for feature in description.features}
        return tuple(Level(known[node], name, node) for node, name in self.return_layers.items())


class TorchvisionResNet(Backbone):
    """torchvision's ResNet with constant batch norms, up to a layer; keys `body.conv1.weight`, …"""

    def __init__(self, config: TorchvisionResNetConfig) -> None:
        super().__init__()
        from torchvision.models import get_model

        dilations = [False, False, config.dilation]
        norm: Any = FrozenBatchNorm2d
        net = get_model(config.name, weights=None, norm_layer=norm, replace_stride_with_dilation=dilations)
        layers = config.built_layers()
        self.body = nn.ModuleDict({name: net.get_submodule(name) for name in layers})
        self.features = tuple(
            FeatureInfo(index, name, _channels(net, name), _stride(name, dilated=config.dilation), "NCHW")
            for index, name in enumerate(layers)
        )

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of the modules in `nodes`; stops after the deepest of them."""
        wanted, found, maps = set(nodes), {}, images
        for name, module in self.body.items():
            maps = module(maps)
            if name in wanted:
                # The rectifier behind it works in place, there as here.
                found[name] = maps
            if wanted <= found.keys():
                break
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """All norms, and all that is before the stages that are trained."""
        names = [name for name, _ in self.named_parameters()]
        trained = () if (freeze.stages or 0) > len(TRAINED) else TRAINED
        return FreezeReport(
            stages=freeze.stages,
            parameters=tuple(name for name in names if not any(layer in name for layer in trained)),
            norms=tuple(norm_names(self, (FrozenBatchNorm2d,))),
            of=len(names),
        )


def _stride(name: str, *, dilated: bool) -> int:
    return 16 if name == "layer4" and dilated else LAYERS[name]


def _channels(net: nn.Module, name: str) -> int:
    if not name.startswith("layer"):
        return 64
    last = list(net.get_submodule(name).modules())
    widths = [module.running_var.shape[0] for module in last if isinstance(module, FrozenBatchNorm2d)]
    return max(widths)


def _describe(config: TorchvisionResNetConfig) -> Description:
    return building.describe(lambda: TorchvisionResNet(config), in_channels=3)


def _build(config: TorchvisionResNetConfig) -> TorchvisionResNet:
    network = building.unset(lambda: TorchvisionResNet(config))
    initialise(network)
    return network


def _load(
    config: TorchvisionResNetConfig, state: StateDict, ref: WeightsRef
) -> tuple[TorchvisionResNet, LoadedKeys]:
    network = building.unset(lambda: TorchvisionResNet(config))
    return network, load_strict(network, state, ref)


def _example(type_name: str) -> Mapping[str, Any]:
    return {
        "type": type_name,
        "name": "resnet50",
        "train_backbone": True,
        "dilation": True,
        "return_layers": {"layer4": "res5"},
    }


def _names(type_name: str) -> Sequence[str]:  # noqa: ARG001 - there is one type
    return list(ResNetName.__args__)  # type: ignore[attr-defined]  # of a Literal


TORCHVISION_RESNET = Family(
    config=TorchvisionResNetConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=_example,
    architectures=_names,
)
