"""What a reply to `POST /features` says, as facts; the encoders turn it into bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["NCHW", "NLC", "NCL", "NC"]
FloatArray = npt.NDArray[np.floating[Any]]

# Elements that are looked at together: 2 MiB as float64, which stays in a core's cache.
STATS_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights come from and how the checkpoint's keys went into the network.

    `loaded` counts filled entries, `missing` and `unexpected` are keys, `prefix` is what they were rid of. `layout` is
    the library by whose names the file was read, where those are not the network's own.
    """

    source: str
    checkpoint: str | None = None
    sha256: str | None = None
    loaded: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    prefix: str = ""
    layout: str = ""

    def describe(self) -> dict[str, Any]:
        """Plain JSON; `prefix` only where one was stripped, `layout` only where names were translated."""
        described = dict(vars(self))
        for name in ("prefix", "layout"):
            if not described[name]:
                del described[name]
        return described


@dataclass(frozen=True)
class FrozenInfo:
    """How many of `of` parameters are frozen, and up to which stage as the config's library counts."""

    stages: int | None
    parameters: int
    of: int


@dataclass(frozen=True)
class NeckInfo:
    """The neck behind the model's backbone."""

    id: str
    type: str
    weights: WeightsInfo


@dataclass(frozen=True)
class ModelInfo:
    """The model that computed the reply; `neck` is left out where there is none."""

    id: str
    type: str
    device: str
    engine: str
    precision: str
    weights: WeightsInfo
    frozen: FrozenInfo
    neck: NeckInfo | None = None

    def describe(self) -> dict[str, Any]:
        """Plain JSON."""
        described = vars(self) | {"weights": self.weights.describe(), "frozen": dict(vars(self.frozen))}
        del described["neck"]
        if self.neck is not None:
            described["neck"] = vars(self.neck) | {"weights": self.neck.weights.describe()}
        return described


@dataclass(frozen=True)
class ImageInfo:
    """One image of the request, all in pixels.

    `width` and `height` are the image's own, upright; `input` and `valid` are [height, width] of what the
    network saw and of the part of it that is not padding.
    """

    width: int
    height: int
    format: str
    input: tuple[int, int]
    valid: tuple[int, int]


@dataclass(frozen=True)
class LevelArray:
    """One level: a float32 or float16 array, [n, c, h, w] (`NCHW`), [n, l, c] (`NLC`), [n, c, l] (`NCL`) or
    [n, c] (`NC`).

    `stride` is None where the layout is not `NCHW`.
    """

    index: int
    name: str
    layout: Layout
    stride: int | None
    channels: int
    array: FloatArray

    def describe(self) -> dict[str, Any]:
        """Plain JSON without the numbers."""
        return {
            "index": self.index,
            "name": self.name,
            "layout": self.layout,
            "stride": self.stride,
            "channels": self.channels,
            "shape": list(self.array.shape),
            "dtype": self.array.dtype.name,
        }


@dataclass(frozen=True)
class Timings:
    """How long each step took, in milliseconds. The JSON encoder fills in `encode` itself where it is 0."""

    load: float = 0.0
    decode: float = 0.0
    queue: float = 0.0
    forward: float = 0.0
    encode: float = 0.0

    def describe(self) -> dict[str, float]:
        """Plain JSON, to the microsecond."""
        return {name: round(value, 3) for name, value in vars(self).items()}


@dataclass(frozen=True)
class FeatureReply:
    """Everything that a reply says; `preprocess` is what was done to the images, left out where None."""

    model: ModelInfo
    images: tuple[ImageInfo, ...]
    levels: tuple[LevelArray, ...]
    timings: Timings = field(default_factory=Timings)
    preprocess: Mapping[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Plain JSON without numbers and without timings: the same request gives the same description."""
        described: dict[str, Any] = {
            "model": self.model.describe(),
            "images": [dict(vars(image)) for image in self.images],
            "levels": [level.describe() for level in self.levels],
        }
        if self.preprocess is not None:
            described["preprocess"] = dict(self.preprocess)
        return described


def level_stats(array: FloatArray) -> dict[str, float]:
    """Minimum, maximum, mean and population standard deviation over all elements, in float64.

    One pass over blocks that fit a cache; means and squared deviations of blocks are merged by the pairwise
    update of Chan, Golub and LeVeque (1979), so no float64 copy of the array is made and nothing cancels.

    Args:
        array: any shape, at least one element, finite.

    Raises:
        ValueError: the array is empty.
    """
    if array.size == 0:
        raise ValueError("an empty array has no statistics")
    flat = array.reshape(-1)
    count, mean, squares = 0, 0.0, 0.0
    lows, highs = [], []
    for start in range(0, flat.size, STATS_BLOCK_ELEMENTS):
        block = flat[start : start + STATS_BLOCK_ELEMENTS].astype(np.float64)
        lows.append(float(block.min()))
        highs.append(float(block.max()))
        block_mean = float(block.mean())
        np.subtract(block, block_mean, out=block)
        np.square(block, out=block)
        total = count + block.size
        delta = block_mean - mean
        squares += float(block.sum()) + delta * delta * count * block.size / total
        mean += delta * block.size / total
        count = total
    return {"min": min(lows), "max": max(highs), "mean": mean, "std": float(np.sqrt(squares / count))}
