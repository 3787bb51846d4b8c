"""Fetch one file over HTTP: into a part, bounded in bytes and in time, checked, then renamed.

Beside every fetched file lies a receipt (`FILE.json`) with its sha256: both together say that it is whole and
was what its source promised. A file without one is not used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin, urlsplit

import orjson

from service.checkpoints.names import RefusedNameError
from service.checkpoints.parts import SUFFIX, Part, note_of, open_part
from service.checkpoints.transfers import Transfer, Watch
from service.errors import RemoteFailed, RemoteTimeout, ServiceError, Unavailable

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS: Final = 3
STALL_S: Final = 15.0
HEAD_S: Final = 15.0
# A transfer that breaks off is gone on with, this often less one.
ATTEMPTS: Final = 3
MAX_RECEIPT_BYTES: Final = 4096
DISK_RETRY_AFTER_S: Final = 60.0
GONE: Final = frozenset({401, 403, 404, 410})
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
ANSWERS_TO_RANGE: Final = frozenset({HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE})
CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
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


class _StartOverError(Exception):
    """The server does not go on with what is here, and how it said so."""


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


def fetch(
    source: Source,
    target: Path,
    limits: Limits,
    head: Head | None = None,
    transfer: Transfer | None = None,
) -> None:
    """Download to `target` and write its receipt; on any failure neither is there.

    What came before the remote host failed may stay, as a part that a later call goes on with.

    Raises:
        RefusedNameError: the source has no such file, or it is over `max_bytes`.
        RemoteFailed: not reachable, cut short, or not the bytes that it promised.
        RemoteTimeout: too slow.
        Unavailable: no room on the disk, or it cannot be written.
    """
    transfer = Transfer(source.name) if transfer is None else transfer
    with _disk(source.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_part(target) as part, Watch(limits.download_timeout_s) as watch:
            transfer.begin(watch)
            sha256 = _Download(source, part, limits, head, transfer, watch).run()
            part.sync()
            _keep(part, target, sha256)


def head_of(source: Source, limits: Limits) -> Head:
    """What the source says of a file, within seconds.

    Raises:
        RefusedNameError, RemoteFailed, RemoteTimeout: as `fetch`.
    """
    with (
        Watch(min(HEAD_S, limits.download_timeout_s)) as watch,
        _remote(source.name, watch),
        _client(limits.connect_timeout_s, limits.connect_timeout_s) as client,
    ):
        url = source.url
        told: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS + 1):
            watch.check(source.name)
            response = client.head(url, extensions={"trace": watch.trace})
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


def _keep(part: Part, target: Path, sha256: str) -> None:
    """Move the file to its place; the receipt comes last, so that it never vouches for another file."""
    receipt = _receipt(target)
    receipt.unlink(missing_ok=True)
    part.move_to(target)
    handle, fresh = tempfile.mkstemp(suffix=SUFFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(orjson.dumps({"sha256": sha256}))
        Path(fresh).replace(receipt)
    finally:
        Path(fresh).unlink(missing_ok=True)


@dataclass
class _Download:
    """One file on its way into a part, over at most `ATTEMPTS` connections."""

    source: Source
    part: Part
    limits: Limits
    head: Head | None
    transfer: Transfer
    watch: Watch

    def run(self) -> str:
        """Fetch what is missing; gives the sha256 of the whole."""
        name = self.source.name
        for left in reversed(range(ATTEMPTS)):
            began_at, fetched = self.part.size, self.transfer.fetched
            try:
                sha256 = self._attempt()
            except _StartOverError as error:
                self.part.restart(None)
                if not left:
                    raise RemoteFailed(str(error)) from error
                continue
            except (RemoteFailed, RemoteTimeout):
                # A host that sends nothing more is not asked again, nor is one that cannot go on with its file.
                is_stuck = self.part.note is None or self.transfer.fetched == fetched
                if not left or is_stuck or self.watch.is_over:
                    raise
                continue
            if self._is_promised(sha256):
                return sha256
            self.part.restart(None)
            if not began_at:  # all of it came now: it is not that the beginning was of another file
                break
        raise RemoteFailed(f"{name}: what came is damaged, its sha256 is not the promised one")

    def _is_promised(self, sha256: str) -> bool:
        return all(sha256.startswith(promised) for promised in self._promises())

    def _promises(self) -> tuple[str, str]:
        return self.source.digest, self.head.sha256 if self.head is not None else ""

    def _attempt(self) -> str:
        """Stream what is missing into the part; gives the sha256 of all of it."""
        stall_s = min(STALL_S, self.limits.download_timeout_s)
        with (
            _remote(self.source.name, self.watch),
            _client(self.limits.connect_timeout_s, stall_s) as client,
            _opened(client, self.source, self.watch, self._range()) as response,
        ):
            size = self._begun(response)
            self.transfer.received, self.transfer.total = self.part.size, size
            _check_size(self.source.name, size or 0, self.limits)
            return self._copied(response, size)

    def _range(self) -> dict[str, str]:
        """Headers that ask for what is missing of the very same file."""
        note, size = self.part.note, self.part.size
        if note is None or not size or note.url != self.source.url:
            return {}
        return {"Range": f"bytes={size}-", "If-Range": note.validator}

    def _begun(self, response: httpx.Response) -> int | None:
        """Make the part end where the answer begins; gives the bytes of the whole file or None."""
        if "Range" in response.request.headers and response.status_code in ANSWERS_TO_RANGE:
            return self._continued(response)
        _check_status(self.source.name, response)
        size = _announced(response.headers)
        if size is None and self.head is not None:
            size = self.head.size
        self.part.restart(note_of(self.source.url, response.headers, size))
        return size

    def _continued(self, response: httpx.Response) -> int:
        """The bytes of the whole file, if the answer is what is missing of it.

        Raises:
            _StartOverError: it is something else.
        """
        name, note = self.source.name, self.part.note
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != HTTPStatus.PARTIAL_CONTENT or found is None or note is None:
            raise _StartOverError(f"{name}: the remote host answered {response.status_code}")
        first, last = int(found[1]), int(found[2])
        size = last + 1 if found[3] == "*" else int(found[3])
        etag = response.headers.get("ETag", "")
        is_same = note.size in (None, size) and (not note.is_etag or etag in ("", note.validator))
        if first != self.part.size or last + 1 != size or not is_same or _is_compressed(response):
            raise _StartOverError(f"{name}: the remote host sent another part than it was asked for")
        return size

    def _copied(self, response: httpx.Response, size: int | None) -> str:
        name, digest = self.source.name, hashlib.sha256()
        for chunk in self.part.chunks():
            digest.update(chunk)
        for chunk in response.iter_raw():
            _check_size(name, self.part.size + len(chunk), self.limits)
            self.watch.check(name)
            digest.update(chunk)
            self.part.write(chunk)
            self.transfer.came(len(chunk))
        self.watch.check(name)
        if size is not None and self.part.size != size:
            raise RemoteFailed(f"{name}: the download broke off after {self.part.size} of {size} bytes")
        if size is None and not _has_end(response) and not any(self._promises()):
            raise RemoteFailed(f"{name}: the remote host does not say how long the file is")
        return digest.hexdigest()


def _has_end(response: httpx.Response) -> bool:
    """Whether the body says where it ends; else a connection that breaks off looks like the end."""
    return "chunked" in response.headers.get("Transfer-Encoding", "").lower()


@contextmanager
def _opened(
    client: httpx.Client, source: Source, watch: Watch, headers: Mapping[str, str]
) -> Iterator[httpx.Response]:
    """The answer with the body, redirects followed one by one and each one checked."""
    url = source.url
    for _ in range(MAX_REDIRECTS + 1):
        watch.check(source.name)
        with client.stream("GET", url, headers=headers, extensions={"trace": watch.trace}) as response:
            if not response.is_redirect:
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
    import httpx  # takes longer than everything else here together, and most services fetch nothing

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
    if response.status_code != HTTPStatus.OK:
        raise RemoteFailed(f"{name}: the remote host answered {response.status_code}")
    if _is_compressed(response):
        raise RemoteFailed(f"{name}: the remote host sent it compressed, and was asked not to")


def _is_compressed(response: httpx.Response) -> bool:
    encoding: str = response.headers.get("Content-Encoding", "identity")
    return encoding.lower() != "identity"


def _check_size(name: str, size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise RefusedNameError(f"{name}: is over the limit of {limits.max_bytes} bytes")


@contextmanager
def _remote(name: str, watch: Watch) -> Iterator[None]:
    """Errors of the network in the service's words."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        raise RemoteTimeout(f"{name}: the remote host did not answer in time") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        watch.check(name)
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
