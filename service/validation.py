"""What pydantic refuses, in the service's words: JSON pointers of the request, never its values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from service.errors import Fault, InvalidConfig

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_FAULTS = 20
MAX_ENTRIES = 100  # of pydantic's that are looked at: a union gives several a place
MAX_KEY_CHARS = 64
MAX_KNOWN_KEYS = 40

# Pydantic puts the branch of a union into the location: `('depth', 'tuple[int, ...]', 1)`.
_PLAIN_BRANCHES = frozenset(
    ("str", "int", "float", "bool", "bytes", "none", "any", "dict", "list", "tuple", "set", "callable")
)
_NAMES_A_KEY = frozenset({"missing", "extra_forbidden"})


def pointer_to(base: str, *tokens: str | int) -> str:
    """A JSON pointer below `base`, `~` and `/` escaped (RFC 6901, section 3).

    A key longer than 64 characters is cut: a pointer shows where, it does not carry the payload back.
    """
    return "/".join((base, *(_token(token) for token in tokens)))


def _token(key: str | int) -> str:
    text = str(key)
    if len(text) > MAX_KEY_CHARS:
        text = text[: MAX_KEY_CHARS - 1] + "…"
    return text.replace("~", "~0").replace("/", "~1")


def invalid(error: ValidationError, pointer: str, known: Iterable[str] = ()) -> InvalidConfig:
    """The `InvalidConfig` for a pydantic error of the object at `pointer`.

    Args:
        error: what pydantic raised.
        pointer: where the validated object is in the request, `#` for the request itself.
        known: the keys that the object may have; the nearest of them are named beside an unknown one.
    """
    first, *more = faults_from(error, pointer, known)
    return InvalidConfig(first.pointer, first.detail, *more)


def faults_from(error: ValidationError, pointer: str, known: Iterable[str] = ()) -> list[Fault]:
    """At most 20 faults, one a pointer, in pydantic's order; branches of a union become alternatives."""
    keys = tuple(known)
    found: dict[tuple[str | int, ...], list[str]] = {}
    outer: set[tuple[str | int, ...]] = set()
    for entry in error.errors(include_url=False, include_input=False)[:MAX_ENTRIES]:
        path, in_union = _path(entry)
        details = found.setdefault(path, [])
        if (detail := _detail(entry, path, keys)) not in details:
            details.append(detail)
        if in_union or entry["type"] == "too_short":  # pydantic counts only the items that are valid
            outer.add(path)
    kept = _without_shadowed(found, outer)
    return [Fault(pointer_to(pointer, *path), ", or: ".join(found[path])) for path in kept[:MAX_FAULTS]]


def _path(entry: ErrorDetails) -> tuple[tuple[str | int, ...], bool]:
    """The location without the branches of unions, and whether there were any."""
    location = entry["loc"]
    last = len(location) - 1
    names_a_key = entry["type"] in _NAMES_A_KEY
    path = tuple(
        step
        for position, step in enumerate(location)
        if (names_a_key and position == last) or not _is_branch(step)
    )
    return path, len(path) < len(location)


def _is_branch(step: str | int) -> bool:
    """Whether pydantic wrote it and not the client; linear in its length, for it may be the client's."""
    if isinstance(step, int):
        return False
    is_model = step[:1].isupper() and not step.isupper() and step.isidentifier()
    is_generic = step.endswith("]") and "[" in step
    return is_model or is_generic or step in _PLAIN_BRANCHES or step.startswith("constrained-")


def _detail(entry: ErrorDetails, path: tuple[str | int, ...], known: Sequence[str]) -> str:
    kind = entry["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), known if len(path) == 1 else ())
    if kind == "union_tag_invalid":  # pydantic's own text carries the client's value
        context = entry.get("ctx", {})
        return f"{context.get('discriminator')} should be one of {context.get('expected_tags')}"
    return entry["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if not known:
        return "unknown key"
    if nearest := get_close_matches(key[:MAX_KEY_CHARS], known, n=3):
        return f"unknown key; nearest: {', '.join(nearest)}"
    return f"unknown key; known: {', '.join(known[:MAX_KNOWN_KEYS])}"


def _without_shadowed(
    found: Iterable[tuple[str | int, ...]], outer: set[tuple[str | int, ...]]
) -> list[tuple[str | int, ...]]:
    """Paths without those of `outer` (the other branches of a union) below which a fault was found too."""
    paths = list(found)
    above = {path[:length] for path in paths for length in range(len(path))}
    return [path for path in paths if path not in outer or path not in above]
