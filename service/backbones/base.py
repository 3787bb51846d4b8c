"""What every backbone family has in common: the config class, the module, and the family that ties them.

A family is one file. It defines

- a `BackboneConfig` per spelling: the parameters it takes, typed and bounded;
- a `Backbone`: the module, whose `forward` gives named features;
- a `Family`: how the two and the checkpoint keys belong together.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import nn

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
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from torch import Tensor

    from service.checkpoints.layouts import Naming
    from service.checkpoints.read import StateDict

MAX_INDICES = 64
CheckpointName = Annotated[str, Field(min_length=1, max_length=512)]


def _as_tuple(value: Any) -> Any:
    """Libraries take an int where they mean a tuple of one."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


Index = Annotated[int, Field(strict=True, ge=-1024, le=1024)]
Indices = Annotated[
    tuple[Index, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=MAX_INDICES)
]
Stride = Annotated[int, Field(strict=True, ge=1, le=4096)]
InputChannels = Annotated[int, Field(strict=True, ge=1, le=64)]
DropRate = Annotated[float, Field(ge=0, lt=1)]


class PretrainedInit(BaseModel):
    """OpenMMLab's `init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Pretrained"]
    checkpoint: Annotated[str, Field(max_length=512)]
    prefix: Annotated[str, Field(max_length=256)] | None = None
    map_location: Literal["cpu"] | None = None


LayerNames = tuple[Annotated[str, Field(max_length=64)], ...]
InitNumber = Annotated[float, Field(ge=-1e6, le=1e6)]
# those that torch knows the gain of
Nonlinearity = Literal[
    "relu", "leaky_relu", "linear", "sigmoid", "tanh", "selu", "conv1d", "conv2d", "conv3d"
]


class InitNumbers(BaseModel):
    """Which layers an OpenMMLab initialiser is for, and the numbers of its distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Annotated[str, Field(max_length=64)] | Annotated[LayerNames, Field(max_length=16)] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    val: InitNumber | None = None
    bias: InitNumber | None = None
    bias_prob: InitNumber | None = None
    gain: InitNumber | None = None
    mean: InitNumber | None = None
    std: InitNumber | None = None
    a: InitNumber | None = None
    b: InitNumber | None = None
    mode: Literal["fan_in", "fan_out"] | None = None
    nonlinearity: Nonlinearity | None = None
    distribution: Literal["normal", "uniform"] | None = None


InitKind = Literal["Constant", "Xavier", "Normal", "TruncNormal", "Uniform", "Kaiming", "Caffe2Xavier"]


class InitOverride(InitNumbers):
    """What an initialiser does otherwise in the module of this name; without a type, by its own distribution."""

    type: InitKind | None = None


class RandomInit(InitNumbers):
    """One of OpenMMLab's initialisers (`dict(type='Kaiming', layer=['Conv2d'])`), as public configs have them.

    It says how training starts. It is accepted and means "no checkpoint"; random weights here come from the
    family's own initialisation.
    """

    type: InitKind
    override: InitOverride | Annotated[tuple[InitOverride, ...], Field(max_length=16)] | None = None


OneInit = Annotated[PretrainedInit | RandomInit, Field(discriminator="type")]


def _pretrained_unsaid(value: Any) -> Any:
    """PVT's configs name a checkpoint and no type, which the library reads as a checkpoint."""
    names_one = isinstance(value, Mapping) and "checkpoint" in value and "type" not in value
    return {"type": "Pretrained", **value} if names_one else value


def _one_or_many(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "dict"


# The tags keep pydantic's errors to the branch that was meant.
InitConfig = Annotated[
    Annotated[OneInit, Tag("dict")] | Annotated[tuple[OneInit, ...], Field(max_length=16), Tag("list")],
    Discriminator(_one_or_many),
    BeforeValidator(_pretrained_unsaid),
]


def pretrained_ref(
    init_cfg: PretrainedInit | RandomInit | tuple[PretrainedInit | RandomInit, ...] | None,
    checkpoint: str | None,
    *,
    pointer: str,
) -> WeightsRef | None:
    """The checkpoint that `init_cfg` or its short spelling names; None where neither does.

    Raises:
        InvalidConfig: two checkpoints are named.
    """
    if isinstance(init_cfg, tuple):
        places = [(f"{pointer}/init_cfg/{position}", init) for position, init in enumerate(init_cfg)]
    else:
        places = [(f"{pointer}/init_cfg", init_cfg)] if init_cfg is not None else []
    refs = [
        WeightsRef(init.checkpoint, init.prefix, f"{place}/checkpoint")
        for place, init in places
        if isinstance(init, PretrainedInit)
    ]
    for ref in refs:
        if not ref.name:
            raise InvalidConfig(
                ref.pointer, "is empty: public configs leave it so for their users to fill in"
            )
    if checkpoint is not None and init_cfg is not None:
        raise InvalidConfig(f"{pointer}/checkpoint", "give init_cfg or checkpoint, not both")
    if checkpoint is not None:
        refs = [WeightsRef(checkpoint, pointer=f"{pointer}/checkpoint")]
    if len(refs) > 1:
        raise InvalidConfig(refs[1].pointer, "a second checkpoint; init_cfg takes one")
    return refs[0] if refs else None


class NetworkConfig(BaseModel):
    """A network as a client spells it. Unknown keys are refused; every number is bounded.

    `VIEW` names the fields that do not change the network and the names of its weights: configs that differ in
    nothing else share one model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    VIEW: ClassVar[frozenset[str]] = frozenset()

    type: str

    def architecture(self) -> dict[str, Any]:
        """The parameters that decide the network and the names of its weights, as plain JSON."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude=set(self.VIEW))
        return dumped

    def key(self) -> str:
        """A digest of `architecture()`; the same on every replica."""
        canonical = orjson.dumps(self.architecture(), option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(canonical).hexdigest()


class BackboneConfig(NetworkConfig):
    """A backbone: its `VIEW` is what says only which features are returned, what is frozen or loaded."""

    VIEW: ClassVar[frozenset[str]] = frozenset({"init_cfg", "checkpoint", "strides"})

    init_cfg: InitConfig | None = Field(
        None,
        description="Pretrained weights as OpenMMLab spells them; understood by every type. "
        "Other initialisers are accepted and mean no checkpoint.",
    )
    checkpoint: CheckpointName | None = Field(None, description="Short for init_cfg with this checkpoint.")
    strides: tuple[Stride, ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Ask for maps by stride instead of by index: [8, 16, 32].",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, detail in self.faults():
            raise InvalidConfig(f"#/backbone/{key}", detail)
        return self

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail); the first is reported."""
        yield from ()

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None means random ones from a seed of `key()`."""
        return pretrained_ref(self.init_cfg, self.checkpoint, pointer="#/backbone")

    def misreads(self, checkpoint: str) -> str | None:  # noqa: ARG002 - a family that can tell overrides this
        """Why a published checkpoint of this name would fit and yet compute something else; None if it does not."""
        return None

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:  # noqa: ARG002 - as above
        """Why a file with these tensors fits and yet computes something else; None if it does not, or nobody can tell.

        Args:
            library: whose names it has, empty where they are the network's own.
            checkpoint: its name.
            state: as read from the file.
        """
        return None

    def freeze(self) -> Freeze:
        """What the config freezes."""
        return Freeze()

    def input_defaults(self) -> PreprocessDefaults:
        """What the config's own pretrained weights ask of their images; empty where they do not say."""
        return PreprocessDefaults()

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: those of `strides` in their order, others in the order of their library.

        Raises:
            InvalidConfig: an index or a stride that the backbone has not.
        """
        if self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)

    @abstractmethod
    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels named by the type's own keys (`out_indices`, `return_nodes`, …)."""


def levels_by_index(
    indices: Sequence[int],
    features: Sequence[FeatureInfo],
    *,
    pointer: str = "#/backbone/out_indices",
    as_asked: bool = False,
) -> tuple[Level, ...]:
    """Levels for feature indices; a negative index counts from the end.

    They come shallow to deep, as OpenMMLab's and detrex's networks return them in whatever order they are asked for;
    or `as_asked`, in the order of the indices.
    """
    known = {feature.index: feature for feature in features}
    count = max(known) + 1
    levels = []
    for position, index in enumerate(indices):
        feature = known.get(index if index >= 0 else index + count)
        if feature is None:
            raise InvalidConfig(f"{pointer}/{position}", f"{index} is not an index of 0 to {count - 1}")
        levels.append(Level(feature.index, str(feature.index), feature.node))
    _refuse_twice([level.index for level in levels], pointer)
    return tuple(levels if as_asked else sorted(levels, key=lambda level: level.index))


def levels_by_stride(strides: Sequence[int], features: Sequence[FeatureInfo]) -> tuple[Level, ...]:
    """The deepest map of each stride, in the order asked."""
    deepest = {feature.stride: feature for feature in features if feature.stride is not None}
    levels = []
    for position, stride in enumerate(strides):
        feature = deepest.get(stride)
        if feature is None:
            has = ", ".join(str(known) for known in sorted(s for s in deepest if s is not None))
            detail = f"no map of stride {stride}; this backbone has {has or 'no maps'}"
            raise InvalidConfig(f"#/backbone/strides/{position}", detail)
        levels.append(Level(feature.index, str(feature.index), feature.node))
    _refuse_twice([level.index for level in levels], "#/backbone/strides")
    return tuple(levels)


def _refuse_twice(indices: Sequence[int], pointer: str) -> None:
    if len(set(indices)) != len(indices):
        raise InvalidConfig(pointer, f"an index is asked for twice: {list(indices)}")


class Backbone(nn.Module):
    """A network that gives named features.

    `features` lists what it can give, shallow to deep.
    """

    features: tuple[FeatureInfo, ...]

    @abstractmethod
    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Compute features.

        Args:
            images: [n, c, h, w], float, already normalised.
            nodes: which features, by `FeatureInfo.node` (or any node that the family's `levels` may name).

        Returns:
            one tensor a node: maps as [n, c, h, w], tokens as [n, l, c], vectors as [n, c].
        """

    def bound(self, nodes: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """`forward` for these nodes. What is looked up for them is looked up now, not by what traces the function."""
        return lambda images: self(images, nodes)

    @abstractmethod
    def frozen(self, freeze: Freeze) -> FreezeReport:
        """What `freeze` freezes of this network, by the rule of its library (parameter names as in checkpoints)."""

    def checkpoint_entries(self) -> Mapping[str, Tensor]:
        """The weights by the names that checkpoints of the network's library have for them."""
        return self.state_dict()

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - a family that can tell overrides this
        """Names of the weights that a node depends on; all of them, unless the family knows better."""
        return frozenset(self.state_dict())


def _no_names(_type: str) -> Sequence[str]:
    return ()


C = TypeVar("C", bound=BackboneConfig)


@dataclass(frozen=True)
class Family(Generic[C]):
    """One family of backbones: what a registry entry resolves to.

    Attributes:
        config: the class that validates a client's config. Validation gets the scope as written in its context
            (`{"scope": "mmcls"}`), for types whose defaults changed with their library's name.
        describe: features and input of an architecture. Must not allocate weights: read a table or build on the
            meta device. Slow answers are cached by the caller under `config.key()`.
        build: the network with freshly initialised weights, on the current default device; the caller has seeded
            the generator.
        load: the network with a checkpoint's tensors in it, strictly (see `service.checkpoints.load`).
        example: a config of the type given that works as it stands, for the documentation.
        architectures: the named architectures of the type given (`arch`, `depth`, …), for the documentation.
        naming: the names of its weights in other libraries, whose files are loaded too.
        key_library: whose names `load` takes: one of `naming`'s, or of any network's; its own where it is empty.
    """

    config: type[C]
    describe: Callable[[C], Description]
    build: Callable[[C], Backbone]
    load: Callable[[C, StateDict, WeightsRef], tuple[Backbone, LoadedKeys]]
    example: Callable[[str], Mapping[str, Any]]
    architectures: Callable[[str], Sequence[str]] = _no_names
    naming: Naming | None = None
    key_library: str = ""
