"""Python's collector of cycles, kept off what is never garbage.

A full collection walks over every object there is while no thread does anything else: the libraries alone are 450,000
objects and a fifth of a second. What was imported is there for good, so it is set aside (`gc.freeze`).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MANY_MODULES = 50
FULL = 2
_modules_set_aside = 0


@contextmanager
def importing() -> Iterator[None]:
    """No collections meanwhile: imports make no garbage, and to look for it takes time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def set_imports_aside() -> None:
    """Set aside what is in memory now, and what is imported later on once a full collection has met it."""
    _set_aside()
    if _after_collection not in gc.callbacks:
        gc.callbacks.append(_after_collection)


def _after_collection(phase: str, info: dict[str, Any]) -> None:
    """What survived a full collection is no garbage, so that hardly anything else is kept with the new modules."""
    if (
        phase == "stop"
        and info["generation"] == FULL
        and len(sys.modules) >= _modules_set_aside + MANY_MODULES
    ):
        _set_aside()


def _set_aside() -> None:
    global _modules_set_aside  # noqa: PLW0603 - as there is one collector
    _modules_set_aside = len(sys.modules)
    gc.freeze()
