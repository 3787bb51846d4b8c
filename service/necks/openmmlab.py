"""What OpenMMLab's necks share: keys of their configs, what levels they take, the family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from service.backbones import building
from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, norm_fault
from service.checkpoints.load import load_strict
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import InvalidConfig
from service.necks.base import (
    POINTER,
    LevelFacts,
    Neck,
    NeckDescription,
    NeckFamily,
    WeightedNeckConfig,
    require_maps,
)

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

MAX_LEVELS = 16
Width = Annotated[int, Field(strict=True, ge=1, le=16384)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=MAX_LEVELS)]
NO_ACTIVATION = ActivationSpec("none")


class PlainConvConfig(BaseModel):
    """OpenMMLab's `conv_cfg`: only the plain convolution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv"]


def norm_spec(config: NormConfig | None) -> NormSpec | None:
    """The neutral spelling of a `norm_cfg` that may be null."""
    return None if config is None else config.spec()


def activation_spec(config: ActivationConfig | None) -> ActivationSpec:
    """The neutral spelling of an `act_cfg` that may be null."""
    return NO_ACTIVATION if config is None else config.spec()


class OpenMMLabNeckConfig(WeightedNeckConfig):
    """The keys that OpenMMLab's necks have in common. `NETWORK` names what scopes share."""

    NETWORK: ClassVar[str]

    conv_cfg: PlainConvConfig | None = Field(None, description="null is Conv2d.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, detail in self.faults():
            raise InvalidConfig(f"{POINTER}/{key}", detail)
        return self

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail); the first is reported."""
        yield from ()

    @abstractmethod
    def spec(self) -> Any:
        """The neutral spelling: a frozen dataclass that decides the numbers and the names of the weights."""

    @abstractmethod
    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that the neck does not take.

        Raises:
            InvalidConfig: they are not maps, or not so many, or not of these channels.
        """
        require_maps(levels, self.type)
        require_widths(self.takes(), levels)

    @abstractmethod
    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The levels that come out of these, which are what the neck takes."""

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training reads makes no second neck."""
        return {"type": self.NETWORK, **asdict(self.spec())}

    def norm_faults(self, norm: NormConfig | None, widths: Iterable[int]) -> Iterator[tuple[str, str]]:
        """What is wrong with a `norm_cfg` on layers of these widths."""
        fault = None if norm is None else norm_fault(norm, widths)
        if fault is not None:
            yield fault


def numbered(channels: Iterable[int], strides: Iterable[int | None]) -> tuple[LevelFacts, ...]:
    """Maps that are named by their place in what the neck gives."""
    pairs = zip(channels, strides, strict=True)
    return tuple(LevelFacts(i, str(i), "NCHW", width, stride) for i, (width, stride) in enumerate(pairs))


def doubled(strides: Sequence[int | None], more: int) -> list[int | None]:
    """Strides, and those of `more` levels above the last, each at half of the size before."""
    found = list(strides)
    for _ in range(more):
        found.append(None if found[-1] is None else found[-1] * 2)
    return found


def require_widths(
    taken: Sequence[int], levels: Sequence[LevelFacts], *, written: Sequence[int] | None = None
) -> None:
    """Refuse levels of other channels than the neck takes.

    Args:
        taken: the channels.
        written: the same as the config has them, where it means others by them.

    Raises:
        InvalidConfig: names what the backbone gives.
    """
    given = [level.channels for level in levels]
    if given == list(taken):
        return
    shown = str(list(taken)) if written is None else f"{list(written)}, widened to {list(taken)}"
    detail = f"the backbone gives {given}, the neck takes {shown}"
    raise InvalidConfig(f"{POINTER}/in_channels", detail)


C = TypeVar("C", bound=OpenMMLabNeckConfig)
N = TypeVar("N", bound=Neck)


def make_neck_family(
    config: type[C], network: Callable[[Any], N], *, example: Mapping[str, Any]
) -> NeckFamily[C]:
    """The family of a neck that is built from its config's `spec()`.

    Args:
        config: the spelling.
        network: makes the network of a spec.
        example: a config that works behind the maps of a ResNet-50, without its type.
    """

    def describe(given: C, levels: Sequence[LevelFacts]) -> NeckDescription:
        given.require(levels)
        size = building.size_of(_on_meta(given))
        return NeckDescription(given.outputs(levels), size.parameters, size.bytes)

    def build(given: C, levels: Sequence[LevelFacts]) -> N:
        given.require(levels)
        return building.initialised(lambda: network(given.spec()))

    def load(
        given: C, levels: Sequence[LevelFacts], state: StateDict, ref: WeightsRef
    ) -> tuple[N, LoadedKeys]:
        given.require(levels)
        made = building.unset(lambda: network(given.spec()))
        return made, load_strict(made, state, ref, part="neck")

    def _on_meta(given: C) -> nn.Module:
        return building.on_meta(lambda: network(given.spec()))

    return NeckFamily(
        config=config,
        describe=describe,
        build=build,
        load=load,
        example=lambda type_name: {"type": type_name, **example},
    )
