"""Tables of biases of relative position, made for one window and brought to another when weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"
# [heads, side, side] and another side to [heads, side, side].
Resize = Callable[[Tensor, int], Tensor]
Floats = NDArray[np.float64]
DEGREE = 3


def fit_tables(state: StateDict, entries: int, resize: Resize, *, extra: int = 0) -> StateDict:
    """`state` with its tables resized to `entries` of which the last `extra` are no offsets, under whatever prefix.

    The index of a resized table is left out: it is that of another window. What is not the table of a square
    window, or too small, is left for the strict load to refuse.
    """
    side = math.isqrt(entries - extra)
    if side**2 != entries - extra:
        return state
    found = dict(state)
    for name in _others(state, entries, extra):
        table, own = state[name], math.isqrt(len(state[name]) - extra)
        offsets = table[: own**2].float().reshape(own, own, -1).permute(2, 0, 1)
        resized = resize(offsets, side).flatten(1).transpose(0, 1).to(table.dtype)
        found[name] = torch.cat((resized, table[own**2 :]))
        found.pop(name.removesuffix(TABLE) + INDEX, None)
    return found


def _others(state: StateDict, entries: int, extra: int) -> Iterator[str]:
    for name, table in state.items():
        if name.rpartition(".")[2] != TABLE or table.ndim != 2 or len(table) == entries:
            continue
        own = math.isqrt(max(len(table) - extra, 0))
        if own > DEGREE and own**2 + extra == len(table):
            yield name


def resize_bicubic(offsets: Tensor, side: int) -> Tensor:
    """mmdet's way, whose convolution of cubes takes the table for an image."""
    return F.interpolate(offsets[None], size=(side, side), mode="bicubic")[0]


def resize_progression(offsets: Tensor, side: int) -> Tensor:
    """mmpretrain's way, from BEiT (Bao et al., arXiv:2106.08254): a bicubic spline whose knots lie apart by a
    geometric progression, so that near offsets keep their resolution.
    """
    own = offsets.shape[-1]
    places = _progression(own // 2, side // 2)
    wanted = np.clip(np.arange(side, dtype=np.float64) - side // 2, places[0], places[-1])
    weights = torch.from_numpy(_spline(places, wanted) @ np.linalg.inv(_spline(places, places)))
    return (weights @ offsets.double() @ weights.T).float()


def _progression(count: int, reach: int) -> Floats:
    """Places of `count` offsets to either side of 0: sums of a geometric progression that ends at `reach`."""
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(count))
    return np.concatenate((-positive[::-1], [0.0], positive))


def _spline(places: Floats, at: Floats) -> Floats:
    """[len(at), len(places)]: the cubic B-splines of the interpolation through `places` (the second and the last
    but one are no knots), after Cox and de Boor.
    """
    knots = np.concatenate(([places[0]] * 4, places[2:-2], [places[-1]] * 4))
    starts, ends = knots[:-1], knots[1:]
    # The last span has its end in it.
    last = (starts < ends) & (ends == knots[-1])
    basis = ((at[:, None] >= starts) & (at[:, None] < ends)) | (last & (at[:, None] == knots[-1]))
    values: Floats = basis.astype(np.float64)
    for degree in range(1, DEGREE + 1):
        left, right = knots[: -degree - 1], knots[degree + 1 :]
        rising = _ratio(at[:, None] - left, knots[degree:-1] - left)
        falling = _ratio(right - at[:, None], right - knots[1:-degree])
        values = rising * values[:, :-1] + falling * values[:, 1:]
    return values


def _ratio(part: Floats, whole: Any) -> Floats:
    """0 where knots fall together."""
    shape = np.broadcast(part, whole).shape
    found: Floats = np.divide(part, whole, out=np.zeros(shape), where=np.broadcast_to(whole > 0, shape))
    return found
