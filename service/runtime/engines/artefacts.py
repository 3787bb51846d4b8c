"""Converted networks on disk: what conversion found out, the network itself, and which request it may serve."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import orjson

from service.config.spec import LoadedKeys
from service.runtime.engines.openvino_engine import OpenVINOEngine
from service.version import service_version

Outcome = Literal["converted", "refused", "failed"]
ENGINE_LIBRARIES = ("openvino", "torch", "timm", "torchvision", "numpy")
FACTS_SUFFIX = ".json"
SUFFIXES = (FACTS_SUFFIX, ".xml", ".bin")
# An engine that takes longer than torch, by this much over the noise, is slower.
SLOWEST = 1.05
LEFTOVER_S = 24 * 3600.0
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

    def _until_exit(self, folder: Path) -> Path:
        self._temporary = tempfile.TemporaryDirectory(prefix="backbone-engines-")
        log.warning("%s cannot be written: converted networks are not kept over a restart", folder.name)
        return Path(self._temporary.name)

    def _remove_leftovers(self) -> None:
        """Remove what conversions left whose process was killed; another process may be at work on younger ones."""
        oldest = time.time() - LEFTOVER_S
        for path in self.folder.glob(".*"):
            with suppress(FileNotFoundError):  # another process may be removing it
                if path.suffix in SUFFIXES and path.stat().st_mtime < oldest:
                    path.unlink()

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
            made: the `.xml` with its `.bin` beside it in this folder; None for a refusal.
        """
        path = self.path_for(facts.model_id, facts.nodes, facts.size)
        for suffix in (".bin", ".xml") if made is not None else ():
            assert made is not None
            made.with_suffix(suffix).replace(path.with_suffix(suffix))
        artefact = Artefact(replace(facts, versions=self._versions), path)
        self._write_facts(artefact)
        self._make_room(keep=artefact.key)
        return artefact

    def confirmed(self, artefact: Artefact) -> Artefact:
        """The artefact, noted as compared on real requests."""
        confirmed = replace(artefact, facts=replace(artefact.facts, compared=True))
        self._write_facts(confirmed)
        return confirmed

    def refused(self, artefact: Artefact, reason: str) -> Artefact:
        """The artefact as a refusal; its network is removed."""
        for suffix in (".xml", ".bin"):
            artefact.path.with_suffix(suffix).unlink(missing_ok=True)
        refusal = replace(artefact, facts=replace(artefact.facts, outcome="refused", reason=reason))
        self._write_facts(refusal)
        return refusal

    def _write_facts(self, artefact: Artefact) -> None:
        path = artefact.path.with_suffix(FACTS_SUFFIX)
        partial = path.with_suffix(".part")
        partial.write_bytes(artefact.facts.to_json())
        partial.replace(path)

    def _make_room(self, keep: str) -> None:
        kept = sorted(self._stems(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in kept)
        for stem, _, size in kept:
            if total <= self._max_bytes or stem == keep:
                return
            self._remove(stem)
            total -= size

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
        if self._temporary is not None:
            self._temporary.cleanup()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
