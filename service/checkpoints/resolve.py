"""Where a checkpoint's name leads: to one regular file, with its digest, or to an error that says why not."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from rapidfuzz import fuzz, process

from service.checkpoints.download import Limits, Source, allowed_redirects, fetch, receipt_of
from service.checkpoints.flights import SingleFlight
from service.checkpoints.hub import (
    CONFIG_FILE,
    DEFAULT_ENDPOINT,
    USUAL_FILES,
    Hub,
    hub_folder,
    read_config,
)
from service.checkpoints.names import (
    DOWNLOAD_FOLDERS,
    EXTENSIONS,
    HUB_SCHEME,
    FileName,
    HubName,
    Name,
    RefusedNameError,
    UnknownFileError,
    UrlName,
    parse_name,
    shown,
)
from service.checkpoints.parts import sweep_parts
from service.checkpoints.published import NEAREST, NEAREST_SCORE
from service.checkpoints.transfers import Transfer
from service.config.spec import WeightsRef
from service.errors import CheckpointUnavailable, Draining
from service.files import open_regular

MAX_LISTED: Final = 5000
MAX_DIGESTS: Final = 4096
# A file that is written to again so soon after may keep its times, where clocks and file systems count coarsely.
RESTED_S: Final = 2.0

SourceKind = Literal["checkpoint", "hub", "url"]
Identity = tuple[str, int, int, int, int]
_KINDS: Final[Mapping[type[Name], SourceKind]] = {FileName: "checkpoint", HubName: "hub", UrlName: "url"}


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint that can be read.

    Attributes:
        path: the file; never shown to a client.
        sha256: of its bytes, 64 hex digits.
        source: a file of the checkpoint directory, of the hub, or of a host.
        name: as the client asked for it.
        size: in bytes.
        identity: path, inode, size, mtime and ctime in ns: changes when the file is replaced or written to.
        is_rested: whether the file had been left alone for so long that its identity tells its versions apart.
    """

    path: Path
    sha256: str
    source: SourceKind
    name: str
    size: int
    identity: Identity
    is_rested: bool


class CheckpointStore:
    """The checkpoint directory and the hosts that it may be filled from. Blocking; for worker threads.

    Fetched files are kept in `hub/` and `url/` below the directory. A name that has been fetched once is not
    asked for again, with or without a network: it stays what it is until the operator removes the file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        hosts: frozenset[str],
        mirrors: Mapping[str, str],
        max_bytes: int,
        connect_timeout_s: float,
        download_timeout_s: float,
        hub_endpoint: str = DEFAULT_ENDPOINT,
    ) -> None:
        self._directory = directory
        self._hosts = hosts
        self._mirrors = dict(mirrors)
        self._limits = Limits(max_bytes, connect_timeout_s, download_timeout_s)
        self._hub_host = urlsplit(hub_endpoint).hostname or ""
        self._hub_is_chosen = hub_endpoint != DEFAULT_ENDPOINT
        self._hub = Hub(self._mirrors.get(self._hub_host, hub_endpoint), hosts, self._limits)
        self._downloads: SingleFlight[Path, Path] = SingleFlight()
        self._digests = _Digests()
        self._settled: dict[str, CheckpointFile] = {}
        self._lock = Lock()
        self._transfers: dict[Path, Transfer] = {}
        self._fetched_bytes = 0
        self._is_stopped = False

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """The downloads under way, by the names that they were first asked for."""
        with self._lock:
            return tuple(self._transfers.values())

    @property
    def fetched_bytes(self) -> int:
        """Bytes of checkpoints that ever came over the network."""
        with self._lock:
            return self._fetched_bytes + sum(transfer.fetched for transfer in self._transfers.values())

    def stop(self) -> None:
        """End the downloads under way; their beginnings stay. A download that begins later is refused."""
        with self._lock:
            self._is_stopped = True
            for transfer in self._transfers.values():
                transfer.stop()

    def peek(self, ref: WeightsRef) -> CheckpointFile | None:
        """The file that `resolve` found for this name before, if it is still the same; costs one look at it."""
        known = self._settled.get(ref.name)
        if known is None:
            return None
        try:
            status = known.path.stat()
        except OSError:
            return None
        return known if _identity(known.path, status) == known.identity else None

    def at_hand(self, ref: WeightsRef) -> CheckpointFile | None:
        """The file that `resolve` would find without asking anybody, None if it must be fetched; reads all of it.

        Raises:
            CheckpointUnavailable: as `resolve`, where no network is needed to know.
        """
        try:
            parsed = parse_name(ref.name)
            path = self._kept(parsed)
            if path is None:
                return None
            return self._settle(ref.name, self._described(path, _KINDS[type(parsed)], ref.name))
        except RefusedNameError as error:
            raise CheckpointUnavailable(ref.pointer, error.detail) from error

    def resolve(self, ref: WeightsRef) -> CheckpointFile:
        """The file that a config's weights are in, fetched if need be.

        Raises:
            CheckpointUnavailable: no such file here or there, a host or a scheme that is not allowed.
            RemoteFailed, RemoteTimeout: the remote source failed or was too slow.
            Unavailable: the disk is full or cannot be written.
        """
        try:
            found = self._resolved(ref.name)
        except RefusedNameError as error:
            raise CheckpointUnavailable(ref.pointer, error.detail) from error
        return self._settle(ref.name, found)

    def _settle(self, name: str, found: CheckpointFile) -> CheckpointFile:
        if not found.is_rested:
            return found
        if len(self._settled) >= MAX_DIGESTS:
            self._settled.clear()
        self._settled[name] = found
        return found

    def hub_config(self, name: str, *, pointer: str = "#/backbone/model_name") -> dict[str, Any]:
        """The `config.json` (at most 1 MB) of a hub repository, `hf-hub:ORGANISATION/NAME[@REVISION]`.

        Raises:
            CheckpointUnavailable, RemoteFailed, RemoteTimeout, Unavailable: as `resolve`.
        """
        try:
            parsed = parse_name(name)
            if not isinstance(parsed, HubName):
                raise RefusedNameError(f"{shown(name)} is not a name of the hub ({HUB_SCHEME}…)")
            return read_config(self._hub_file(parsed, CONFIG_FILE, name), parsed)
        except RefusedNameError as error:
            raise CheckpointUnavailable(pointer, error.detail) from error

    def _resolved(self, name: str) -> CheckpointFile:
        parsed = parse_name(name)
        match parsed:
            case FileName():
                return self._described(self._local(parsed), "checkpoint", name)
            case HubName():
                return self._described(self._hub_checkpoint(parsed, name), "hub", name)
            case UrlName():
                return self._described(self._url_file(parsed, name), "url", name)

    def _kept(self, parsed: Name) -> Path | None:
        """The file of a name that needs no network, None if it has to be fetched."""
        match parsed:
            case FileName():
                return self._local(parsed)
            case HubName():
                self._check_hub()
                files = USUAL_FILES if parsed.file is None else (parsed.file,)
                places = [hub_folder(self._directory, parsed) / file for file in files]
            case UrlName():
                self._check_host(parsed.host)
                places = [self._url_place(parsed)]
        return next((place for place in places if self._is_whole(place)), None)

    def _described(self, path: Path, source: SourceKind, name: str) -> CheckpointFile:
        try:
            sha256, identity, is_rested = self._digests.of(path, self._limits.max_bytes)
        except _TooLongError as error:
            raise RefusedNameError(
                f"{shown(name)} is over the limit of {self._limits.max_bytes} bytes"
            ) from error
        except OSError as error:  # removed since, or not ours to read
            raise UnknownFileError(name) from error
        return CheckpointFile(path, sha256, source, name, identity[2], identity, is_rested)

    # --- files of the directory -----------------------------------------------------------------

    def _local(self, name: FileName) -> Path:
        path = _inside(self._directory, name)
        if path is None:
            raise self._unknown(name.name)
        return path

    def _unknown(self, name: str) -> RefusedNameError:
        """One text for what is outside and what is not there, so that it says nothing of the machine."""
        found = process.extract(
            name, _listed(self._directory), scorer=fuzz.WRatio, limit=NEAREST, score_cutoff=NEAREST_SCORE
        )
        nearest = ", ".join(choice for choice, _, _ in found if choice != name)  # which may be a pipe
        detail = UnknownFileError(name).detail
        return RefusedNameError(f"{detail}; nearest: {nearest}" if nearest else detail)

    # --- files from elsewhere -------------------------------------------------------------------

    def _hub_checkpoint(self, name: HubName, asked: str) -> Path:
        """The named file, or the usual one: a fetched one before asking which there are."""
        kept = self._kept(name)
        if kept is not None:
            return kept
        return self._hub_file(name, name.file or self._hub.usual_file(name), asked)

    def _hub_file(self, name: HubName, file: str, asked: str) -> Path:
        self._check_hub()
        target = hub_folder(self._directory, name) / file
        return self._fetched(target, asked, partial(self._hub.fetch, name, file, target))

    def _url_file(self, name: UrlName, asked: str) -> Path:
        self._check_host(name.host)
        target = self._url_place(name)
        work = partial(fetch, self._url_source(name), target, self._limits, None)
        return self._fetched(target, asked, work)

    def _url_place(self, name: UrlName) -> Path:
        return self._directory / "url" / name.key

    def _url_source(self, name: UrlName) -> Source:
        base = self._mirrors.get(name.host, f"https://{name.host}").rstrip("/")
        url = base + name.path
        return Source(name.name, url, allowed_redirects(self._hosts, url), name.digest)

    def _check_hub(self) -> None:
        """A hub that the operator has chosen is allowed, as a hub: its host is not one for URLs by that."""
        if not self._hub_is_chosen:
            self._check_host(self._hub_host)

    def _check_host(self, host: str) -> None:
        if host not in self._hosts:
            raise RefusedNameError(f"{host} is not a host that checkpoints are fetched from here")

    def _fetched(self, target: Path, asked: str, work: Callable[[Transfer], None]) -> Path:
        """The file at `target`; one thread fetches it, the others wait."""

        def once() -> Path:
            if not self._is_whole(target):
                with self._transfer(target, asked) as transfer:
                    work(transfer)
            return target

        return self._downloads.do(target, once)

    @contextmanager
    def _transfer(self, target: Path, asked: str) -> Iterator[Transfer]:
        """One download, listed while it is under way."""
        for folder in DOWNLOAD_FOLDERS:
            sweep_parts(self._directory / folder, self._limits.max_bytes)
        transfer = Transfer(asked)
        with self._lock:
            if self._is_stopped:
                raise Draining("no more checkpoints are fetched: the service is shutting down")
            self._transfers[target] = transfer
        try:
            yield transfer
        finally:
            with self._lock:
                del self._transfers[target]
                self._fetched_bytes += transfer.fetched

    def _is_whole(self, target: Path) -> bool:
        """Whether a fetched file still has the bytes that its receipt vouches for."""
        promised = receipt_of(target)
        try:
            return bool(promised) and self._digests.of(target, self._limits.max_bytes)[0] == promised
        except OSError:  # gone, or not a file that can be read: to be fetched again
            return False


class _TooLongError(OSError):
    """A file that is not read, for its length."""


class _Digests:
    """sha256 of files, remembered as long as path, inode, size and times stay."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: dict[Identity, str] = {}
        self._hashing: SingleFlight[Identity, str] = SingleFlight()

    def of(self, path: Path, max_bytes: int) -> tuple[str, Identity, bool]:
        """Digest and identity of a regular file of at most `max_bytes`, and whether it had rested before it was read.

        Raises:
            OSError: it cannot be read, is not a regular file, or is longer.
        """
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_size > max_bytes:
                raise _TooLongError
            identity = _identity(path, status)
            if not _is_rested(status):
                return hashlib.file_digest(file, "sha256").hexdigest(), identity, False
            with self._lock:
                known = self._known.get(identity)
            sha256 = known or self._hashing.do(identity, partial(self._hash, file, identity))
        return sha256, identity, True

    def _hash(self, file: BufferedReader, identity: Identity) -> str:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with self._lock:
            if len(self._known) >= MAX_DIGESTS:
                self._known.clear()
            self._known[identity] = sha256
        return sha256


def _identity(path: Path, status: os.stat_result) -> Identity:
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_rested(status: os.stat_result) -> bool:
    """Whether a file was left alone long enough for its times to tell its versions apart; future ones tell nothing."""
    return not 0 <= time.time() - status.st_ctime < RESTED_S


def _inside(directory: Path, name: FileName) -> Path | None:
    """The real path of a regular file below the directory, links followed; None for everything else."""
    try:
        root = directory.resolve(strict=True)
        path = root.joinpath(*name.parts).resolve(strict=True)
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError):  # not there, a name too long, a loop of links
        return None
    return path if regular and path.is_relative_to(root) else None


def _listed(directory: Path) -> list[str]:
    """Names that would resolve, for the nearest ones; at most `MAX_LISTED`."""
    names: list[str] = []
    for name in _walked(directory):
        names.append(name)
        if len(names) == MAX_LISTED:
            break
    return names


def _walked(directory: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        top = Path(folder) == directory
        folders[:] = sorted(
            f for f in folders if not f.startswith((".", "~")) and not (top and f in DOWNLOAD_FOLDERS)
        )
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS) and not file.startswith((".", "~")):
                yield (Path(folder) / file).relative_to(directory).as_posix()
