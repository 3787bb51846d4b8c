"""Which reply format an `Accept` header asks for (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from service.errors import NotAcceptable

JSON = "application/json"
NPZ = "application/x-npz"
NPY = "application/x-npy"
SAFETENSORS = "application/vnd.safetensors"
ARROW = "application/vnd.apache.arrow.stream"

# In the order of preference where a header leaves the choice; npy is last, for it holds one level.
MEDIA_TYPES = (JSON, NPZ, SAFETENSORS, ARROW, NPY)
ALIASES = {"application/x-safetensors": SAFETENSORS}

MAX_ACCEPT_CHARS = 8192

_TOKEN = r"[!#$%&'*+.^_`|~0-9a-z-]+"  # RFC 9110, section 5.6.2; the header is lowercased before  # noqa: S105
_WORD = re.compile(_TOKEN)
_RANGE = re.compile(rf"{_TOKEN}/{_TOKEN}")
_WEIGHT = re.compile(r"0(\.[0-9]*)?|1(\.0*)?")


@dataclass(frozen=True)
class MediaRange:
    """One element of an `Accept` header: `application/*;q=0.5`; `position` counts from the left."""

    name: str
    weight: float
    position: int

    def precision(self, media_type: str) -> int:
        """3 where it names the type, 2 for `application/*`, 1 for `*/*`, 0 where it does not match."""
        if ALIASES.get(self.name, self.name) == media_type:
            return 3
        if self.name == f"{media_type.partition('/')[0]}/*":
            return 2
        return 1 if self.name == "*/*" else 0


def negotiate(accept: str | None) -> str:
    """The media type to reply with: the highest weight, then the closest match, then the client's order.

    No header, an empty one and `*/*` mean JSON. Elements that are no media range, or whose weight is none,
    are ignored, and so are parameters: no format has any.

    Raises:
        NotAcceptable: nothing in the header is served; the detail lists what is.
    """
    if accept is None or not accept.strip(", \t"):
        return JSON
    ranges = parse_accept(accept)
    ranked = [(_rank(media_type, ranges), media_type) for media_type in MEDIA_TYPES]
    (weight, *_), chosen = max(ranked, key=lambda entry: entry[0])
    if weight <= 0.0:
        raise NotAcceptable(f"no reply format fits the Accept header; served are {', '.join(MEDIA_TYPES)}")
    return chosen


def _rank(media_type: str, ranges: list[MediaRange]) -> tuple[float, int, int]:
    """(weight, precision, minus position) of the closest range; on a tie `max` keeps the service's order."""
    matching = [(media.precision(media_type), -media.position, media.weight) for media in ranges]
    precision, position, weight = max(matching, default=(0, 0, 0.0))
    return (weight, precision, position) if precision else (0.0, 0, 0)


def parse_accept(accept: str) -> list[MediaRange]:
    """The media ranges of an `Accept` header in its order; what is no media range is left out.

    Raises:
        NotAcceptable: the header is longer than 8192 characters.
    """
    if len(accept) > MAX_ACCEPT_CHARS:
        raise NotAcceptable(
            f"the Accept header has {len(accept)} characters; the limit is {MAX_ACCEPT_CHARS}"
        )
    elements = _split(accept.lower(), ",")
    ranges = (_media_range(element, position) for position, element in enumerate(elements))
    return [media for media in ranges if media is not None]


def _media_range(element: str, position: int) -> MediaRange | None:
    name, weight = _weighted(element)
    if weight is None or not _RANGE.fullmatch(name):
        return None
    return MediaRange(name, weight, position)


def weighted_elements(header: str) -> Iterator[tuple[str, float]]:
    """Each word of a lowercased list with its weight, in order: `gzip;q=0.5, *`; what is no such thing is left out."""
    for element in _split(header, ","):
        name, weight = _weighted(element)
        if weight is not None and _WORD.fullmatch(name):
            yield name, weight


def _weighted(element: str) -> tuple[str, float | None]:
    name, *parameters = (part.strip(" \t") for part in _split(element, ";"))
    return name, _weight(parameters)


def _weight(parameters: list[str]) -> float | None:
    """The value of the first `q`; 1 without one, None where it is not a number of 0 to 1."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            value = value.strip()
            return float(value) if _WEIGHT.fullmatch(value) else None
    return 1.0


def _split(text: str, separator: str) -> Iterator[str]:
    """Split at a separator outside quoted strings, in one pass."""
    cuts = [-1, *_cuts(text, separator), len(text)] if '"' in text else None
    if cuts is None:
        yield from text.split(separator)
        return
    for before, after in pairwise(cuts):
        yield text[before + 1 : after]


def _cuts(text: str, separator: str) -> Iterator[int]:
    quoted = escaped = False
    for position, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == separator and not quoted:
            yield position
