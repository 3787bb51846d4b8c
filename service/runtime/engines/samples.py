"""What torch answered to real requests, kept for a moment to compare another engine with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from service.config.spec import Precision
from service.protocol.reply import FloatArray

MAX_SAMPLES = 2
MAX_SAMPLE_BYTES = 64 * 2**20
MAX_SIZES_NOTED = 64
SampleKey = tuple[tuple[int, int], Precision]


@dataclass(frozen=True)
class Sample:
    """One image of a request, [1, c, h, w], and the features that torch gave for it."""

    images: FloatArray
    features: Mapping[str, Tensor]
    precision: Precision

    @property
    def size(self) -> tuple[int, int]:
        """[height, width] of the input."""
        return self.images.shape[2], self.images.shape[3]


class Samples:
    """The last few answers of one model, of different sizes if there were any. The device's thread adds to it."""

    def __init__(self) -> None:
        self._by_size: dict[SampleKey, Sample] = {}
        self._batches: OrderedDict[SampleKey, set[int]] = OrderedDict()

    def offer(
        self, images: FloatArray | Tensor, features: Mapping[str, Tensor], precision: Precision
    ) -> None:
        """Keep the first image of a batch and its features, as copies: the batch may be large and is not ours."""
        key = (images.shape[2], images.shape[3]), precision
        self._note(key, len(images))
        size = images[:1].nbytes + sum(feature[:1].nbytes for feature in features.values())
        if key in self._by_size or size > MAX_SAMPLE_BYTES:
            return
        if len(self._by_size) >= MAX_SAMPLES:
            del self._by_size[next(iter(self._by_size))]
        kept = {node: feature[:1].detach().cpu().clone() for node, feature in features.items()}
        self._by_size[key] = Sample(_copied(images[:1]), kept, precision)

    def _note(self, key: SampleKey, images: int) -> None:
        self._batches.setdefault(key, set()).add(images)
        self._batches.move_to_end(key)
        while len(self._batches) > MAX_SIZES_NOTED:
            self._batches.popitem(last=False)

    def batches(self, size: tuple[int, int], precision: Precision) -> frozenset[int]:
        """How many images there were in the batches of a size, lately."""
        return frozenset(self._batches.get((size, precision), ()))

    def of(self, size: tuple[int, int], precision: Precision) -> Sample | None:
        """What was kept of a size."""
        return self._by_size.get((size, precision))

    def all(self) -> tuple[Sample, ...]:
        """What was kept."""
        return tuple(self._by_size.values())


def _copied(images: FloatArray | Tensor) -> FloatArray:
    return np.array(images.cpu() if isinstance(images, Tensor) else images)
