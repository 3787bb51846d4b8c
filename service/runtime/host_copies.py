"""Levels on their way from the device to the host."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from service.errors import NonFiniteLevel
from service.protocol.reply import FloatArray

# The smallest number that rounds to infinity in float16.
FLOAT16_OVERFLOW = 65520.0


class HostCopy:
    """One level, copied to the host. From a CUDA device it comes by pinned memory, which the reply is written from.

    Args:
        feature: the level, on any device, float32.
        dtype: of the copy; the device narrows it, so that half as much crosses the bus.
    """

    def __init__(self, feature: Tensor, dtype: Literal["float32", "float16"], name: str) -> None:
        self._feature = feature
        self._name = name
        narrows = dtype == "float16"
        # NaN and infinity stay in a sum, which takes a thirtieth of the time of looking at every number.
        self._limits = _begun(torch.stack(feature.aminmax()) if narrows else feature.sum())
        self._largest = FLOAT16_OVERFLOW if narrows else math.inf
        self._values = _begun((feature.half() if narrows else feature).contiguous())

    def array(self) -> FloatArray:
        """The level as a contiguous array. Ask after `wait_for_copies`.

        Raises:
            NonFiniteLevel: NaN or infinity, or a number that float16 cannot hold.
        """
        if not bool((self._limits.abs() < self._largest).all()):  # nor is it for NaN
            self._refuse()
        array: FloatArray = self._values.numpy()
        return array

    def _refuse(self) -> None:
        """Say what is wrong; nothing is where only the sum itself overflowed."""
        if not torch.isfinite(self._feature).all():
            raise NonFiniteLevel(f"level {self._name} holds NaN or infinity")
        if self._values.dtype == torch.float16:
            detail = f"level {self._name} goes beyond what float16 holds (65504); ask for float32"
            raise NonFiniteLevel(detail)


def wait_for_copies(device: torch.device) -> None:
    """Return when all copies that this thread began are there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _begun(values: Tensor) -> Tensor:
    """The values in the memory of the host: at once, or from a CUDA device some time after."""
    if values.device.type != "cuda":
        return values.cpu()
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)
