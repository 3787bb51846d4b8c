"""The closed table of backbone types: names to families.

Entries are strings, imported on use; nothing that a client sends is ever imported. Third parties add entries
through the entry point group `backbone_service.backbones`, whose names are types (`acme.TinyNet`) and whose
values are `Family` objects.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from rapidfuzz import process

from service.errors import CannotStart, InvalidConfig, UnknownBackbone

ENTRY_POINT_GROUP = "backbone_service.backbones"
FIRST_SCOPE = "mmpretrain"
MAX_TYPE_LENGTH = 128
SCOPED_NAME = re.compile(r"[A-Za-z]\w*(\.\w[\w-]*)+", re.ASCII)
F = TypeVar("F")
log = logging.getLogger("service.backbones")


@dataclass(frozen=True)
class TypeEntry:
    """One type: its canonical name, where its family is (`module:ATTRIBUTE`), and what else it is called.

    `is_foreign` marks the types of other packages.
    """

    type: str
    family: str
    summary: str
    aliases: tuple[str, ...] = ()
    unsupported: str | None = None
    takes_tag: bool = False
    is_foreign: bool = False

    @property
    def scope(self) -> str:
        """The part before the first dot."""
        return self.type.partition(".")[0]


@dataclass(frozen=True)
class Resolved(Generic[F]):
    """What a `type` string means: its entry and family, its name in full, and the scope that the client wrote.

    `type` is the entry's, followed by a tag (`timm.resnet50.a1_in1k`) where the client gave one.
    """

    entry: TypeEntry
    family: F
    type: str
    scope: str


class Registry(Generic[F]):
    """Types by name, with or without scope, case as the libraries write it."""

    def __init__(
        self,
        entries: Iterable[TypeEntry],
        family_class: type[F],
        group: str | None = None,
        noun: str = "backbone type",
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self._renamed = renamed or {}
        self._family_class = family_class
        self._noun = noun
        self._entries: dict[str, TypeEntry] = {}
        self._names: dict[str, TypeEntry] = {}
        for entry in (*entries, *_third_party(group)):
            self._add(entry)

    def _add(self, entry: TypeEntry) -> None:
        for name in (entry.type, *entry.aliases):
            if name in self._names:
                first, second = self._names[name].family, entry.family
                raise CannotStart(f"{self._noun} {name} is registered twice: as {first} and as {second}")
            self._names[name] = entry
        self._entries[entry.type] = entry

    def entries(self) -> list[TypeEntry]:
        """All types, sorted by name."""
        return sorted(self._entries.values(), key=lambda entry: entry.type)

    @cached_property
    def _by_bare_name(self) -> Mapping[str, tuple[TypeEntry, ...]]:
        found: dict[str, dict[str, TypeEntry]] = {}
        for name, entry in self._names.items():
            found.setdefault(name.partition(".")[2], {})[entry.type] = entry
        return {name: tuple(entries.values()) for name, entries in found.items()}

    def resolve(self, name: str, *, pointer: str = "#/backbone/type") -> Resolved[F]:
        """The type that `name` means.

        Raises:
            UnknownBackbone: no such type; carries the nearest names.
            InvalidConfig: several types have this name, or the type is known but cannot be served: by its
                library's nature, or because another package's code does not load.
        """
        name = self._renamed.get(name, name)
        entry, tag = self._names.get(name) or self._unscoped(name, pointer), ""
        if entry is None:
            entry, tag = self._tagged(name)
        if entry is None:
            raise UnknownBackbone(self._noun, name[:MAX_TYPE_LENGTH], self.nearest(name), pointer=pointer)
        if entry.unsupported is not None:
            raise InvalidConfig(pointer, f"{entry.type} is not served: {entry.unsupported}")
        scope = name.partition(".")[0] if "." in name else _scope_of(entry, name)
        return Resolved(entry, self._family(entry, pointer), entry.type + tag, scope)

    def _tagged(self, name: str) -> tuple[TypeEntry | None, str]:
        """timm writes which pretrained weights it means behind a second dot."""
        scope, _, rest = name.partition(".")
        model, dot, tag = rest.partition(".")
        entry = self._names.get(f"{scope}.{model}")
        return (entry, dot + tag) if entry is not None and entry.takes_tag else (None, "")

    def _unscoped(self, name: str, pointer: str) -> TypeEntry | None:
        first = self._names.get(f"{FIRST_SCOPE}.{name}")
        if first is not None:
            return first
        candidates = self._by_bare_name.get(name, ())
        if len(candidates) > 1:
            names = ", ".join(sorted(entry.type for entry in candidates))
            raise InvalidConfig(pointer, f"{name!r} is ambiguous; write one of {names}")
        return candidates[0] if candidates else None

    def nearest(self, name: str, limit: int = 5) -> list[str]:
        """The known names most like `name`, best first."""
        short = name[:MAX_TYPE_LENGTH]
        choices = list(self._names) if "." in short else list(self._by_bare_name)
        return [match for match, _, _ in process.extract(short, choices, limit=limit, score_cutoff=60)]

    def _family(self, entry: TypeEntry, pointer: str) -> F:
        if not entry.is_foreign:
            return self._import(entry)
        try:
            return self._import(entry)
        # Another package's code can fail in any way, and takes no other type with it.
        except Exception as error:
            log.exception("%s cannot be loaded from %s", entry.type, entry.family)
            detail = f"{entry.type} is not served: the package that it comes from cannot be loaded"
            raise InvalidConfig(pointer, detail) from error

    def _import(self, entry: TypeEntry) -> F:
        module, _, attribute = entry.family.partition(":")
        family = getattr(importlib.import_module(module), attribute)
        if not isinstance(family, self._family_class):
            raise TypeError(f"{entry.family} is not a {self._family_class.__name__}")
        return family


def _scope_of(entry: TypeEntry, bare_name: str) -> str:
    """The scope in which a type has this name: its own, or that of a former name."""
    names = (entry.type, *entry.aliases)
    return next(name for name in names if name.partition(".")[2] == bare_name).partition(".")[0]


def _third_party(group: str | None) -> list[TypeEntry]:
    points: Iterable[EntryPoint] = entry_points(group=group) if group else ()
    return [_foreign_entry(point) for point in points]


def _foreign_entry(point: EntryPoint) -> TypeEntry:
    if len(point.name) > MAX_TYPE_LENGTH or not SCOPED_NAME.fullmatch(point.name):
        name = point.name[:MAX_TYPE_LENGTH]
        raise CannotStart(f"{name!r} of {point.value} is no name of a type; one is written scope.Name")
    return TypeEntry(point.name, point.value, _distribution(point), is_foreign=True)


def _distribution(point: EntryPoint) -> str:
    return f"from the package {point.dist.name}" if point.dist else "from another package"


def json_type(raw: Any, *, pointer: str) -> str:
    """The `type` of a raw config.

    Raises:
        InvalidConfig: not an object, or without a usable `type`.
    """
    if not isinstance(raw, Mapping):
        raise InvalidConfig(pointer, "must be an object with a type, or the name of a config")
    name = raw.get("type")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TYPE_LENGTH:
        raise InvalidConfig(f"{pointer}/type", f"must be a string of 1 to {MAX_TYPE_LENGTH} characters")
    return name
