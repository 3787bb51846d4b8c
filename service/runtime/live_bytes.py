"""What a forward pass holds at a time, and computes, counted on the meta device: nothing is allocated or computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from service.runtime.operations import products_of

# Sides that differ in no more than this many bits of their mantissa are counted as one: an eighth of a side at most.
MANTISSA_BITS = 4
# What a byte that is made takes beside the arithmetic for it: the way to memory and back, which is most of what layers
# without large products take (norms, activations, depthwise convolutions). 32 for a number of four bytes.
OPERATIONS_OF_A_BYTE = 8


@dataclass(frozen=True)
class PassCost:
    """One forward pass of one image: the most bytes that its tensors hold at a time, and its operations.

    A multiplication with an addition is two operations, and every byte made `OPERATIONS_OF_A_BYTE`.
    """

    bytes: int
    operations: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still live; `peak` is the most there were at a time.

    `products` counts multiplications, `made` all bytes ever made.

    A network on the meta device drops its tensors when it would drop real ones, so that the count is exact but for
    what kernels take for themselves.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.peak = self.products = self.made = 0
        self._now = 0
        self._bytes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's compiler, which nothing runs this under, is not to be imported: 150 MB and a second."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and count the memory that only its results are in."""
        del types  # torch hands them to every mode
        made = func(*args, **(kwargs or {}))
        self.products += products_of(func, made, args, kwargs or {})
        given = [tensor.untyped_storage() for tensor in _tensors((args, *(kwargs or {}).values()))]
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            # Views share one, which is one object as long as it lives. Weights are given and never made.
            if id(storage) not in self._bytes and not any(storage is other for other in given):
                self._count(storage)
        return made

    def _count(self, storage: UntypedStorage) -> None:
        key = id(storage)
        self._bytes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.made += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self._now -= self._bytes.pop(key)

    @property
    def cost(self) -> PassCost:
        """What was counted."""
        return PassCost(self.peak, 2 * self.products + OPERATIONS_OF_A_BYTE * self.made)


class CountRuled(TorchFunctionMode):
    """Counts products that are answered for by rule and are never dispatched; to be entered after the rules."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types  # torch hands them to every mode
        dispatched = self._live.products
        made = func(*args, **(kwargs or {}))
        if self._live.products == dispatched:
            self._live.products += products_of(func, made, args, kwargs or {})
        return made


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments or results, which may be in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def coarse(size: tuple[int, int]) -> tuple[int, int]:
    """[height, width] rounded up to a few bits, so that images of any size need few counts."""
    height, width = size
    return _rounded(height), _rounded(width)


def _rounded(side: int) -> int:
    step = 1 << max(0, side.bit_length() - MANTISSA_BITS)
    return -(-side // step) * step
