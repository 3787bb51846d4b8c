"""What every neck has in common: the config class, the module, and the family that ties them.

A neck turns the levels that a backbone gives into other levels. A family is one file. It defines

- a `NeckConfig` (a `WeightedNeckConfig` where it has weights): the parameters it takes, typed and bounded;
- a `Neck`: the module, whose `forward` turns features into features;
- a `NeckFamily`: how the two belong together, and which levels come out of which.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import CheckpointName, InitConfig, NetworkConfig, pretrained_ref
from service.config.spec import Layout, LoadedKeys, WeightsRef
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

POINTER = "#/neck"


@dataclass(frozen=True)
class LevelFacts:
    """One level that goes into a neck or comes out of it.

    `stride` is the nominal reduction of a map in input pixels, None for tokens and vectors.
    """

    index: int
    name: str
    layout: Layout
    channels: int
    stride: int | None


@dataclass(frozen=True)
class NeckDescription:
    """What is known of a neck without its weights."""

    levels: tuple[LevelFacts, ...]
    parameters: int = 0
    bytes: int = 0


class NeckConfig(NetworkConfig):
    """A neck: its `VIEW` is what says only which weights are loaded."""

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None where there are none, or random ones from a seed of `key()`."""
        return None


class WeightedNeckConfig(NeckConfig):
    """A neck with weights of its own, under `neck.` in an OpenMMLab checkpoint (`init_cfg.prefix`)."""

    VIEW: ClassVar[frozenset[str]] = frozenset({"init_cfg", "checkpoint"})

    init_cfg: InitConfig | None = Field(None, description="Pretrained weights as OpenMMLab spells them.")
    checkpoint: CheckpointName | None = Field(None, description="Short for init_cfg with this checkpoint.")

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None means random ones from a seed of `key()`.

        Raises:
            InvalidConfig: two checkpoints are named.
        """
        return pretrained_ref(self.init_cfg, self.checkpoint, pointer=POINTER)


class Neck(nn.Module):
    """A network that turns features into features."""

    @abstractmethod
    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Compute the levels of the neck.

        Args:
            features: one tensor a level that goes in, in order; maps as [n, c, h, w].

        Returns:
            one tensor a level that comes out, in the order of `NeckFamily.describe`.
        """


C = TypeVar("C", bound=NeckConfig)


@dataclass(frozen=True)
class NeckFamily(Generic[C]):
    """One family of necks: what a registry entry resolves to.

    All of its functions but `example` take the levels that go in, in order.

    Attributes:
        config: the class that validates a client's config.
        describe: the levels that come out, and the size. Must not allocate weights; raises `InvalidConfig`
            where the levels that go in are not what the neck takes.
        build: the network with freshly initialised weights; the caller has seeded the generator.
        load: the network with a checkpoint's tensors in it, strictly (see `service.checkpoints.load`).
        example: a config of the type given that works as it stands, for the documentation.
    """

    config: type[C]
    describe: Callable[[C, Sequence[LevelFacts]], NeckDescription]
    build: Callable[[C, Sequence[LevelFacts]], Neck]
    load: Callable[[C, Sequence[LevelFacts], StateDict, WeightsRef], tuple[Neck, LoadedKeys]]
    example: Callable[[str], Mapping[str, Any]]


def require_maps(levels: Sequence[LevelFacts], type_name: str) -> None:
    """Refuse levels that are not maps.

    Raises:
        InvalidConfig: a level is tokens or a vector.
    """
    for level in levels:
        if level.layout != "NCHW":
            detail = f"{type_name} takes maps; level {level.name} is {KINDS[level.layout]} ({level.layout})"
            raise InvalidConfig(POINTER, detail)


KINDS: dict[Layout, str] = {"NCHW": "a map", "NLC": "tokens", "NCL": "tokens", "NC": "a vector"}
