"""Memory that could not be had: how libraries say so, and what requests are told."""

from __future__ import annotations

import traceback

from service.errors import OutOfMemory

RETRY_AFTER_S = 5.0
# torch's allocators for the CPU and for CUDA, oneDNN, OpenVINO, and the C++ library.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a memory",
    "bad_alloc",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory could not be had; only its text tells some of them from others."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def as_shortage(error: BaseException) -> OutOfMemory:
    """What a request is told. What the failed attempt held is let go: its frames keep it alive as long as the error."""
    traceback.clear_frames(error.__traceback__)
    return OutOfMemory("the machine has no memory left for this request", retry_after_s=RETRY_AFTER_S)
