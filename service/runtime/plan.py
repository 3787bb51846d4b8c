"""From what a client asks to what is to be done: a config resolved and checked before any memory is taken."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import orjson
import torch
from pydantic import ValidationError
from torch import Tensor

from service.backbones.base import Backbone, BackboneConfig, Family
from service.backbones.building import initialised
from service.backbones.lazyconfig import from_lazyconfig
from service.backbones.registry import Registry, Resolved, json_type
from service.backbones.shapes import ShapeRules, shapes_only
from service.checkpoints.published import own_prefix
from service.config.files import ConfigCatalogue, NamedConfig
from service.config.preprocess import PreprocessSpec, parse_preprocess, resolve_preprocess
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Layout, Level, WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig
from service.necks.base import LevelFacts, Neck, NeckConfig, NeckDescription, NeckFamily, WeightedNeckConfig
from service.necks.chain import CHAIN, read_chain
from service.runtime.live_bytes import CountRuled, LiveBytes, PassCost, coarse
from service.validation import invalid

T = TypeVar("T")
PLANS_KEPT = 2048
DESCRIPTIONS_KEPT = 2048
SHAPES_KEPT = 4096
META_KEPT = 8
NOTHING_FROZEN = Freeze()
SIZE_POINTER = "#/preprocess/size"
# What networks raise for an input of a size that they do not take.
SIZE_ERRORS = (RuntimeError, AssertionError, ValueError, IndexError, NotImplementedError)


class Lru(Generic[T]):
    """The last values made, by key, for many threads; two may make the same value at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> T | None:
        """The value of `key`, if it is there; costs next to nothing."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made if it is not there."""
        known = self.peek(key)
        if known is not None:
            return known
        value = make()
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return value


@dataclass(frozen=True)
class NeckPlan:
    """A neck behind a backbone: what it is built from, the levels that go in, and what comes out."""

    type: str
    family: NeckFamily[Any]
    config: NeckConfig
    inputs: tuple[LevelFacts, ...]
    description: NeckDescription

    @cached_property
    def key(self) -> str:
        """A digest of everything that decides its network."""
        return hashlib.sha256(f"{self.config.key()}:{self.inputs}".encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A request's config, resolved: what to build, what to return, what counts as frozen.

    `backbone` is the config that it was resolved from.
    """

    backbone: Any
    type: str
    family: Family[Any]
    config: BackboneConfig
    description: Description
    levels: tuple[Level, ...]
    frozen: FreezeReport
    weights: WeightsRef | None
    preprocess: Any
    neck: NeckPlan | None = None

    @cached_property
    def key(self) -> str:
        """A digest of the architecture (`NetworkConfig.key`)."""
        return self.config.key()

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of the backbone that the levels need."""
        return tuple(level.node for level in self.levels)

    @cached_property
    def answer_key(self) -> bytes:
        """A digest of what decides an answer beside the networks' weights, the image and how it is prepared."""
        parts = (self.key, self.levels, self.config.freeze(), self.neck and self.neck.key)
        return hashlib.sha256(repr(parts).encode()).digest()

    @cached_property
    def spec(self) -> PreprocessSpec:
        """How images are prepared: as the request says, else as the checkpoint, the architecture, ImageNet.

        Raises:
            InvalidConfig: the request says it wrongly.
        """
        defaults = [self.config.input_defaults(), self.description.input]
        return resolve_preprocess(parse_preprocess(self.preprocess), defaults)

    @property
    def input_size(self) -> tuple[int, int]:
        """The input that the architecture is made for, [height, width]; 224×224 where it does not say."""
        return self.description.input.size or (224, 224)


class Planner:
    """Resolves configs; keeps what it learnt of architectures."""

    def __init__(
        self, backbones: Registry[Family[Any]], necks: Registry[NeckFamily[Any]], catalogue: ConfigCatalogue
    ) -> None:
        self.backbones = backbones
        self.necks = necks
        self.catalogue = catalogue
        self._plans: Lru[Plan] = Lru(PLANS_KEPT)
        self._descriptions: Lru[Description] = Lru(DESCRIPTIONS_KEPT)
        self._meta: Lru[Backbone] = Lru(META_KEPT)
        self._shapes: Lru[tuple[LevelShape, ...]] = Lru(SHAPES_KEPT)
        self._costs: Lru[PassCost] = Lru(SHAPES_KEPT)

    def named(self, name: str, neck: Any, preprocess: Any) -> tuple[Any, Any, Any]:
        """A named config as backbone, neck and preprocess; what is given beside the name goes before its own.

        Raises:
            UnknownConfig, InvalidConfig: there is none of this name, or its file cannot be read.
        """
        return _completed(self.catalogue.load(name, pointer="#/backbone"), neck, preprocess)

    def known(self, backbone: Any, neck: Any = None, preprocess: Any = None) -> Plan | None:
        """The plan of a config that was resolved before; costs no more than to look."""
        return self._plans.peek(_digest(backbone, neck, preprocess))

    def plan(self, backbone: Any, neck: Any = None, preprocess: Any = None) -> Plan:
        """Resolve a config.

        Raises:
            UnknownBackbone, InvalidConfig: what is wrong and where.
        """
        key = _digest(backbone, neck, preprocess)
        return self._plans.get(key, lambda: self._planned(backbone, neck, preprocess))

    def _planned(self, backbone: Any, neck: Any, preprocess: Any) -> Plan:
        backbone = from_lazyconfig(backbone)
        resolved = self.backbones.resolve(json_type(backbone, pointer="#/backbone"))
        config = _configure(resolved, backbone)
        description = self.describe(resolved.family, config)
        plan = Plan(
            backbone=backbone,
            type=config.type,
            family=resolved.family,
            config=config,
            description=description,
            levels=config.levels(description),
            frozen=self._frozen(resolved.family, config, description),
            weights=_weights(config),
            preprocess=preprocess,
        )
        return plan if neck is None else self._with_neck(neck, plan)

    def _with_neck(self, raw: Any, bare: Plan) -> Plan:
        """A plan with the neck of a config behind its backbone.

        A neck with weights takes levels from shallow to deep, in whatever order they are asked for, as libraries do.
        """
        if isinstance(raw, str):
            raw = {"type": raw}
        type_name, family, config = self._neck(raw)
        if isinstance(config, WeightedNeckConfig):
            bare = replace(bare, levels=tuple(sorted(bare.levels, key=lambda level: level.index)))
        inputs = tuple(level.fact for level in self.levels_at(bare, bare.input_size))
        described = family.describe(config, inputs)
        return replace(bare, neck=NeckPlan(type_name, family, config, inputs, described))

    def _neck(self, raw: Any) -> tuple[str, NeckFamily[Any], NeckConfig]:
        """The type, family and config of a neck, or of a chain of them."""
        if isinstance(raw, (list, tuple)):
            chain = read_chain(raw, self.necks, _configured_neck)
            return chain.type, CHAIN, chain
        resolved = self.necks.resolve(json_type(raw, pointer="#/neck"), pointer="#/neck/type")
        return resolved.type, resolved.family, _configured_neck(resolved, raw)

    def describe(self, family: Family[Any], config: BackboneConfig) -> Description:
        """Features and size of an architecture."""
        return self._descriptions.get(config.key(), lambda: family.describe(config))

    def _meta_backbone(self, family: Family[Any], config: BackboneConfig) -> Backbone:
        """The architecture on the meta device: shapes and names, no weights."""

        def build() -> Backbone:
            with torch.device("meta"):
                backbone: Backbone = initialised(lambda: family.build(config))
            return backbone.eval()

        return self._meta.get(config.key(), build)

    def computable(self, plan: Plan) -> tuple[str, ...]:
        """The features that the network of a plan has, shallow to deep, and those that it asks for beside them.

        OpenMMLab builds the norms of only those levels that a config asks for, and can give no others.
        """
        nodes = dict.fromkeys([*(feature.node for feature in plan.description.features), *plan.nodes])
        if self._can_compute(plan, tuple(nodes)):
            return tuple(nodes)
        return tuple(node for node in nodes if node in plan.nodes or self._can_compute(plan, (node,)))

    def _can_compute(self, plan: Plan, nodes: tuple[str, ...]) -> bool:
        backbone = self._meta_backbone(plan.family, plan.config)
        try:
            with shapes_only():
                backbone(torch.empty((1, plan.description.in_channels, *plan.input_size)), nodes)
        except SIZE_ERRORS:
            return True  # it takes other sizes
        except AttributeError:
            return False
        return True

    def _frozen(self, family: Family[Any], config: BackboneConfig, description: Description) -> FreezeReport:
        """What a config freezes; builds nothing where that is nothing and the description counts parameters."""
        freeze = config.freeze()
        if freeze == NOTHING_FROZEN and description.tensors:
            return FreezeReport(None, (), (), description.tensors)
        return self._meta_backbone(family, config).frozen(freeze)

    def known_levels(self, plan: Plan, size: tuple[int, int]) -> tuple[LevelShape, ...] | None:
        """What `levels_at` found before; costs no more than to look."""
        return self._shapes.peek(_shape_key(plan, size))

    def levels_at(
        self, plan: Plan, size: tuple[int, int], pointer: str = SIZE_POINTER
    ) -> tuple[LevelShape, ...]:
        """What every level of one image is at an input of [height, width].

        Args:
            pointer: the key of the request that the size is from.

        Raises:
            InvalidConfig: this backbone does not take this size, or the neck does not take these levels.
        """
        return self._shapes.get(_shape_key(plan, size), lambda: self._measure(plan, size, pointer))

    def levels_near(self, plan: Plan, size: tuple[int, int]) -> tuple[LevelShape, ...]:
        """What every level is about, at a size that is not worth building the architecture for.

        Maps scale with their stride, tokens with the area, from the size that the architecture is made for.
        """
        made_for = plan.input_size
        return tuple(level.scaled(made_for, size) for level in self.levels_at(plan, made_for))

    def known_cost(self, plan: Plan, size: tuple[int, int]) -> PassCost | None:
        """What `cost` found before; costs no more than to look."""
        known = self._costs.peek(_shape_key(plan, size))
        return self._costs.peek(_shape_key(plan, coarse(size))) if known is None else known

    def cost(self, plan: Plan, size: tuple[int, int], pointer: str = SIZE_POINTER) -> PassCost:
        """What one forward pass of one image takes, its input and levels among it.

        Counted on the meta device, in float32 and at a size that is a little larger where the network takes any.

        Raises:
            InvalidConfig: this backbone does not take this size, or the neck does not take these levels.
        """
        rounded = coarse(size)
        try:
            return self._costs.get(_shape_key(plan, rounded), lambda: self._count(plan, rounded, pointer))
        except InvalidConfig:
            return self._costs.get(_shape_key(plan, size), lambda: self._count(plan, size, pointer))

    def _count(self, plan: Plan, size: tuple[int, int], pointer: str) -> PassCost:
        backbone = self._meta_backbone(plan.family, plan.config)
        neck = None if plan.neck is None else _meta_neck(plan.neck)
        _run_backbone(backbone, plan, size, pointer)  # what is traced on first use is no activation
        live = LiveBytes()
        ruled = CountRuled(live)
        with live:
            found = _run_backbone(backbone, plan, size, pointer, ruled)
            if plan.neck is not None and neck is not None:
                features = [found[level.node] for level in plan.levels]
                shapes = [feature.shape for feature in features]
                with _levels_for(plan.neck, shapes), shapes_only(), ruled:
                    neck(features)
        return live.cost

    def _measure(self, plan: Plan, size: tuple[int, int], pointer: str) -> tuple[LevelShape, ...]:
        levels = _levels_of_table(plan, size) or self._levels_of_meta(plan, size, pointer)
        return levels if plan.neck is None else _behind(plan.neck, levels)

    def _levels_of_meta(self, plan: Plan, size: tuple[int, int], pointer: str) -> tuple[LevelShape, ...]:
        found = _run_backbone(self._meta_backbone(plan.family, plan.config), plan, size, pointer)
        features = {feature.node: feature for feature in plan.description.features}
        return tuple(
            level_shape(level, tuple(found[level.node].shape), size, features.get(level.node))
            for level in plan.levels
        )


@dataclass(frozen=True)
class LevelShape:
    """One level of one image: what it is, and its shape with a leading 1."""

    fact: LevelFacts
    shape: tuple[int, ...]

    def scaled(self, made_for: tuple[int, int], size: tuple[int, int]) -> LevelShape:
        """The same level of an input of another [height, width], about."""
        if self.fact.layout == "NC" or (self.fact.layout == "NCHW" and self.fact.stride is None):
            return self  # its size is not that of the image
        ratios = (size[0] / made_for[0], size[1] / made_for[1])
        if self.fact.layout == "NLC":
            tokens = math.ceil(self.shape[1] * ratios[0] * ratios[1])
            return LevelShape(self.fact, (1, tokens, self.shape[2]))
        if self.fact.layout == "NCL":
            tokens = math.ceil(self.shape[2] * ratios[0] * ratios[1])
            return LevelShape(self.fact, (1, self.shape[1], tokens))
        height, width = (math.ceil(side * ratio) for side, ratio in zip(self.shape[2:], ratios, strict=True))
        return LevelShape(self.fact, (1, self.shape[1], height, width))


LAYOUT_BY_RANK: Mapping[int, Layout] = {4: "NCHW", 3: "NLC", 2: "NC"}


def level_shape(
    level: Level, shape: tuple[int, ...], size: tuple[int, int], feature: FeatureInfo | None
) -> LevelShape:
    """What a tensor of this shape is: layout by its rank, stride as the feature says or else by size.

    Only the feature can say that tokens have their channels first.
    """
    layout = LAYOUT_BY_RANK[len(shape)]
    if layout == "NLC" and feature is not None and feature.layout == "NCL":
        return LevelShape(LevelFacts(level.index, level.name, "NCL", shape[1], None), shape)
    if layout != "NCHW":
        return LevelShape(LevelFacts(level.index, level.name, layout, shape[-1], None), shape)
    nominal = feature.stride if feature is not None else None
    stride = nominal or max(1, round(size[0] / shape[2]))
    return LevelShape(LevelFacts(level.index, level.name, layout, shape[1], stride), shape)


def pooled_shapes(levels: Sequence[LevelShape], images: int, pool: str) -> list[tuple[int, ...]]:
    """The shapes of a reply for so many images."""
    if pool == "none":
        return [(images, *level.shape[1:]) for level in levels]
    return [(images, level.fact.channels) for level in levels]


def pooled_fact(fact: LevelFacts, pool: str) -> LevelFacts:
    """What a level is after pooling."""
    return fact if pool == "none" else replace(fact, layout="NC", stride=None)


def _behind(neck: NeckPlan, levels: Sequence[LevelShape]) -> tuple[LevelShape, ...]:
    """The levels that a neck makes of these.

    Raises:
        InvalidConfig: it cannot take them at this size.
    """
    with _levels_for(neck, [level.shape for level in levels]):
        network = _meta_neck(neck)
        with shapes_only():
            found = network([torch.empty(level.shape) for level in levels])
    facts = neck.description.levels
    return tuple(_as_given(fact, tuple(tensor.shape)) for fact, tensor in zip(facts, found, strict=True))


def _run_backbone(
    backbone: Backbone,
    plan: Plan,
    size: tuple[int, int],
    pointer: str,
    counted: AbstractContextManager[Any] | None = None,
) -> Mapping[str, Tensor]:
    """The features of one image on the meta device.

    Args:
        counted: what counts inside.

    Raises:
        InvalidConfig: the backbone does not take this size.
    """
    try:
        with shapes_only(), counted or nullcontext():
            found: Mapping[str, Tensor] = backbone(
                torch.empty((1, plan.description.in_channels, *size)), plan.nodes
            )
    except SIZE_ERRORS as error:
        raise size_refused(plan, size, pointer) from error
    return found


def _meta_neck(neck: NeckPlan) -> Neck:
    with torch.device("meta"), ShapeRules():
        network: Neck = neck.family.build(neck.config, neck.inputs)
    return network.eval()


@contextmanager
def _levels_for(neck: NeckPlan, shapes: Iterable[Sequence[int]]) -> Iterator[None]:
    """A context in which a neck meets levels of these shapes.

    Raises:
        InvalidConfig: it cannot take them at this size.
    """
    try:
        yield
    except SIZE_ERRORS as error:
        sizes = ", ".join("x".join(map(str, shape[2:])) for shape in shapes)
        raise InvalidConfig("#/neck", f"{neck.type} does not take levels of {sizes}") from error


def _as_given(fact: LevelFacts, shape: tuple[int, ...]) -> LevelShape:
    """A level of a neck; how long a vector of windows is depends on the image."""
    return LevelShape(replace(fact, channels=shape[1]) if fact.layout == "NC" else fact, shape)


def size_refused(plan: Plan, size: tuple[int, int], pointer: str) -> InvalidConfig:
    """The error for an input that a backbone cannot take."""
    height, width = plan.input_size
    detail = f"{plan.type} does not take images of {size[0]}x{size[1]}"
    # A network that says nothing of its size may not even take the usual one.
    advice = f"it is made for {height}x{width}" if size != plan.input_size else "give another size"
    return InvalidConfig(pointer, f"{detail}; {advice}")


def _levels_of_table(plan: Plan, size: tuple[int, int]) -> tuple[LevelShape, ...] | None:
    """The levels, where the description carries their shapes at this size."""
    if size != plan.description.input.size:
        return None
    features = {feature.node: feature for feature in plan.description.features}
    levels = []
    for level in plan.levels:
        feature = features.get(level.node)
        if feature is None or feature.shape is None:
            return None
        levels.append(level_shape(level, (1, *feature.shape), size, feature))
    return tuple(levels)


def _digest(*parts: Any) -> bytes:
    """A short key for raw configs, which may be long; equal for equal JSON."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).digest()


def _shape_key(plan: Plan, size: tuple[int, int]) -> Hashable:
    return plan.key, plan.levels, plan.neck and plan.neck.key, size


def _completed(named: NamedConfig, neck: Any, preprocess: Any) -> tuple[Mapping[str, Any], Any, Any]:
    own_neck = named.neck if neck is None else neck
    own_preprocess = named.preprocess if preprocess is None else preprocess
    return named.backbone, own_neck, own_preprocess


def _configure(resolved: Resolved[Family[Any]], raw: Mapping[str, Any]) -> BackboneConfig:
    config: BackboneConfig = _validated(resolved, raw, "#/backbone")
    return config


def _configured_neck(resolved: Resolved[NeckFamily[Any]], raw: Mapping[str, Any]) -> NeckConfig:
    config: NeckConfig = _validated(resolved, raw, "#/neck")
    return config


def _weights(config: BackboneConfig) -> WeightsRef | None:
    """Where a backbone's weights come from, with the prefix that their scheme takes off by itself.

    Raises:
        InvalidConfig: two checkpoints are named, or one that would fit but means another network.
    """
    ref = config.weights()
    if ref is None:
        return None
    if (detail := config.misreads(ref.name)) is not None:
        raise CheckpointMismatch(ref.pointer, detail)
    return replace(ref, prefix=own_prefix(ref.name, ref.prefix))


def _validated(resolved: Resolved[Any], raw: Mapping[str, Any], pointer: str) -> Any:
    """The family's config of a raw one, its type written in full."""
    config_class = resolved.family.config
    try:
        return config_class.model_validate({**raw, "type": resolved.type}, context={"scope": resolved.scope})
    except ValidationError as error:
        raise invalid(error, pointer, known_keys(config_class)) from error


def known_keys(config_class: type[Any]) -> list[str]:
    """The keys that a config class takes, as a client spells them."""
    return [field.alias or name for name, field in config_class.model_fields.items()]
