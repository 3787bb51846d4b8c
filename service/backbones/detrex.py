"""What detrex's own backbones share: levels named `p0`, `p1`, …, stages counted from 0, layer norms by their path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.backbones.base import levels_by_index
from service.backbones.lazyconfig import short_class
from service.backbones.norms import Eps
from service.backbones.openmmlab import SpecConfig
from service.backbones.output_norms import may_lack_output_norms
from service.config.spec import Description, Freeze, Level

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# The library takes negative ones too, and then gives nothing for them.
StageIndex = Annotated[int, Field(strict=True, ge=0, le=63)]
StageIndices = Annotated[tuple[StageIndex, ...], Field(min_length=1, max_length=16)]
Blocks = Annotated[int, Field(strict=True, ge=1, le=64)]
Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
MlpRatio = Annotated[float, Field(gt=0, le=16)]


class StagesConfig(SpecConfig):
    """A backbone of stages that each may give a map, named `p` and the stage's index."""

    out_indices: StageIndices = Field((0, 1, 2, 3), description="Stages, 0 at stride 4, named p0, p1, …")

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named `p1` and so on."""
        found = super().levels(description)
        return tuple(Level(level.index, f"p{level.index}", level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The stages of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def freeze_of(frozen_stages: int) -> Freeze:
    """What `frozen_stages` freezes; nothing below 0."""
    return Freeze(frozen_stages if frozen_stages >= 0 else None)


def without_output_norms(config: StagesConfig, state: StateDict) -> Callable[[str], bool]:  # noqa: ARG001 - of any config
    """A classifier's file has none of the norms `norm0`, `norm1`, …: detrex leaves them at 1 and 0 then."""
    return may_lack_output_norms(state, last=None)


# --- norm_layer -----------------------------------------------------------------------------------

LayerNormPath = Annotated[Literal["LayerNorm"], BeforeValidator(short_class)]


class LayerNormPartial(BaseModel):
    """A layer norm with its epsilon, as a LazyConfig has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: LayerNormPath = Field(alias="_target_")
    partial: Literal[True] = Field(True, alias="_partial_")
    eps: Eps = 1e-5


NormLayer = LayerNormPath | LayerNormPartial


def epsilon_of(norm_layer: str | LayerNormPartial) -> float:
    """The epsilon of a `norm_layer`; a class without one has torch's."""
    return norm_layer.eps if isinstance(norm_layer, LayerNormPartial) else 1e-5
