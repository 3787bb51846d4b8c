"""How a reply is compressed, and which coding an `Accept-Encoding` header asks for (RFC 9110, section 12.5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import zstandard
from isal import isal_zlib

from service.errors import NotAcceptable
from service.protocol.archive import Chunk
from service.protocol.negotiate import weighted_elements

IDENTITY, ZSTD, GZIP = "identity", "zstd", "gzip"
MAX_ACCEPT_ENCODING_CHARS = 1024
# Below it, the headers and a call cost more than what is saved.
MIN_COMPRESSED_BYTES = 1024

# Of four maps of ResNet-50 (6 MB) and of their JSON (12 MB), at 2.4 GHz: zstd -1 makes 1.5 and 1.6 times less at
# 1,200 and 440 MB/s, 1 makes 1.6 and 2.6 times less at 690 and 480, 3 no less than 1 at a third of the speed.
ZSTD_LEVEL = 1
# ISA-L's level 1 makes 1.6 and 2.5 times less at 650 and 390 MB/s, zlib's level 1 the same at 61 and 129.
GZIP_LEVEL = 1
_GZIP_WINDOW_BITS = (
    31  # 15, and 16 for gzip's header with a time of 0: the same bytes in make the same bytes out
)

_ALIASES = {"x-gzip": GZIP}  # RFC 9110, section 8.4.1.3
# On a tie; what a client calls `*` is first what every client can read.
_BY_NAME, _BY_STAR = (ZSTD, GZIP), (GZIP, ZSTD)


@dataclass(frozen=True)
class AcceptedCoding:
    """What a header asks for.

    `required` says that the client does not take a reply as it is; `is_habit` that the header is the list that HTTP
    libraries send unless told otherwise, which says what they can read rather than what their user wants.
    """

    name: str = IDENTITY
    required: bool = False
    is_habit: bool = False

    def pays(self, size_bytes: int) -> bool:
        """Whether to compress a body of this size."""
        return self.name != IDENTITY and (self.required or size_bytes >= MIN_COMPRESSED_BYTES)


AS_IT_IS = AcceptedCoding()


def accepted_coding(header: str | None) -> AcceptedCoding:
    """The coding of `CODINGS` with the highest weight, zstd before gzip; `AS_IT_IS` where identity weighs more.

    Elements that make no sense, and a header of more than 1,024 characters, are ignored: compressing is a favour.

    Raises:
        NotAcceptable: the header refuses every coding that is served, and the reply as it is.
    """
    if not header or len(header) > MAX_ACCEPT_ENCODING_CHARS:
        return AS_IT_IS
    return _accepted(header.lower())


@lru_cache(maxsize=256)
def _accepted(header: str) -> AcceptedCoding:
    weights: dict[str, float] = {}
    for name, weight in weighted_elements(header):
        weights.setdefault(_ALIASES.get(name, name), weight)
    chosen, weight = _heaviest(weights)
    identity = weights.get(IDENTITY, weights.get("*"))
    required = identity == 0.0
    if weight == 0.0 and required:
        raise NotAcceptable(f"the Accept-Encoding header refuses {', '.join(CODINGS)} and {IDENTITY}")
    if weight == 0.0 or weight < weights.get(IDENTITY, 0.0):
        return AS_IT_IS
    return AcceptedCoding(chosen, required, _is_habit(weights))


def _heaviest(weights: Mapping[str, float]) -> tuple[str, float]:
    """A coding that is served, and its weight: 0 where none is accepted."""
    named = [(name, weights[name]) for name in _BY_NAME if name in weights]
    starred = [(name, weights["*"]) for name in _BY_STAR if name not in weights and "*" in weights]
    return max([*named, *starred], key=lambda entry: entry[1], default=(IDENTITY, 0.0))


def _is_habit(weights: Mapping[str, float]) -> bool:
    """Whether it is `gzip, deflate` with whatever else, as requests, HTTPX, aiohttp and browsers send unasked."""
    names = list(weights)
    unweighted = all(weight == 1.0 for weight in weights.values())
    return unweighted and "deflate" in names and GZIP in names and names.index(GZIP) < names.index("deflate")


# --- compressing --------------------------------------------------------------------------------


class _Compressor(Protocol):
    def compress(self, data: Chunk, /) -> bytes: ...

    def flush(self) -> bytes: ...


def _zstd(size: int) -> _Compressor:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj(size=size)


def _gzip(_size: int) -> _Compressor:
    return isal_zlib.compressobj(GZIP_LEVEL, isal_zlib.DEFLATED, _GZIP_WINDOW_BITS)


CODINGS: Mapping[str, Callable[[int], _Compressor]] = {ZSTD: _zstd, GZIP: _gzip}


def compress(coding: str, chunks: Sequence[Chunk]) -> tuple[bytes, ...]:
    """The body in a coding of `CODINGS`, not put together; the interpreter is free meanwhile."""
    compressor = CODINGS[coding](sum(map(len, chunks)))
    return tuple(filter(None, _compressed(compressor, chunks)))


def _compressed(compressor: _Compressor, chunks: Sequence[Chunk]) -> Iterable[bytes]:
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()
