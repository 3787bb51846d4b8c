"""EVA (Fang et al., arXiv:2211.07636) as a detector's backbone, with detrex's key names.

It is detectron2's plain ViT with BEiT's biases and scaled residuals. EVA-02 is in `eva02`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones import detectron2_vit
from service.backbones.detectron2_configs import Fault
from service.backbones.detectron2_vit import Block, ViT, ViTConfig, ViTSpec
from service.backbones.freezing import freeze_report
from service.backbones.openmmlab import Scale, make_family
from service.backbones.vitdet_layers import Attention, Size
from service.config.spec import Freeze, FreezeReport
from service.errors import InvalidConfig

MIN_SPLINE_POINTS = 4
MAX_SPLINE_SIDE = 256
# BEiT's distances between the rows of a table that is resampled grow by this factor, away from its middle.
DISTANCE_GROWTH = 1.0903078
Interpolation = Literal["vitdet", "beit"]


@dataclass(frozen=True)
class EvaSpec(ViTSpec):
    """What else decides the numbers and the names of the weights.

    `partial_bias` is whether queries and values have biases and keys none. `scaled` residuals have a factor a channel.
    """

    partial_bias: bool = True
    scaled: bool = False
    interpolation: Interpolation = "vitdet"


# --- BEiT's resampling of relative positions ------------------------------------------------------


def table_places(length: int) -> Tensor:
    """[length], float64: where the rows of a table of relative positions lie, by BEiT's rule."""
    distances = [1.0]
    for step in range(1, length // 2):
        distances.append(distances[-1] + DISTANCE_GROWTH**step)
    return torch.tensor(
        [-distance for distance in reversed(distances)] + [0.0, *distances], dtype=torch.float64
    )


def spline_weights(places: Tensor, targets: Tensor) -> Tensor:
    """[targets, places]: what a cubic spline through values at `places` takes of each at `targets`.

    The spline is the not-a-knot one, from the tridiagonal system of its second derivatives; beyond the ends its last
    pieces go on.
    """
    count = len(places)
    steps = places.diff()
    derivatives, right = torch.zeros(2, count, count, dtype=torch.float64)
    before, after, row = steps[:-1], steps[1:], torch.arange(1, count - 1)
    for column, of_curvature, of_value in (
        (row - 1, before, 6 / before),
        (row, 2 * (before + after), -6 / before - 6 / after),
        (row + 1, after, 6 / after),
    ):
        derivatives[row, column] = of_curvature
        right[row, column] = of_value
    derivatives[0, :3] = torch.stack((steps[1], -steps[0] - steps[1], steps[0]))
    derivatives[-1, -3:] = torch.stack((steps[-1], -steps[-2] - steps[-1], steps[-2]))
    curvature = torch.linalg.solve(derivatives, right)
    piece = (torch.searchsorted(places, targets, right=True) - 1).clamp(0, count - 2)
    step = steps[piece][:, None]
    left_part = (places[piece + 1] - targets)[:, None] / step
    right_part = 1 - left_part
    values = torch.eye(count, dtype=torch.float64)
    bend = step**2 / 6
    weights: Tensor = (
        left_part * values[piece]
        + right_part * values[piece + 1]
        + bend * (left_part**3 - left_part) * curvature[piece]
        + bend * (right_part**3 - right_part) * curvature[piece + 1]
    )
    return weights


@lru_cache(maxsize=4)
def resampling(length: int, target: int) -> Tensor:
    """[target, length], float32: BEiT's resampling of a table of relative positions.

    Raises:
        InvalidConfig: the table has too few rows for a cubic spline.
    """
    if length < MIN_SPLINE_POINTS:
        detail = f"beit cannot resample a table of {length} positions; set vitdet, or a larger img_size"
        raise InvalidConfig("#/backbone/interp_type", detail)
    reach = target // 2
    with torch.device("cpu"), torch.inference_mode(mode=False):
        targets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        return spline_weights(table_places(length), targets).float()


# --- the network ----------------------------------------------------------------------------------


class EvaAttention(Attention):
    """Self-attention of a map; keys of `Attention`, and `q_bias`, `v_bias`."""

    def __init__(self, spec: EvaSpec, made_for: Size | None) -> None:
        super().__init__(spec.width, spec.heads, qkv_bias=spec.qkv_bias, made_for=made_for)
        self.interpolation = spec.interpolation
        self.q_bias = nn.Parameter(torch.empty(spec.width)) if spec.partial_bias else None
        self.v_bias = nn.Parameter(torch.empty(spec.width)) if spec.partial_bias else None

    def start(self) -> None:
        """All places alike, and no biases, at first."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def joint(self, maps: Tensor) -> Tensor:
        """Queries, keys and values of [n, h, w, c], [n, h, w, 3c]."""
        if self.q_bias is None or self.v_bias is None:
            return super().joint(maps)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(maps, self.qkv.weight, bias)

    def tables_for(self, size: Size) -> tuple[Tensor, Tensor] | None:
        """The tables for a map of this size."""
        tables = self.tables()
        if tables is None or self.interpolation != "beit":
            return tables
        return resampled(tables[0], size[0]), resampled(tables[1], size[1])


def resampled(table: Tensor, side: int) -> Tensor:
    """A table of relative positions for another side of a map, as BEiT resamples it."""
    target = 2 * side - 1
    if table.shape[0] == target:
        return table
    weights: Tensor = resampling(table.shape[0], target).to(table)
    return weights @ table


class EvaBlock(Block, Scale):
    """Keys of `Block`, and `gamma_1`, `gamma_2`."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, spec: EvaSpec, index: int) -> None:
        super().__init__(spec, index)
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.empty(spec.width)) if spec.scaled else None)

    def make_attention(self, spec: ViTSpec, index: int, made_for: Size | None) -> nn.Module:  # noqa: ARG002 - of any block
        """`attn`."""
        assert isinstance(spec, EvaSpec)
        return EvaAttention(spec, made_for)

    def start(self) -> None:
        """The residual branches begin unscaled."""
        for parameter in self.parameters(recurse=False):
            nn.init.ones_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        if self.gamma_1 is None or self.gamma_2 is None:
            return super().forward(maps)
        maps = maps + self.gamma_1 * self.attended(self.norm1(maps))
        mixed: Tensor = maps + self.gamma_2 * self.mlp(self.norm2(maps))
        if self.residual is not None:
            mixed = self.residual(mixed)
        return mixed


class EVA(ViT):
    """Keys of `ViT`."""

    def make_block(self, spec: ViTSpec, index: int) -> nn.Module:
        """One of `blocks`."""
        assert isinstance(spec, EvaSpec)
        return EvaBlock(spec, index)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """The patches, where they are frozen."""
        return freeze_report(self, freeze, ["patch_embed"] if freeze.stages else [])


# --- detrex.EVAViT --------------------------------------------------------------------------------


class EvaConfig(ViTConfig):
    """`detrex.EVAViT`."""

    NETWORK: ClassVar[str] = "detrex.EVAViT"

    beit_like_qkv_bias: StrictBool = Field(
        True, description="Biases of query and value only, instead of qkv_bias."
    )
    beit_like_gamma: StrictBool = Field(False, description="Scaled residuals.")
    freeze_patch_embed: StrictBool = False
    interp_type: Interpolation = Field(
        "vitdet", description="How relative positions are resized to the image: linearly, or as BEiT does."
    )

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        side = self.img_size // self.patch_size
        if self.use_rel_pos and self.interp_type == "beit" and side > MAX_SPLINE_SIDE:
            yield "interp_type", f"beit for {side} patches a side; the limit is {MAX_SPLINE_SIDE}"

    def freeze(self) -> Freeze:
        """`freeze_patch_embed`."""
        return Freeze(1 if self.freeze_patch_embed else None)

    def spec(self) -> EvaSpec:
        """The neutral spelling."""
        own = {
            "qkv_bias": self.qkv_bias and not self.beit_like_qkv_bias,
            "partial_bias": self.beit_like_qkv_bias,
            "scaled": self.beit_like_gamma,
            "interpolation": self.interp_type if self.use_rel_pos else "vitdet",
        }
        return EvaSpec(**{**vars(super().spec()), **own})


EXAMPLE: dict[str, Any] = {**detectron2_vit.EXAMPLE, "beit_like_qkv_bias": True}
EVA_FAMILY = make_family(EvaConfig, EVA, example=EXAMPLE)
