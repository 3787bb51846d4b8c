"""detrex's `TimmBackbone`: a timm model with features named `p` and their index, and norms that may be frozen.

Unlike timm's own types it has only the features asked for, so that every key and every count is the library's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool
from torch import Tensor

from service.backbones import building
from service.backbones.base import Backbone, Family, levels_by_stride
from service.backbones.freezing import FROZEN_BATCH_NORM, norm_names
from service.backbones.lazyconfig import short_class
from service.backbones.norms import BATCH_NORMS
from service.backbones.tables import timm_models
from service.backbones.timm import IndexList, LastN, NormName, TimmBackboneConfig
from service.backbones.timm_creation import Capture
from service.backbones.timm_loading import load_checkpoint
from service.backbones.timm_network import TimmBackbone, assemble, measured_features
from service.config.spec import (
    Description,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

WRAPPER = "timm_model."


def _norm_layer(value: Any) -> Any:
    return FROZEN_BATCH_NORM if short_class(value) == "FrozenBN" else value


class DetrexTimmConfig(TimmBackboneConfig):
    """`detrex.TimmBackbone`."""

    features_only: StrictBool = True
    out_indices: LastN | IndexList | None = Field(
        (0, 1, 2, 3),
        description="Features to return, in this order, named p0, p1, …; negative ones count from the end.",
    )
    norm_layer: Annotated[NormName | None, BeforeValidator(_norm_layer)] = Field(
        None, description="FrozenBatchNorm2d (or FrozenBN) makes constants of all batch norms."
    )

    def architecture(self) -> dict[str, Any]:
        """timm's, and what detrex makes of it."""
        return {
            "type": "detrex.TimmBackbone",
            "timm": super().architecture(),
            "indices": self.built_indices(),
            "frozen_norms": self.has_frozen_norms(),
        }

    def has_frozen_norms(self) -> bool:
        """Whether the batch norms are constants."""
        return self.norm_layer == FROZEN_BATCH_NORM

    def known_indices(self) -> tuple[int, ...]:
        """The indices of all features of the timm model."""
        return tuple(feature.index for feature in self.entry().features)

    def built_indices(self) -> tuple[int, ...] | None:
        """The indices of the features that are built: those asked for; all where stages or strides are counted."""
        if not self.features_only:
            return None
        if (self.strides, self.frozen_stages, self.freeze_to_index) != (None, None, None):
            return self.known_indices()
        return tuple(sorted({index for _, index in self._asked()}))

    def _asked(self) -> list[tuple[int, int]]:
        """Each index as written, and from the start.

        Raises:
            InvalidConfig: the model has no such feature, or one is asked for twice.
        """
        known, pointer = self.known_indices(), "#/backbone/out_indices"
        if self.out_indices is None or isinstance(self.out_indices, int):
            last = self.out_indices or len(known)
            if last > len(known):
                raise InvalidConfig(pointer, f"{last} of {len(known)} features asked for")
            return [(index, index) for index in known[-last:]]
        count, found = max(known) + 1, []
        for position, index in enumerate(self.out_indices):
            positive = index if index >= 0 else index + count
            if positive not in known:
                raise InvalidConfig(f"{pointer}/{position}", f"{index} is not an index of 0 to {count - 1}")
            found.append((index, positive))
        if len({positive for _, positive in found}) != len(found):
            raise InvalidConfig(pointer, f"an index is asked for twice: {list(self.out_indices)}")
        return found

    def freeze(self) -> Freeze:
        """As timm's types; norms that are constants count as ones in eval mode."""
        freeze = super().freeze()
        return Freeze(freeze.stages, freeze.to_index, norm_eval=self.has_frozen_norms())

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named `p1` and so on."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        return tuple(Level(level.index, f"p{level.index}", level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The features of `out_indices`, named by their index as it was written."""
        if not self.features_only:
            return super().selected(description)
        return tuple(Level(index, f"p{written}", str(index)) for written, index in self._asked())


class DetrexTimm(Backbone):
    """timm's network, with detrex' names and its rule for frozen norms."""

    def __init__(self, timm_model: TimmBackbone, *, frozen_norms: bool) -> None:
        super().__init__()
        self.timm_model = timm_model
        self.frozen_norms = frozen_norms
        self.features = timm_model.features

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Features by timm's indices as text."""
        found: dict[str, Tensor] = self.timm_model(images, nodes)
        return found

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """As timm's types freeze; the weights of frozen norms are constants, and no parameters."""
        net = self.timm_model.net
        report = self.timm_model.frozen(Freeze(freeze.stages, freeze.to_index))
        norms = norm_names(net, BATCH_NORMS) if self.frozen_norms else []
        full = self.timm_model.names
        behind = set(report.parameters)
        left = [name for name, _ in net.named_parameters() if name.rpartition(".")[0] not in set(norms)]
        return FreezeReport(
            stages=freeze.stages,
            parameters=tuple(WRAPPER + name for name in left if full[name] in behind),
            norms=tuple(WRAPPER + name for name in norms) or tuple(WRAPPER + name for name in report.norms),
            of=len(left),
        )

    def needs(self, node: str) -> frozenset[str]:
        """Names of the weights that a feature depends on, as timm has them."""
        return self.timm_model.needs(node)


def _build(config: DetrexTimmConfig) -> DetrexTimm:
    indices = config.built_indices()
    found = building.initialised(lambda: assemble(config.built(), Capture(), indices))
    return DetrexTimm(found, frozen_norms=config.has_frozen_norms())


def _load(config: DetrexTimmConfig, state: StateDict, ref: WeightsRef) -> tuple[DetrexTimm, LoadedKeys]:
    def nodes() -> list[str]:
        return [level.node for level in config.levels(_describe(config))]

    found, keys = load_checkpoint(config.built(), config.built_indices(), state, ref, nodes=nodes)
    return DetrexTimm(found, frozen_norms=config.has_frozen_norms()), keys


def _describe(config: DetrexTimmConfig) -> Description:
    network = building.on_meta(lambda: _build(config))
    return building.description(
        network,
        measured_features(network.timm_model),
        in_channels=config.channels(),
        input_defaults=PreprocessDefaults(size=config.built().size),
        fixed_input=config.takes_one_size(),
        prefix_tokens=network.timm_model.prefix_tokens,
    )


def _example(type_name: str) -> Mapping[str, Any]:
    return {
        "type": type_name,
        "model_name": "resnet152d",
        "features_only": True,
        "pretrained": False,
        "in_channels": 3,
        "out_indices": [1, 2, 3, 4],
        "norm_layer": "FrozenBatchNorm2d",
    }


def _served(type_name: str) -> Sequence[str]:  # noqa: ARG001 - there is one type
    return [name for name, entry in timm_models().items() if entry.unsupported is None]


DETREX_TIMM = Family(
    config=DetrexTimmConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=_example,
    architectures=_served,
)
