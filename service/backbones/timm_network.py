"""timm's networks as backbones: assembled, run, frozen, and what their features depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from service.backbones import dependencies
from service.backbones.base import Backbone
from service.backbones.building import SkipInitialisers
from service.backbones.freezing import norm_names
from service.backbones.norms import BATCH_NORMS
from service.backbones.shapes import shapes_only
from service.backbones.tables import timm_models
from service.backbones.timm_creation import CONSTRUCTOR_ERRORS, Architecture, Capture, create, refusal
from service.backbones.timm_forward import collect, unpooled
from service.config.spec import FeatureInfo, Freeze, FreezeReport
from service.errors import InvalidConfig

# Networks that list positions in Python when they are built or run: their time grows steeply with the side.
SLOW_WITH_SIZE = frozenset({"efficientvit_msra", "maxxvit", "sequencer", "tiny_vit"})
MAX_SLOW_SIDE = 512
STEM_NAMES = ("patch_embed.", "patch_embeds.0.", "stem.")


@lru_cache(maxsize=256)
def feature_indices(architecture: Architecture) -> tuple[int, ...]:
    """The indices of all features that `features_only` can give; known only once something is built."""
    last = {"features_only": True, "out_indices": (-1,)}
    with torch.device("meta"), SkipInitialisers():
        info: Any = create(architecture, Capture(), last).feature_info
    # A feature without a module is numbered but cannot be had (the stem of TResNet).
    return tuple(index for index in range(len(info)) if info[index]["module"])


def assemble(
    architecture: Architecture, capture: Capture, indices: tuple[int, ...] | None = None
) -> TimmBackbone:
    """The backbone on the current default device, with every feature."""
    _refuse_slow(architecture)
    if not architecture.features_only:
        return _assemble_whole(architecture, capture)
    indices = indices or feature_indices(architecture)
    net = create(architecture, capture, {"features_only": True, "out_indices": indices})
    return TimmBackbone(net, architecture, _features(net, indices), capture)


def _features(net: nn.Module, indices: Sequence[int]) -> tuple[FeatureInfo, ...]:
    info: Any = net.feature_info
    return tuple(
        FeatureInfo(index, str(index), int(info[index]["num_chs"]), int(info[index]["reduction"]), "NCHW")
        for index in indices
    )


def _assemble_whole(architecture: Architecture, capture: Capture) -> TimmBackbone:
    """The whole model without classifier and pooling, as OpenMMLab's wrapper resets it."""
    feature = _whole_feature(architecture)
    net = _without_head(architecture, capture)
    return TimmBackbone(net, architecture, (feature,), capture)


def _without_head(architecture: Architecture, capture: Capture) -> nn.Module:
    net: Any = create(architecture, capture, {})
    try:
        net.reset_classifier(0, "")
    except CONSTRUCTOR_ERRORS as error:
        detail = f"{architecture.entry_name} cannot be left unpooled; set it to true"
        raise InvalidConfig("#/backbone/features_only", detail) from error
    return cast("nn.Module", net)


def _refuse_slow(architecture: Architecture) -> None:
    if "img_size" not in dict(architecture.arguments) or max(architecture.size) <= MAX_SLOW_SIDE:
        return
    if timm_models()[architecture.entry_name].module in SLOW_WITH_SIZE:
        detail = f"{max(architecture.size)} exceeds {MAX_SLOW_SIDE} pixels for {architecture.entry_name}"
        raise InvalidConfig("#/backbone/img_size", detail)


@lru_cache(maxsize=256)
def _whole_feature(architecture: Architecture) -> FeatureInfo:
    """The one feature of a model that is not wrapped, from a forward pass on the meta device."""
    try:
        with shapes_only(), SkipInitialisers():
            net = _without_head(architecture, Capture())
            output = unpooled(net, torch.empty(1, architecture.in_channels, *architecture.size))
    except CONSTRUCTOR_ERRORS as error:
        detail = f"{architecture.entry_name} cannot be run unpooled; set it to true"
        raise InvalidConfig("#/backbone/features_only", detail) from error
    if output.ndim == 4:
        stride = round(architecture.size[0] / output.shape[2])
        return FeatureInfo(0, "0", output.shape[1], stride, "NCHW")
    return FeatureInfo(0, "0", output.shape[-1], None, "NLC" if output.ndim == 3 else "NC")


def measured_features(backbone: TimmBackbone) -> tuple[FeatureInfo, ...]:
    """The features with their shapes at the native size, from a pass on the meta device.

    Raises:
        InvalidConfig: what timm built from the config's arguments does not run.
    """
    architecture = backbone.architecture
    nodes = [feature.node for feature in backbone.features]
    try:
        with shapes_only():
            outputs = backbone(torch.empty(1, architecture.in_channels, *architecture.size), nodes)
    except CONSTRUCTOR_ERRORS as error:
        if not architecture.arguments:
            raise
        raise refusal(architecture, error) from error
    shapes = (tuple(outputs[feature.node].shape[1:]) for feature in backbone.features)
    return tuple(
        replace(feature, shape=shape) for feature, shape in zip(backbone.features, shapes, strict=True)
    )


# --- the module -----------------------------------------------------------------------------------


class TimmBackbone(Backbone):
    """A timm model that gives features by timm's indices; nodes are the indices as text.

    Attributes:
        net: timm's module.
        architecture: what it was built from.
        names: entry of the module's state → its name in timm's own checkpoints.
        first_stage: where the module of the first feature is, None if timm does not say.
        prefix_tokens: tokens before those of the patches. Only whole models give tokens, and only they say.
    """

    def __init__(
        self, net: nn.Module, architecture: Architecture, features: tuple[FeatureInfo, ...], capture: Capture
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.features = features
        full = {id(tensor): name for name, tensor in capture.tensors.items()}
        state = net.state_dict(keep_vars=True)
        self.names = {name: full.get(id(tensor), name) for name, tensor in state.items()}
        self.first_stage = _path_of(capture.first_stage, self)
        self.prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Compute features.

        Args:
            images: [n, c, h, w], float, already normalised.
            nodes: indices of features as text.

        Returns:
            maps as [n, c, h, w]; without `features_only` whatever the model gives unpooled, channels first.
        """
        if not self.architecture.features_only:
            return {node: unpooled(self.net, images) for node in nodes}
        wanted = sorted({int(node) for node in nodes})
        maps = collect(self.net, images, wanted)
        return {node: maps[int(node)] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Freeze all that a feature depends on, and the batch norms among it.

        Stages count as in mmdetection: 0 is the stem, k is the stem and k stages.

        Raises:
            InvalidConfig: no such stage or index.
        """
        parameters = self._frozen_parameters(freeze)
        norms = dependencies.batch_norms_of(parameters, self.net)
        if freeze.all_norms or freeze.norm_eval:
            norms = tuple(norm_names(self.net, BATCH_NORMS))
        everything = [name for name, _ in self.net.named_parameters(remove_duplicate=False)]
        if freeze.all_norms:
            of_norms = {name for name in everything if name.rpartition(".")[0] in norms}
            parameters |= of_norms
        return FreezeReport(
            stages=freeze.stages,
            parameters=tuple(self.names[name] for name in everything if name in parameters),
            norms=tuple(self._full_path(path) for path in norms),
            of=len(everything),
        )

    def checkpoint_entries(self) -> Mapping[str, Tensor]:
        """The weights by the names of the whole timm model."""
        return {self.names[name]: entry for name, entry in self.net.state_dict().items()}

    def needs(self, node: str) -> frozenset[str]:
        """The entries of a checkpoint that a feature cannot do without, by their names in timm's checkpoints."""
        entries = self._dependencies().entries[int(node)]
        return frozenset(self.names[name] for name in entries if name in self.names)

    def _frozen_parameters(self, freeze: Freeze) -> frozenset[str]:
        index = self._index_to_freeze(freeze)
        if index is None:
            return frozenset()
        behind = self._dependencies()
        if index >= 0:
            # A later map need not depend on all that an earlier one does (HRNet's branches have their own ends).
            upto = (found for known, found in behind.parameters.items() if known <= index)
            return frozenset[str]().union(*upto)
        if behind.stem is None:
            raise InvalidConfig(
                "#/backbone/frozen_stages", f"{self.architecture.entry_name} has no separate stem"
            )
        return behind.stem

    def _dependencies(self) -> _Dependencies:
        indices = tuple(feature.index for feature in self.features)
        return _dependencies(self.architecture, indices)

    def _index_to_freeze(self, freeze: Freeze) -> int | None:
        """The deepest feature to freeze; -1 is the stem of a network whose first feature is a stage."""
        indices = [feature.index for feature in self.features]
        if freeze.to_index is not None:
            if freeze.to_index not in indices:
                detail = f"{freeze.to_index} is not an index of {indices[0]} to {indices[-1]}"
                raise InvalidConfig("#/backbone/freeze_to_index", detail)
            return freeze.to_index
        if freeze.stages is None or freeze.stages < 0:
            return None
        # Where the first map is reduced by 2 or not at all it is the stem; by 4 or more it is the first stage.
        by_stage = indices if (self.features[0].stride or 4) < 4 else [-1, *indices]
        if freeze.stages >= len(by_stage):
            detail = f"{freeze.stages} is not a stage of -1 to {len(by_stage) - 1}"
            raise InvalidConfig("#/backbone/frozen_stages", detail)
        return by_stage[freeze.stages]

    def _full_path(self, path: str) -> str:
        for entry in ("weight", "running_mean"):
            full = self.names.get(f"{path}.{entry}")
            if full is not None:
                return full.rpartition(".")[0]
        return path


def _path_of(module: nn.Module | None, root: nn.Module) -> str | None:
    return next((path for path, found in root.named_modules() if found is module), None)


# --- what features depend on ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Dependencies:
    """By feature index: the parameters behind it, and all entries of a checkpoint that it needs.

    `stem` are the parameters behind what goes into the first feature's module, None where that cannot be found.
    The names are the wrapped module's.
    """

    parameters: Mapping[int, frozenset[str]]
    entries: Mapping[int, frozenset[str]]
    stem: frozenset[str] | None


@lru_cache(maxsize=64)
def _dependencies(architecture: Architecture, indices: tuple[int, ...]) -> _Dependencies:
    with torch.inference_mode(False), torch.device("meta"), SkipInitialisers():
        twin = assemble(architecture, Capture(), indices)
        images = torch.empty(1, architecture.in_channels, *architecture.size)
    nodes = [str(index) for index in indices]
    entering: list[Tensor] = []
    with _inputs_of(twin, twin.first_stage, entering):
        outputs = dependencies.forward_with_graph(twin, images, nodes)
    parameters = {int(node): dependencies.parameters_behind(outputs[node], twin.net) for node in nodes}
    entries = {index: dependencies.entries_behind(behind, twin.net) for index, behind in parameters.items()}
    stem = dependencies.parameters_behind(entering[0], twin.net) if entering else _stem_by_name(twin)
    return _Dependencies(parameters, entries, stem or None)


def _stem_by_name(backbone: TimmBackbone) -> frozenset[str]:
    """The parameters of the patch embedding, where timm does not say which module gives the first feature."""
    return frozenset(name for name, full in backbone.names.items() if full.startswith(STEM_NAMES))


@contextmanager
def _inputs_of(root: nn.Module, path: str | None, found: list[Tensor]) -> Iterator[None]:
    """Collect the tensors that go into the submodule at `path`."""
    if path is None:
        yield
        return

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.extend(value for value in inputs if isinstance(value, Tensor))

    handle = root.get_submodule(path).register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
