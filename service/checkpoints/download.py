"""Fetch one file over HTTP: to a temporary file, bounded in bytes and in time, checked, then renamed.

Beside every fetched file lies a receipt (`FILE.json`) with its sha256: both together say that it is whole and
was what its source promised. A file without one is not used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import urljoin, urlsplit

import httpx
import orjson

from service.checkpoints.names import RefusedNameError
from service.errors import RemoteFailed, RemoteTimeout, ServiceError, Unavailable

MAX_REDIRECTS: Final = 3
STALL_S: Final = 15.0
MAX_RECEIPT_BYTES: Final = 4096
DISK_RETRY_AFTER_S: Final = 60.0
GONE: Final = frozenset({401, 403, 404, 410})
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
HUB_DELIVERY: Final = (".huggingface.co", ".hf.co")


@dataclass(frozen=True)
class Limits:
    """Bounds of one download: bytes, seconds to connect and to be answered, seconds in all."""

    max_bytes: int
    connect_timeout_s: float
    download_timeout_s: float


@dataclass(frozen=True)
class Source:
    """Where a file comes from.

    Attributes:
        name: what errors call it (`hf-hub:timm/resnet18.a1_in1k`).
        url: where it is really fetched, a mirror or not.
        redirects_to: whether a URL that the source leads on to may be followed.
        digest: the beginning of its sha256, empty where nothing is known.
    """

    name: str
    url: str
    redirects_to: Callable[[str], bool]
    digest: str = ""


@dataclass(frozen=True)
class Head:
    """What the source says of the file before sending it: its sha256 or empty, its bytes or None."""

    sha256: str
    size: int | None


def allowed_redirects(hosts: frozenset[str], url: str) -> Callable[[str], bool]:
    """Which URLs a source at `url` may lead on to: https at allowed hosts, or more of the same server.

    The hub delivers from hosts of its own domains, whose names change.
    """
    origin = urlsplit(url)
    delivery = HUB_DELIVERY if origin.hostname == "huggingface.co" else ()

    def redirects_to(target: str) -> bool:
        parts = urlsplit(target)
        if (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc):
            return True
        host = parts.hostname or ""
        known = host in hosts or host.endswith(delivery)
        return parts.scheme == "https" and known and parts.netloc.lower() == host

    return redirects_to


def fetch(source: Source, target: Path, limits: Limits, head: Head | None = None) -> None:
    """Download to `target` and write its receipt; on any failure neither is there.

    Raises:
        RefusedNameError: the source has no such file, or it is over `max_bytes`.
        RemoteFailed: not reachable, cut short, or not the bytes that it promised.
        RemoteTimeout: too slow.
        Unavailable: no room on the disk, or it cannot be written.
    """
    with _disk(source.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                sha256 = _download(source, file, limits, head)
            _check_digest(source, sha256, head)
            _keep(Path(partial), target, sha256)
        finally:
            Path(partial).unlink(missing_ok=True)


def head_of(source: Source, limits: Limits) -> Head:
    """What the source says of a file, within seconds.

    Raises:
        RefusedNameError, RemoteFailed, RemoteTimeout: as `fetch`.
    """
    deadline = time.monotonic() + limits.download_timeout_s
    with _remote(source.name), _client(limits.connect_timeout_s, limits.connect_timeout_s) as client:
        url = source.url
        told: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS + 1):
            _check_deadline(source.name, deadline)
            response = client.head(url)
            told |= {key: value for key, value in _told(response).items() if value}
            if not response.is_redirect or "sha256" in told:
                break
            url = _redirected(source, url, response)
        _check_status(source.name, response, redirect_is_fine="sha256" in told)
        return Head(told.get("sha256", ""), int(told["size"]) if "size" in told else None)


def receipt_of(path: Path) -> str:
    """The sha256 on the receipt of a fetched file, empty where there is none."""
    try:
        with _receipt(path).open("rb") as file:
            told = orjson.loads(file.read(MAX_RECEIPT_BYTES))
    except (OSError, orjson.JSONDecodeError):
        return ""
    return str(told.get("sha256", "")) if isinstance(told, dict) else ""


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _keep(partial: Path, target: Path, sha256: str) -> None:
    """Move the file to its place; the receipt comes last, so that it never vouches for another file."""
    receipt = _receipt(target)
    receipt.unlink(missing_ok=True)
    os.chmod(partial, 0o644)
    partial.replace(target)
    fresh = partial.with_name(partial.name + ".json")
    try:
        fresh.write_bytes(orjson.dumps({"sha256": sha256}))
        fresh.replace(receipt)
    finally:
        fresh.unlink(missing_ok=True)


def _download(source: Source, file: BinaryIO, limits: Limits, head: Head | None) -> str:
    """Stream the body into `file`; gives its sha256."""
    deadline = time.monotonic() + limits.download_timeout_s
    stall_s = min(STALL_S, limits.download_timeout_s)
    with (
        _remote(source.name),
        _client(limits.connect_timeout_s, stall_s) as client,
        _opened(client, source, deadline) as response,
    ):
        size = _announced(response.headers)
        if size is None and head is not None:
            size = head.size
        _check_size(source.name, size or 0, limits)
        return _copy(source.name, response, file, limits, deadline, size)


def _copy(
    name: str,
    response: httpx.Response,
    file: BinaryIO,
    limits: Limits,
    deadline: float,
    size: int | None,
) -> str:
    digest, received = hashlib.sha256(), 0
    for chunk in response.iter_raw():
        received += len(chunk)
        _check_size(name, received, limits)
        _check_deadline(name, deadline)
        digest.update(chunk)
        file.write(chunk)
    if size is not None and received != size:
        raise RemoteFailed(f"{name}: the download broke off after {received} of {size} bytes")
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _opened(client: httpx.Client, source: Source, deadline: float) -> Iterator[httpx.Response]:
    """The answer with the body, redirects followed one by one and each one checked."""
    url = source.url
    for _ in range(MAX_REDIRECTS + 1):
        _check_deadline(source.name, deadline)
        with client.stream("GET", url) as response:
            if not response.is_redirect:
                _check_status(source.name, response)
                yield response
                return
            url = _redirected(source, url, response)
    raise RemoteFailed(f"{source.name}: more than {MAX_REDIRECTS} redirects")


def _redirected(source: Source, url: str, response: httpx.Response) -> str:
    try:
        target: str = urljoin(url, str(response.headers.get("Location", "")))
        allowed = source.redirects_to(target)
    except ValueError as error:  # an address that is none
        raise RemoteFailed(f"{source.name}: leads to nothing that is an address") from error
    if not allowed:
        raise RemoteFailed(f"{source.name}: leads to a host that is not allowed")
    return target


def _client(connect_s: float, read_s: float) -> httpx.Client:
    # No proxies and no credentials of the environment: what may be reached is what the settings say.
    timeout = httpx.Timeout(read_s, connect=connect_s)
    return httpx.Client(
        timeout=timeout, trust_env=False, follow_redirects=False, headers={"Accept-Encoding": "identity"}
    )


def _told(response: httpx.Response) -> dict[str, str]:
    """sha256 and size of a hub's file: `X-Linked-*` are of the file behind a redirect."""
    headers = response.headers
    etag = headers.get("X-Linked-ETag") or headers.get("ETag") or ""
    digest = etag.removeprefix("W/").strip('"')
    own_size = "" if response.is_redirect else headers.get("Content-Length", "")
    size = headers.get("X-Linked-Size") or own_size
    is_sha256 = len(digest) == 64 and all(letter in "0123456789abcdef" for letter in digest)
    return {
        "sha256": digest if is_sha256 else "",
        "size": size if _is_count(size) else "",
    }


def _announced(headers: Mapping[str, str]) -> int | None:
    size = headers.get("Content-Length", "")
    return int(size) if _is_count(size) else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _check_status(name: str, response: httpx.Response, *, redirect_is_fine: bool = False) -> None:
    if response.status_code in GONE:
        raise RefusedNameError(f"{name}: there is no such public file")
    if response.is_redirect and redirect_is_fine:
        return
    if response.status_code != httpx.codes.OK or response.headers.get("Content-Encoding"):
        raise RemoteFailed(f"{name}: the remote host answered {response.status_code}")


def _check_size(name: str, size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise RefusedNameError(f"{name}: is over the limit of {limits.max_bytes} bytes")


def _check_deadline(name: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RemoteTimeout(f"{name}: the download took too long")


def _check_digest(source: Source, sha256: str, head: Head | None) -> None:
    promised = head.sha256 if head is not None else ""
    if not sha256.startswith(source.digest) or not sha256.startswith(promised):
        raise RemoteFailed(f"{source.name}: what came is damaged, its sha256 is not the promised one")


@contextmanager
def _remote(name: str) -> Iterator[None]:
    """Errors of the network in the service's words."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise RemoteTimeout(f"{name}: the remote host did not answer in time") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteFailed(f"{name}: the remote host could not be reached or broke off") from error


@contextmanager
def _disk(name: str) -> Iterator[None]:
    """Errors of the disk in the service's words."""
    try:
        yield
    except OSError as error:
        raise _disk_error(name, error) from error


def _disk_error(name: str, error: OSError) -> ServiceError:
    if error.errno in FULL:
        detail = f"{name}: there is no room to keep it"
    else:
        detail = f"{name}: the checkpoint directory cannot be written"
    return Unavailable(detail, retry_after_s=DISK_RETRY_AFTER_S)
