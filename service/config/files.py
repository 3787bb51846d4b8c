"""Named configs: files of the config directory, with OpenMMLab's `_base_` and `_delete_`, read as data.

A file holds a backbone (`type: ResNet`, …), an object with `backbone` and perhaps `neck` and `preprocess`, or the
whole config of an OpenMMLab model. It is YAML, JSON, or OpenMMLab's Python, of which no code is run. Its name is its
path below the directory without the suffix: `mmdet/resnet50.yaml` is `mmdet/resnet50`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml
from rapidfuzz import process

from service.config.plain import as_json, bounded
from service.config.python_files import PythonFile, Refused
from service.config.whole_configs import read_whole, scoped, scoped_neck
from service.errors import InvalidConfig, NotFound, UnknownConfig
from service.files import open_regular
from service.validation import pointer_to

SUFFIXES = (".yaml", ".yml", ".json", ".py")
MAX_FILE_BYTES = 1_000_000
MAX_BASE_DEPTH = 8
PARTS = ("backbone", "neck", "preprocess")
# Keys of a file that is a backbone itself: ours, a LazyConfig's, yacs'.
BARE_BACKBONE = frozenset({"type", "_target_", "MODEL"})


@dataclass(frozen=True)
class NamedConfig:
    """A file of the config directory: as written, and as resolved into its parts.

    `as_written` of a Python file is its text. `notes` say what of a whole config is done differently here.
    """

    name: str
    as_written: Any
    backbone: Mapping[str, Any]
    neck: Any
    preprocess: Mapping[str, Any] | str | None
    notes: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """The parts that are there, as plain data."""
        parts = {"backbone": self.backbone, "neck": self.neck, "preprocess": self.preprocess}
        return {key: value for key, value in parts.items() if value is not None}


@contextmanager
def named_in_errors(name: str | None) -> Iterator[None]:
    """Errors of a config say which named one it was; None is a config of the request's own."""
    try:
        yield
    except (InvalidConfig, NotFound) as error:
        if name is not None and not isinstance(error, UnknownConfig):
            error.detail = f"with the config {name}: {error.detail}"
        raise


class ConfigCatalogue:
    """The files of one directory. They are read when asked for, so an edit needs no restart."""

    def __init__(self, directory: Path) -> None:
        self._root = directory

    def names(self) -> list[str]:
        """The names of all configs, sorted; files and folders whose name starts with `_` are only bases."""
        return sorted(self._files())

    def _files(self) -> dict[str, list[Path]]:
        """The files of each name, which are several where they differ only in their suffix."""
        found: dict[str, list[Path]] = {}
        for path in self._walk():
            below = path.relative_to(self._root)
            if not any(part.startswith(("_", ".")) for part in below.parts):
                found.setdefault(below.with_suffix("").as_posix(), []).append(path)
        return found

    def _walk(self) -> Iterator[Path]:
        for folder, _, files in os.walk(self._root):
            yield from (Path(folder, file) for file in files if file.endswith(SUFFIXES))

    def load(self, name: str, *, pointer: str = "") -> NamedConfig:
        """The config of this name; names are looked up in the listing, never made into a path.

        Raises:
            UnknownConfig: no such file; carries the nearest names.
            InvalidConfig: the file cannot be read as a config.
        """
        files = self._files()
        if name not in files:
            nearest = [
                match for match, _, _ in process.extract(name[:128], list(files), limit=5, score_cutoff=50)
            ]
            raise UnknownConfig("config", name[:128], nearest, pointer=pointer)
        path, *others = sorted(files[name])
        if others:
            both = " and ".join(file.name for file in (path, *others))
            raise InvalidConfig("#", f"several files are named {name}: {both}; rename one")
        file = self._read(path)
        return _named(name, path, file.as_written, self._resolve(file, seen=()))

    def _read(self, path: Path) -> _File:
        shown = path.relative_to(self._root).as_posix()
        try:
            with open_regular(path) as file:
                source = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:  # a pipe, a dead link, not ours to read
            what = "cannot be read" if path.is_file() else "is not a file"
            raise InvalidConfig("#", f"{shown} {what}") from error
        if len(source) > MAX_FILE_BYTES:
            raise InvalidConfig("#", f"{shown} is larger than {MAX_FILE_BYTES:,} bytes")
        return PARSERS[path.suffix](path, shown, source)

    def _resolve(self, file: _File, seen: tuple[Path, ...]) -> dict[str, Any]:
        """The values of a file over those of its bases."""
        if file.path in seen or len(seen) >= MAX_BASE_DEPTH:
            raise InvalidConfig("#/_base_", f"{file.shown} is its own base, or its bases are too deep")
        merged: dict[str, Any] = {}
        for base in file.bases():
            base_file = self._read(self._base_path(file.path, base))
            below = self._resolve(base_file, (*seen, file.path))
            _refuse_overlap(merged, below, file.shown)
            merged.update(below)
        own = file.values(merged)
        return merge(merged, own)

    def _base_path(self, path: Path, base: str) -> Path:
        if "::" in base:
            detail = f"{base[:128]!r} is in another library's package; copy it into the config directory"
            raise InvalidConfig("#/_base_", detail)
        root = self._root.resolve()
        try:
            candidate = (path.parent / base).resolve()
            is_there = candidate.is_relative_to(root) and candidate.is_file()
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a loop of links
            is_there = False
        if not is_there or candidate.suffix not in SUFFIXES:
            raise InvalidConfig("#/_base_", f"no base {base[:128]!r} in the config directory")
        return self._root / candidate.relative_to(root)


@dataclass(frozen=True)
class _File:
    """A file that was read: what it is, its bases, and its own values over those of its bases.

    `values` may change the values of the bases that it is given, as a Python file can.
    """

    path: Path
    shown: str
    as_written: Any
    bases: Callable[[], list[str]]
    values: Callable[[dict[str, Any]], dict[str, Any]]


def _data_file(path: Path, shown: str, source: bytes) -> _File:
    """A file of YAML or JSON."""
    try:
        data = orjson.loads(source) if path.suffix == ".json" else yaml.safe_load(source)
    except (
        yaml.YAMLError,
        orjson.JSONDecodeError,
        UnicodeDecodeError,
        RecursionError,
        ValueError,
    ) as error:
        raise InvalidConfig("#", f"{shown} cannot be read: {_where(error)}") from error
    plain = bounded(data, shown)
    if not isinstance(plain, dict):
        raise InvalidConfig("#", f"{shown} is not an object")
    own = {key: value for key, value in plain.items() if key != "_base_"}
    return _File(path, shown, plain, lambda: _base_names(plain), lambda _base: own)


def _python_file(path: Path, shown: str, source: bytes) -> _File:
    """A file of OpenMMLab's Python; what it does to its bases' values is done before it is merged over them."""
    parsed = PythonFile(source, shown)

    def values(base: dict[str, Any]) -> dict[str, Any]:
        own = parsed.values(base)
        kept = bounded(base, shown)
        base.clear()
        base.update(kept)
        bounded_own: dict[str, Any] = bounded(own, shown)
        return bounded_own

    return _File(path, shown, source.decode("utf-8-sig"), parsed.bases, values)


PARSERS: Mapping[str, Callable[[Path, str, bytes], _File]] = {
    ".yaml": _data_file,
    ".yml": _data_file,
    ".json": _data_file,
    ".py": _python_file,
}


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "it is not well-formed"


def _base_names(data: Mapping[str, Any]) -> list[str]:
    bases = data.get("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InvalidConfig("#/_base_", "must be a file name or a list of file names")
    return bases


def _refuse_overlap(merged: Mapping[str, Any], below: Mapping[str, Any], shown: str) -> None:
    """OpenMMLab refuses two bases that define the same key: which one wins would be an accident."""
    twice = sorted(set(merged) & set(below))
    if twice:
        raise InvalidConfig("#/_base_", f"two bases of {shown} define {', '.join(twice)}")


def merge(base: Mapping[str, Any], own: Mapping[str, Any], pointer: str = "#") -> dict[str, Any]:
    """`own` over `base`: objects merge key by key, everything else replaces; `_delete_: true` drops the base's keys.

    The rule of mmengine's Config (documented under "Modify the inherited fields").

    Raises:
        InvalidConfig: an object over what is none, as in mmengine.
    """
    merged = dict(base)
    for key, value in own.items():
        if isinstance(value, dict):
            merged[key] = _over(merged.get(key, {}), value, pointer_to(pointer, str(key)))
        else:
            merged[key] = value
    merged.pop("_delete_", None)
    return merged


def _over(below: Any, value: Mapping[str, Any], pointer: str) -> Any:
    """An object over what its base has there."""
    fresh = {name: child for name, child in value.items() if name != "_delete_"}
    if value.get("_delete_", False):
        return merge({}, fresh, pointer)
    if isinstance(below, Refused):
        return below
    if not isinstance(below, dict):
        kind = "null" if below is None else type(below).__name__
        raise InvalidConfig(pointer, f"an object over the base's {kind}; _delete_: true replaces it")
    return merge(below, fresh, pointer)


def _named(name: str, path: Path, written: Any, values: dict[str, Any]) -> NamedConfig:
    if "model" in values and not BARE_BACKBONE & values.keys():
        whole = read_whole(values, name)
        return NamedConfig(name, written, whole.backbone, whole.neck, whole.preprocess, whole.notes)
    is_python = path.suffix == ".py"
    if BARE_BACKBONE & values.keys():
        return NamedConfig(name, written, as_json(values, "#/backbone"), None, None)
    if not isinstance(values.get("backbone"), (dict, Refused)):
        raise InvalidConfig("#", f"the config {name} has neither a type nor a backbone nor a model")
    unknown = sorted(str(key) for key in set(values) - {*PARTS, "default_scope"})
    if unknown and not is_python:  # a Python file has variables beside its parts
        known = ", ".join(PARTS)
        raise InvalidConfig(
            pointer_to("#", unknown[0]), f"the config {name} has an unknown part; known: {known}"
        )
    scope = as_json(values.get("default_scope"), "#/default_scope")
    backbone, neck, preprocess = (as_json(values.get(part), f"#/{part}") for part in PARTS)
    return NamedConfig(
        name,
        written,
        scoped(backbone, scope, "#/backbone"),
        scoped_neck(neck, scope),
        preprocess,
    )
