"""What detectron2's pyramids have in common: a backbone inside, levels `p2`, `p3`, … made of its maps, and more on top.

A pyramid and the backbone inside it are one network with one checkpoint: the names of the latter begin with
`bottom_up.` or `net.`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

import torch.nn.functional as F
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    WithJsonSchema,
)
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Backbone, BackboneConfig, Family, levels_by_stride
from service.backbones.catalogue import TYPES
from service.backbones.detectron2_configs import Channels, Fault
from service.backbones.detectron2_resnet import (
    GROUPS_OF_NORM,
    INITIALISED_NORMS,
    FrozenBatchNorm2d,
    NormKind,
)
from service.backbones.freezing import norm_names
from service.backbones.registry import Registry, TypeEntry, json_type
from service.checkpoints.keys import guess_prefix, strip_prefix
from service.checkpoints.load import COUNTER, load_strict
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import CheckpointMismatch, InvalidConfig, UnknownBackbone
from service.errors import Fault as Misfit
from service.validation import invalid

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

POINTER = "#/backbone"
SCOPES = ("detectron2", "detrex")
A_PYRAMID = "it is a pyramid, which cannot be inside another"
NO_SHAPES = "it cannot be inside a pyramid, because detectron2 does not know the shapes of its levels"
NOT_INSIDE = {
    "detectron2.FPN": A_PYRAMID,
    "detectron2.SimpleFeaturePyramid": A_PYRAMID,
    "detrex.SimpleFeaturePyramid": A_PYRAMID,
    "detectron2.build_resnet_fpn_backbone": A_PYRAMID,
    "detectron2.build_retinanet_resnet_fpn_backbone": A_PYRAMID,
    "detrex.TorchvisionBackbone": NO_SHAPES,
    "detrex.TorchvisionResNet": NO_SHAPES,
}
FeatureName = Annotated[str, Field(min_length=1, max_length=64)]
SquarePad = Annotated[
    int,
    Field(strict=True, ge=0, le=4096, description="Side of the square that detectors pad images to."),
]

# --- the backbone inside --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def inner_registry() -> Registry[Family[Any]]:
    """The types that may be inside a pyramid."""
    entries = (
        TypeEntry(name, f"service.backbones.{family}", summary, unsupported=NOT_INSIDE.get(name))
        for name, family, summary in TYPES
        if name.partition(".")[0] in SCOPES
    )
    return Registry(entries, Family)


@contextmanager
def below(key: str) -> Iterator[None]:
    """What is wrong with the backbone inside is reported where it is in the request: `#/backbone/bottom_up/depth`."""
    try:
        yield
    except InvalidConfig as error:
        first, *more = (_moved(fault, key) for fault in error.faults)
        raise InvalidConfig(first.pointer, first.detail, *more) from error
    except UnknownBackbone as error:
        error.faults = tuple(_moved(fault, key) for fault in error.faults)
        raise


def _moved(fault: Misfit, key: str) -> Misfit:
    under = f"{POINTER}/{key}"
    inside = fault.pointer == under or fault.pointer.startswith(f"{under}/")
    return fault if inside else replace(fault, pointer=under + fault.pointer.removeprefix(POINTER))


def inner_backbone(key: str) -> BeforeValidator:
    """A validator of the config of a backbone inside another, at `key`."""

    def validated(raw: Any) -> Any:
        if isinstance(raw, BackboneConfig):
            return raw
        pointer = f"{POINTER}/{key}"
        resolved = inner_registry().resolve(json_type(raw, pointer=pointer), pointer=f"{pointer}/type")
        config_class = resolved.family.config
        try:
            with below(key):
                return config_class.model_validate(
                    {**raw, "type": resolved.type}, context={"scope": resolved.scope}
                )
        except ValidationError as error:
            raise invalid(error, pointer, config_class.model_fields) from error

    return BeforeValidator(validated)


INNER_SCHEMA = WithJsonSchema(
    {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string"}},
        "description": "The config of a backbone of detectron2 or detrex.",
    }
)


@dataclass(frozen=True)
class Inner:
    """The backbone inside a pyramid, and the levels that its own config returns."""

    family: Family[Any]
    config: BackboneConfig
    description: Description
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, config: BackboneConfig) -> Self:
        """What there is to know of a config."""
        family = inner_registry().resolve(config.type).family
        description = family.describe(config)
        return cls(family, config, description, config.levels(description))

    @property
    def names(self) -> str:
        """The levels, for an error's text."""
        return ", ".join(level.name for level in self.levels)

    def map(self, name: str) -> InputSpec | None:
        """The map that the backbone returns under a name."""
        nodes = {level.name: level.node for level in self.levels}
        features = {feature.node: feature for feature in self.description.features}
        feature = features.get(nodes.get(name, ""))
        if feature is None or feature.stride is None:
            return None
        return InputSpec(feature.node, feature.channels, feature.stride)


# --- levels on top --------------------------------------------------------------------------------


class _Top(BaseModel):
    """A block that adds levels on top."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    LEVELS: ClassVar[int] = 1
    in_channels: Channels | None = Field(None, description="Channels of what goes in.")
    out_channels: Channels | None = Field(None, description="Channels of its levels.")

    @abstractmethod
    def source(self) -> str:
        """The level that it is made of."""


class MaxPoolTop(BaseModel):
    """`LastLevelMaxPool`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    LEVELS: ClassVar[int] = 1
    type: Literal["LastLevelMaxPool"]
    in_channels: None = None
    out_channels: None = None

    def source(self) -> str:
        """The level that it is made of."""
        return "p5"


class P6P7Top(_Top):
    """`LastLevelP6P7`."""

    LEVELS: ClassVar[int] = 2
    type: Literal["LastLevelP6P7"]
    in_feature: FeatureName = Field("res5", description="A level of the backbone inside, or of the pyramid.")

    def source(self) -> str:
        """The level that it is made of."""
        return self.in_feature


class P6Top(_Top):
    """`LastLevelP6`, as detectors beside detectron2 have it."""

    type: Literal["LastLevelP6"]
    in_features: FeatureName = Field("res5", description="A level of the backbone inside, or of the pyramid.")

    def source(self) -> str:
        """The level that it is made of."""
        return self.in_features


def _named_top(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


TopBlockConfig = Annotated[
    Annotated[MaxPoolTop | P6P7Top | P6Top, Discriminator("type")], BeforeValidator(_named_top)
]


@dataclass(frozen=True)
class InputSpec:
    """A map of the backbone inside."""

    node: str
    channels: int
    stride: int


@dataclass(frozen=True)
class TopSpec:
    """Levels on top: one or two strided convolutions, or a max pool where `outputs` is None.

    `source` is a node of the backbone inside where `from_inside`, else a level of the pyramid.
    """

    levels: int
    source: str
    from_inside: bool
    inputs: int
    outputs: int | None


class TopBlock(nn.Module):
    """Keys `p6`, `p7`."""

    def __init__(self, spec: TopSpec) -> None:
        super().__init__()
        widths = (spec.inputs, spec.outputs or 0)[: spec.levels] if spec.outputs else ()
        for number, width in enumerate(widths, start=6):
            self.add_module(f"p{number}", nn.Conv2d(width, spec.outputs or 0, 3, stride=2, padding=1))

    def forward(self, maps: Tensor) -> list[Tensor]:
        """[n, c, h, w] to maps of half and of a quarter of its size."""
        convolutions = list(self.children())
        if not convolutions:
            return [F.max_pool2d(maps, 1, stride=2)]
        found = [convolutions[0](maps)]
        return found + [convolution(F.relu(found[0])) for convolution in convolutions[1:]]


# --- the network ----------------------------------------------------------------------------------


def stage_of(stride: int) -> int:
    """The number in a level's name."""
    return int(math.log2(stride))


def pyramid_features(strides: Sequence[int], channels: int, top: TopSpec | None) -> tuple[FeatureInfo, ...]:
    """The levels of a pyramid, and those on top."""
    found = [
        FeatureInfo(index, f"p{stage_of(stride)}", channels, stride, "NCHW")
        for index, stride in enumerate(strides)
    ]
    if top is not None:
        last = stage_of(strides[-1])
        for number in range(last + 1, last + 1 + top.levels):
            width = top.outputs or top.inputs
            found.append(FeatureInfo(len(found), f"p{number}", width, 2**number, "NCHW"))
    return tuple(found)


class Pyramid(Backbone):
    """Levels made of the maps of a backbone inside, which `put_inside` adds once the pyramid's own weights are made."""

    INSIDE: ClassVar[str]

    def __init__(self, features: tuple[FeatureInfo, ...], top: TopSpec | None, inputs: Sequence[str]) -> None:
        super().__init__()
        self.features = features
        self.top = top
        self.inputs = tuple(inputs)

    def put_inside(self, inner: Backbone) -> None:
        """The backbone that the levels are made of; its names come last."""
        self.add_module(self.INSIDE, inner)

    @property
    def inner(self) -> Backbone:
        """The backbone that the levels are made of."""
        found = self.get_submodule(self.INSIDE)
        assert isinstance(found, Backbone)
        return found

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """The levels in `nodes`."""
        own = [feature.node for feature in self.features]
        on_top = own[len(own) - self.top.levels :] if self.top else []
        wanted, needed = set(nodes) - set(on_top), set(self.inputs)
        top = self.top if set(nodes) & set(on_top) else None
        if top is not None:
            (needed if top.from_inside else wanted).add(top.source)
        maps = self.inner(images, sorted(needed))
        found = self.levels(maps, wanted)
        if top is not None:
            source = (maps if top.from_inside else found)[top.source]
            found |= dict(zip(on_top, self.get_submodule("top_block")(source), strict=True))
        return {node: found[node] for node in nodes}

    @abstractmethod
    def levels(self, maps: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
        """The levels in `wanted`, without those on top, of the maps of the backbone inside."""

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """What is frozen of the backbone inside; of the pyramid only norms that are frozen ones from the start."""
        # `norm_eval` says that there are frozen norms here or inside, where the backbone knows them by itself.
        inside = self.inner.frozen(replace(freeze, norm_eval=False))
        of_own = [name for name, _ in self.named_parameters() if not name.startswith(f"{self.INSIDE}.")]
        norms = norm_names(self, (FrozenBatchNorm2d,))
        return FreezeReport(
            stages=inside.stages,
            parameters=tuple(f"{self.INSIDE}.{name}" for name in inside.parameters),
            norms=(
                *(name for name in norms if not name.startswith(f"{self.INSIDE}.")),
                *(f"{self.INSIDE}.{name}" for name in inside.norms),
            ),
            of=len(of_own) + inside.of,
        )


# --- configs --------------------------------------------------------------------------------------


class PyramidConfig(BackboneConfig):
    """What all spellings of pyramids have in common."""

    NETWORK: ClassVar[str]
    INSIDE: ClassVar[str]

    @abstractmethod
    def inner_config(self) -> BackboneConfig:
        """The backbone inside."""

    @abstractmethod
    def spec(self) -> Any:
        """The neutral spelling of what is around the backbone inside; only where there are no faults."""

    @abstractmethod
    def top_config(self) -> MaxPoolTop | P6P7Top | P6Top | None:
        """The block that adds levels on top."""

    @abstractmethod
    def has_frozen_norms(self) -> bool:
        """Whether the norms of the pyramid itself are constants."""

    def padded_to(self) -> int:
        """The side of the squares that images are padded to, 0 for none."""
        return 0

    @cached_property
    def inside(self) -> Inner:
        """What there is to know of the backbone inside."""
        config = self.inner_config()
        with below(self.INSIDE):
            return Inner.of(config)

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that all spellings of a network share its models."""
        inside = self.inner_config().architecture()
        return {"type": self.NETWORK, self.INSIDE: inside, **asdict(self.spec())}

    def freeze(self) -> Freeze:
        """What the config of the backbone inside freezes."""
        inside = self.inner_config().freeze()
        return replace(inside, norm_eval=inside.norm_eval or self.has_frozen_norms())

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named as detectron2 does."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        return tuple(Level(level.index, level.node, level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """All levels."""
        return tuple(Level(feature.index, feature.node, feature.node) for feature in description.features)

    def input_defaults(self) -> PreprocessDefaults:
        """The square that images are padded to, or what the backbone inside asks for."""
        side, asked = self.padded_to(), self.inner_config().input_defaults()
        return replace(asked, size=(side, side)) if side else asked

    def inside_faults(self) -> Iterator[Fault]:
        """Weights that are named where there can be none."""
        if self.inner_config().weights() is not None:
            yield self.INSIDE, "takes no weights of its own; name the checkpoint of the whole beside it"

    def contiguous_faults(self, key: str, strides: Sequence[int]) -> Iterator[Fault]:
        """Strides that do not double."""
        if any(after != 2 * before for before, after in pairwise(strides)):
            yield key, f"gives strides {', '.join(map(str, strides))}, which do not double"

    def norm_faults(self, key: str, norm: NormKind, channels: Sequence[int]) -> Iterator[Fault]:
        """Group norms that do not divide."""
        uneven = [width for width in channels if width % GROUPS_OF_NORM]
        if norm == "gn" and uneven:
            yield key, f"the {GROUPS_OF_NORM} groups of GN do not divide {uneven[0]} channels"

    def top_faults(self, own: Sequence[str], channels: int) -> Iterator[Fault]:
        """What is wrong with the levels on top of those in `own`."""
        top = self.top_config()
        if top is None:
            return
        name = top.source()
        source = self.inside.map(name)
        if source is None and name not in own:
            detail = (
                f"the block on top takes {name}, which is not among {', '.join(own)} or {self.inside.names}"
            )
            yield "top_block", detail
            return
        width = channels if source is None else source.channels
        if top.in_channels not in (None, width):
            yield "top_block/in_channels", f"{name} has {width} channels"

    def top_spec(self, channels: int) -> TopSpec | None:
        """The neutral spelling of the levels on top."""
        top = self.top_config()
        if top is None:
            return None
        source = self.inside.map(top.source())
        return TopSpec(
            levels=top.LEVELS,
            source=top.source() if source is None else source.node,
            from_inside=source is not None,
            inputs=channels if source is None else source.channels,
            outputs=None if isinstance(top, MaxPoolTop) else top.out_channels or channels,
        )


# --- the family -----------------------------------------------------------------------------------

C = TypeVar("C", bound=PyramidConfig)


def initialise(network: nn.Module) -> None:
    """Uniform by the fan in for convolutions (Caffe2's Xavier); 1 and 0 for norms."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, INITIALISED_NORMS):
            cast("Any", module).reset_parameters()


def pyramid_family(
    config: type[C], network: Callable[[Any], Pyramid], *, example: Mapping[str, Any]
) -> Family[C]:
    """The family of a pyramid that is built from its config's `spec()` around a backbone of another family."""

    def describe(given: C) -> Description:
        inside = given.inside.description
        made = building.on_meta(lambda: building.initialised(lambda: build(given)))
        return building.description(
            made,
            made.features,
            in_channels=inside.in_channels,
            input_defaults=inside.input,
            fixed_input=inside.fixed_input,
        )

    def build(given: C) -> Pyramid:
        made = building.unset(lambda: network(given.spec()))
        initialise(made)
        made.put_inside(given.inside.family.build(given.inside.config))
        return made

    def load(given: C, state: StateDict, ref: WeightsRef) -> tuple[Pyramid, LoadedKeys]:
        made = building.unset(lambda: network(given.spec()))
        return made, _load_both(made, given.inside, state, ref)

    return Family(
        config=config,
        describe=describe,
        build=build,
        load=load,
        example=lambda type_name: {"type": type_name, **example},
    )


def _load_both(made: Pyramid, inside: Inner, state: StateDict, ref: WeightsRef) -> LoadedKeys:
    """Fill the pyramid, and put the backbone inside it, from one file."""
    own_names = [name for name in made.state_dict() if not name.endswith(COUNTER)]
    guessed = ref.prefix or guess_prefix(state, own_names)
    named, prefix, dropped = strip_prefix(state, guessed, pointer=ref.pointer)
    inner_state, used, rest = strip_prefix(named, made.INSIDE, pointer=ref.pointer)
    bare = replace(ref, prefix=None)
    own = load_strict(made, {name: named[name] for name in rest}, bare)
    try:
        inner, keys = inside.family.load(inside.config, inner_state, bare)
    except CheckpointMismatch as error:
        raise _mismatch_below(error, used) from error
    made.put_inside(inner)
    return LoadedKeys(
        loaded=own.loaded + keys.loaded,
        missing=(*own.missing, *(used + name for name in keys.missing)),
        unexpected=(
            *(prefix + name for name in own.unexpected),
            *(prefix + used + name for name in keys.unexpected),
            *dropped,
        ),
        prefix=prefix,
    )


def _mismatch_below(error: CheckpointMismatch, prefix: str) -> CheckpointMismatch:
    fault = error.faults[0]
    return CheckpointMismatch(
        fault.pointer,
        f"below {prefix} {fault.detail}",
        missing=[prefix + name for name in error.missing],
        wrong_shape=[prefix + name for name in error.wrong_shape],
        unexpected=[prefix + name for name in error.unexpected],
    )
