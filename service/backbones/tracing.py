"""Sizes while torch traces a network: they are tensors then, whose arithmetic is recorded for images of any size.

What Python decides by such a size, or makes a number of, is recorded for the traced size alone. So networks reckon
with `//`, `%` and these functions, and leave out shortcuts for the size that they are made for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether torch traces the network that runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]  # torch's


def is_known(size: Sequence[int], made_for: Sequence[int]) -> bool:
    """Whether a size is the one that something is made for, and may stay as it is; False while tracing."""
    return not is_tracing() and tuple(size) == tuple(made_for)


def ceil_div(size: int, divisor: int) -> int:
    """A size over another, rounded up. Nothing negative is divided: OpenVINO's integers round towards 0."""
    return (size + divisor - 1) // divisor


def at_least_zero(size: int) -> int:
    """The size, or 0 where it is negative."""
    return size.clamp(min=0) if isinstance(size, Tensor) else max(size, 0)
