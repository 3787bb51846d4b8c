"""What hostile and careless clients send: each entry of `HOSTILE` makes another request every time."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from benchmarks.images import photo
from benchmarks.wire import json_message, multipart_message, raw_message

JPEG = "image/jpeg"
JSON = "application/json"
PHOTO = photo()
LARGE_PHOTO = photo((3000, 2000))
PROMISED = frozenset(
    (200, 304, 400, 401, 403, 404, 405, 406, 408, 413, 414, 415, 422, 429, 431, 502, 503, 504)
)
CONFIG = {"type": "timm.resnet18"}
TEXT = json.dumps(CONFIG)
counter = itertools.count()


def _raw(body: bytes, backbone: str = TEXT, media_type: str = JPEG, **query: str) -> bytes:
    return raw_message("/features", {"backbone": backbone, **query}, body, media_type, JSON)


def _config(config: Mapping[str, object]) -> bytes:
    return _raw(PHOTO, json.dumps(config))


def with_header(message: bytes, name: str, value: str) -> bytes:
    """A request with one more header."""
    line, _, rest = message.partition(b"\r\n")
    return b"\r\n".join([line, f"{name}: {value}".encode(), rest])


def with_key(message: bytes, key: str) -> bytes:
    """A request that says whose it is."""
    return with_header(message, "X-API-Key", key)


def _png_bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


@cache
def _chunked_without_end() -> bytes:
    head = raw_message("/features", {"backbone": TEXT}, b"", JPEG, JSON)
    head = head.replace(b"content-length: 0", b"transfer-encoding: chunked").replace(
        b"Content-Length: 0", b"Transfer-Encoding: chunked"
    )
    return head + (b"100000\r\n" + bytes(2**20) + b"\r\n") * 24


def _declared(length: int) -> bytes:
    """A request that promises more than it sends."""
    return _raw(PHOTO).replace(str(len(PHOTO)).encode(), str(length).encode(), 1)


HOSTILE: Mapping[str, Callable[[], bytes]] = {
    "truncated image": lambda: _raw(PHOTO[: random.randrange(20, len(PHOTO))]),
    "random bytes": lambda: _raw(random.randbytes(2000)),
    "pixel bomb": lambda: _raw(_png_bomb(), media_type="image/png"),
    "empty body": lambda: _raw(b""),
    "code as type": lambda: _config({"type": random.choice(["subprocess.Popen", "os.system", "eval"])}),
    "unknown type": lambda: _config({"type": f"mmdet.Nothing{next(counter)}"}),
    "deep JSON": lambda: _raw(PHOTO, '{"type":' * 3000 + "1" + "}" * 3000),
    "many levels": lambda: _config({**CONFIG, "out_indices": list(range(1000))}),
    "huge numbers": lambda: _config({"type": "ResNet", "depth": 10**300}),
    "path as config": lambda: _raw(PHOTO, "../../etc/passwd"),
    "path as checkpoint": lambda: _config({**CONFIG, "checkpoint": "../../../etc/passwd"}),
    "address as checkpoint": lambda: _config({**CONFIG, "checkpoint": "https://169.254.169.254/latest"}),
    "address as image": lambda: json_message(
        "/features", {"backbone": CONFIG, "images": [{"url": "http://169.254.169.254/latest"}]}, JSON
    ),
    "too many parts": lambda: multipart_message("/features", {"backbone": TEXT}, [b"x"] * 300, JSON),
    "unknown part": lambda: multipart_message("/features", {"backbone": TEXT, "evil": "1"}, [PHOTO], JSON),
    "objects in an array": lambda: _raw(_npy(np.array([{"a": 1}], object)), media_type="application/x-npy"),
    "not a number": lambda: _raw(
        _npy(np.full((1, 3, 224, 224), np.nan, np.float32)), media_type="application/x-npy"
    ),
    "wrong channels": lambda: _raw(
        _npy(np.zeros((1, 7, 64, 64), np.float32)), media_type="application/x-npy"
    ),
    "unknown reply": lambda: raw_message("/features", {"backbone": TEXT}, PHOTO, JPEG, "application/evil"),
    "unknown body": lambda: _raw(PHOTO, media_type="application/evil"),
    "wrong key": lambda: with_header(_raw(PHOTO), "X-API-Key", "not-one-of-your-keys-at-all"),
    "no such route": lambda: raw_message("/../admin", {}, b"", JPEG, JSON),
    "unload what is not theirs": lambda: b"DELETE /models/abc HTTP/1.1\r\nHost: h\r\n\r\n",
    "long header": lambda: with_header(_raw(PHOTO), "X-Long", "a" * 100_000),
    "odd request id": lambda: with_header(_raw(PHOTO), "X-Request-ID", "a b\tc;DROP"),
    "no request at all": lambda: random.randbytes(400),
    "body without end": _chunked_without_end,
    "ten gigabytes promised": lambda: _declared(10**10),
    "a reply beyond the limit": lambda: _raw(
        LARGE_PHOTO,
        json.dumps({"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]}),
        preprocess='{"mode": "native"}',
        **{"return": "tensors"},
    ),
    "another model every time": lambda: _config(
        {"type": "ResNet", "depth": 18, "base_channels": 8 + next(counter) % 3000, "out_indices": [3]}
    ),
}
ABANDONED: Mapping[str, Callable[[], bytes]] = {
    "left before the body ended": lambda: _raw(PHOTO)[: -len(PHOTO) // 2],
    "left before the answer": lambda: _raw(PHOTO),
    "promised more than it sent": lambda: _declared(len(PHOTO) + 100),
}
