"""Converted networks on disk: what conversion found out, the network itself, and which request it may serve."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import orjson

from service.config.spec import LoadedKeys
from service.errors import Unavailable
from service.runtime.engines.openvino_engine import OpenVINOEngine
from service.version import service_version

Outcome = Literal["converted", "refused", "failed"]
ENGINE_LIBRARIES = ("openvino", "torch", "timm", "torchvision", "numpy")
FACTS_SUFFIX = ".json"
SUFFIXES = (FACTS_SUFFIX, ".xml", ".bin")
# An engine that takes longer than torch, by this much over the noise, is slower.
SLOWEST = 1.05
LEFTOVER_S = 24 * 3600.0
NO_ROOM = "there is no room to keep the converted network, or it cannot be written"
# What the `.xml` and the facts of a network take, about; the largest has some megabytes.
DESCRIPTION_BYTES = 1_000_000
WORKPLACE = ".making-"
LOCK = "lock"
log = logging.getLogger("service.engines")


def engine_versions() -> str:
    """The versions that decide what a converted network is."""
    return " ".join([service_version(), *(f"{name}={version(name)}" for name in ENGINE_LIBRARIES)])


@dataclass(frozen=True)
class Facts:
    """What conversion found out about one network.

    Attributes:
        model_id: the network and its weights.
        versions: as `engine_versions` when it was made.
        outcome: whether there is a converted network; `reason` says why not. What failed may succeed another time and
            is not kept, such as a checkpoint that could not be read.
        nodes: its outputs, shallow to deep.
        size: the one [height, width] that it takes; None if it takes what torch takes.
        divisor: of both sides of its input.
        errors: relative L2 distance from torch for each node, the worst of all inputs that were tried.
        cpu_ms: of one image on one core, by engine.
        keys: how the checkpoint went into the network.
        missing: for each node the weights that it needs and the checkpoint has not.
        sha256: of the network's files, as `network_sha256` gives it; empty for a refusal.
        compared: whether it was compared on requests of real clients too.
    """

    model_id: str
    versions: str
    outcome: Outcome
    reason: str = ""
    nodes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    divisor: int = 1
    errors: Mapping[str, float] = field(default_factory=dict)
    cpu_ms: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    keys: LoadedKeys = field(default_factory=lambda: LoadedKeys(0))
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sha256: str = ""
    compared: bool = False

    @property
    def slowness(self) -> str:
        """That the network is slower than torch, in words; empty if it is not."""
        converted, torch = self.cpu_ms.get("openvino", 0.0), self.cpu_ms.get("torch", 0.0)
        if converted <= torch * SLOWEST:
            return ""
        return f"it is slower here: {converted:.1f} ms against torch's {torch:.1f}"

    def serves(self, nodes: Sequence[str], size: tuple[int, int]) -> bool:
        """Whether the converted network may answer for these features at this [height, width]."""
        if self.outcome != "converted" or not set(nodes) <= set(self.nodes):
            return False
        return self.size in (None, size) and not any(side % self.divisor for side in size)

    def covers(self, nodes: Sequence[str], size: tuple[int, int]) -> bool:
        """Whether it is known already what comes of converting for these: a network, or a refusal."""
        return self.serves(nodes, size) or (self.outcome == "refused" and self.size in (None, size))

    @classmethod
    def from_json(cls, text: bytes) -> Facts:
        """The facts as `to_json` wrote them.

        Raises:
            ValueError, TypeError, KeyError: not such a file.
        """
        known = orjson.loads(text)
        keys = known.pop("keys")
        size = known.pop("size")
        return cls(
            **{**known, "nodes": tuple(known["nodes"])},
            keys=LoadedKeys(
                **{**keys, "missing": tuple(keys["missing"]), "unexpected": tuple(keys["unexpected"])}
            ),
            size=None if size is None else (size[0], size[1]),
        )

    def to_json(self) -> bytes:
        """Plain JSON."""
        return orjson.dumps(asdict(self))


@dataclass(frozen=True)
class Artefact:
    """A converted network, or the fact that there is none: `facts` and the path of its `.xml`."""

    facts: Facts
    path: Path

    @cached_property
    def key(self) -> str:
        """Its name among all artefacts, and among the networks in memory."""
        return self.path.stem

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of its constants on disk when they were first asked for; 0 if they were gone."""
        try:
            return self.path.with_suffix(".bin").stat().st_size
        except OSError:
            return 0

    @property
    def needed_bytes(self) -> int:
        """What it takes in memory, about, before it is there."""
        return OpenVINOEngine.estimated_bytes(self.weight_bytes, 1)


class ArtefactStore:
    """A folder of converted networks, bounded in bytes. Blocking; for worker threads.

    A folder that cannot be written, as in a read-only container, is replaced by one that lasts as long as the process.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._versions = engine_versions()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = folder if _is_writable(folder) else self._until_exit(folder)
        self._remove_leftovers()
        self._workplace = Path(tempfile.mkdtemp(prefix=WORKPLACE, dir=self.folder))
        self._lock = _own(self._workplace)

    def _until_exit(self, folder: Path) -> Path:
        self._temporary = tempfile.TemporaryDirectory(prefix="backbone-engines-")
        log.warning("%s cannot be written: converted networks are not kept over a restart", folder.name)
        return Path(self._temporary.name)

    def _remove_leftovers(self) -> None:
        """Remove what processes left that were killed: their workplaces, and networks without facts once they are old,
        for another process may be about to write these.
        """
        for workplace in self.folder.glob(f"{WORKPLACE}*"):
            lock = _abandoned(workplace)
            if lock is not None:
                with lock:
                    shutil.rmtree(workplace, ignore_errors=True)  # another process may be removing it
        oldest = time.time() - LEFTOVER_S
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                is_network = path.suffix in SUFFIXES and not path.with_suffix(FACTS_SUFFIX).exists()
                if is_network and path.stat().st_mtime < oldest:
                    path.unlink()

    def has_room(self, weight_bytes: int) -> bool:
        """Whether the disk has room for a network with so many bytes of weights; asks the system."""
        try:
            return shutil.disk_usage(self.folder).free > weight_bytes + DESCRIPTION_BYTES
        except OSError:  # the folder is gone
            return False

    def new_path(self) -> Path:
        """Where an `.xml` may be made that has no name yet; goes with this process, if it is not kept."""
        return self._workplace / f"{secrets.token_hex(8)}.xml"

    def known(self, model_id: str) -> list[Artefact]:
        """All artefacts of a model that these versions made."""
        found = (self._read(path) for path in sorted(self.folder.glob(f"{model_id}-*{FACTS_SUFFIX}")))
        return [artefact for artefact in found if artefact is not None]

    def _read(self, path: Path) -> Artefact | None:
        try:
            facts = Facts.from_json(path.read_bytes())
        except (OSError, ValueError, TypeError, KeyError):
            return None  # another version's, or cut off: it is made again
        artefact = Artefact(facts, path.with_suffix(".xml"))
        is_whole = facts.outcome == "refused" or artefact.weight_bytes > 0
        return artefact if facts.versions == self._versions and is_whole else None

    def path_for(self, model_id: str, nodes: Sequence[str], size: tuple[int, int] | None) -> Path:
        """Where the network of these features is kept: one for all sizes, or one for this size."""
        parts = orjson.dumps([self._versions, list(nodes), size])
        return self.folder / f"{model_id}-{hashlib.sha256(parts).hexdigest()[:12]}.xml"

    def keep(self, facts: Facts, made: Path | None) -> Artefact:
        """Move what a conversion made into its place, the facts last; the oldest others give way.

        Args:
            made: the `.xml` with its `.bin` beside it, at a `new_path`; None for a refusal.

        Raises:
            Unavailable: there is no room, or the folder cannot be written.
        """
        path = self.path_for(facts.model_id, facts.nodes, facts.size)
        artefact = Artefact(replace(facts, versions=self._versions), path)
        try:
            for suffix in (".bin", ".xml") if made is not None else ():
                assert made is not None
                made.with_suffix(suffix).replace(path.with_suffix(suffix))
            self._write_facts(artefact)
        except OSError as error:
            self._remove(artefact.key)
            raise Unavailable(NO_ROOM) from error
        self._make_room(keep=artefact.key)
        return artefact

    def confirmed(self, artefact: Artefact) -> Artefact:
        """The artefact, noted as compared on real requests."""
        confirmed = replace(artefact, facts=replace(artefact.facts, compared=True))
        self._note_facts(confirmed)
        return confirmed

    def refused(self, artefact: Artefact, reason: str) -> Artefact:
        """The artefact as a refusal; its network is removed."""
        for suffix in (".xml", ".bin"):
            artefact.path.with_suffix(suffix).unlink(missing_ok=True)
        refusal = replace(artefact, facts=replace(artefact.facts, outcome="refused", reason=reason))
        self._note_facts(refusal)
        return refusal

    def _note_facts(self, artefact: Artefact) -> None:
        """Write what is known to this process anyway: without room it is found out again after a restart."""
        try:
            self._write_facts(artefact)
        except OSError:
            log.warning("what was found out about a converted network cannot be kept over a restart")

    def _write_facts(self, artefact: Artefact) -> None:
        partial = self.new_path()
        try:
            partial.write_bytes(artefact.facts.to_json())
            partial.replace(artefact.path.with_suffix(FACTS_SUFFIX))
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, keep: str) -> None:
        kept = sorted(self._stems(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in kept)
        for stem, _, size in kept:
            if total <= self._max_bytes or stem == keep:
                return
            self._remove(stem)
            total -= size

    def remove(self, artefact: Artefact) -> None:
        """Take an artefact out, whose files are not what was written."""
        self._remove(artefact.key)

    def _stems(self) -> Iterator[tuple[str, float, int]]:
        """Each artefact with when its network was last used and its bytes."""
        for path in self.folder.glob(f"*{FACTS_SUFFIX}"):
            stats = [file.stat() for suffix in SUFFIXES if (file := path.with_suffix(suffix)).exists()]
            yield (
                path.stem,
                max((stat.st_mtime for stat in stats), default=0.0),
                sum(stat.st_size for stat in stats),
            )

    def _remove(self, stem: str) -> None:
        for suffix in SUFFIXES:  # the facts first: what is left without them is not found
            (self.folder / stem).with_suffix(suffix).unlink(missing_ok=True)

    def touch(self, artefact: Artefact) -> None:
        """Note that it is in use: the oldest is removed first."""
        path = artefact.path.with_suffix(FACTS_SUFFIX)
        if path.exists():
            os.utime(path)

    def close(self) -> None:
        """Remove what was only meant for this process."""
        shutil.rmtree(self._workplace, ignore_errors=True)  # the converter may be writing there to its end
        if self._lock is not None:
            self._lock.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _own(workplace: Path) -> BinaryIO | None:
    """The lock of a new workplace, which ends with its process; None where there are no locks."""
    fresh = workplace / "new"
    lock = fresh.open("xb")
    is_locked = _lock(lock)
    fresh.rename(workplace / LOCK)  # locked already when another process finds it
    return lock if is_locked else None


def _abandoned(workplace: Path) -> BinaryIO | None:
    """The lock of a workplace whose process has ended; None where it has not."""
    try:
        lock = (workplace / LOCK).open("r+b")
    except OSError:
        return None
    return lock if _lock(lock) else None


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or there are no locks here
        file.close()
        return False
    return True
