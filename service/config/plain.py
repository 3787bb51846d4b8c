"""What files may hold, however they are written: bounded trees of objects, lists, strings and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from service.config.python_files import Refused
from service.errors import InvalidConfig
from service.validation import pointer_to

MAX_VALUES = 20_000
MAX_NESTING = 32
# mmengine writes the file's own name and the environment's variables into these.
PREDEFINED = re.compile(r"\{\{\s*(?:file(?:Dirname|Basename|BasenameNoExtension|Extname)\b|\$)")


def bounded(data: Any, shown: str) -> Any:
    """A copy of what a file holds, in which nothing is shared; tuples stay tuples.

    A YAML anchor or a variable can stand for far more than its bytes: what it unfolds to is counted.

    Raises:
        InvalidConfig: it unfolds to more than 20,000 values or 32 levels.
    """
    left = iter(range(MAX_VALUES))

    def copied(value: Any, depth: int) -> Any:
        if next(left, None) is None or depth > MAX_NESTING:
            detail = f"{shown} unfolds to more than {MAX_VALUES:,} values or {MAX_NESTING} levels"
            raise InvalidConfig("#", detail)
        if isinstance(value, dict):
            whole = next((key for key in value if isinstance(key, Refused)), None)
            return whole or {key: copied(child, depth + 1) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([copied(child, depth + 1) for child in value])
        return value

    return copied(data, 1)


def as_json(value: Any, pointer: str) -> Any:
    """A part of a config as JSON has it: tuples become lists.

    Args:
        pointer: where the part is, for errors.

    Raises:
        InvalidConfig: something in it is not data, or not data of JSON.
    """
    if isinstance(value, Refused):
        raise value.error(pointer)
    if isinstance(value, Mapping):
        return dict(_members(value, pointer))
    if isinstance(value, (list, tuple)):
        return [as_json(child, pointer_to(pointer, position)) for position, child in enumerate(value)]
    if isinstance(value, str) and PREDEFINED.search(value):
        raise InvalidConfig(pointer, "predefined variables and those of the environment are not known here")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidConfig(pointer, "a number that is not finite")
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise InvalidConfig(pointer, f"{type(value).__name__} is not a type of a config's values")
    return value


def _members(value: Mapping[Any, Any], pointer: str) -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if not isinstance(key, str):
            raise InvalidConfig(pointer, "has a key that is not a string")
        yield key, as_json(child, pointer_to(pointer, key))
