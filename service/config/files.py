"""Named configs: files of the config directory, with OpenMMLab's `_base_` and `_delete_`, read as data.

A file holds a backbone (`type: ResNet`, …) or an object with `backbone` and perhaps `neck` and `preprocess`.
Its name is its path below the directory without the suffix: `mmdet/resnet50.yaml` is `mmdet/resnet50`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml
from rapidfuzz import process

from service.errors import InvalidConfig, UnknownConfig

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 1_000_000
MAX_BASE_DEPTH = 8
MAX_VALUES = 20_000
MAX_NESTING = 32
PARTS = ("backbone", "neck", "preprocess")
# Keys of a file that is a backbone itself: ours, a LazyConfig's, yacs'.
BARE_BACKBONE = frozenset({"type", "_target_", "MODEL"})


@dataclass(frozen=True)
class NamedConfig:
    """A file of the config directory: as written, and as resolved into its parts."""

    name: str
    as_written: Any
    backbone: Mapping[str, Any]
    neck: Mapping[str, Any] | None
    preprocess: Mapping[str, Any] | str | None

    def resolved(self) -> dict[str, Any]:
        """The parts that are there, as plain data."""
        parts = {"backbone": self.backbone, "neck": self.neck, "preprocess": self.preprocess}
        return {key: value for key, value in parts.items() if value is not None}


class ConfigCatalogue:
    """The files of one directory. They are read when asked for, so an edit needs no restart."""

    def __init__(self, directory: Path) -> None:
        self._root = directory

    def names(self) -> list[str]:
        """The names of all configs, sorted; files whose base name starts with `_` are only bases."""
        return sorted(self._files())

    def _files(self) -> dict[str, Path]:
        return {
            path.relative_to(self._root).with_suffix("").as_posix(): path
            for path in self._walk()
            if not path.name.startswith("_")
        }

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
        path = files.get(name)
        if path is None:
            nearest = [
                match for match, _, _ in process.extract(name[:128], list(files), limit=5, score_cutoff=50)
            ]
            raise UnknownConfig("config", name[:128], nearest, pointer=pointer)
        written = self._read(path)
        resolved = self._resolve(path, written, seen=())
        return _named(name, written, resolved)

    def _read(self, path: Path) -> Any:
        shown = path.relative_to(self._root).as_posix()
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidConfig("#", f"{shown} is larger than {MAX_FILE_BYTES:,} bytes")
        try:
            data = _parse(path)
        except (
            yaml.YAMLError,
            orjson.JSONDecodeError,
            UnicodeDecodeError,
            RecursionError,
            ValueError,
        ) as error:
            raise InvalidConfig("#", f"{shown} cannot be read: {_where(error)}") from error
        _refuse_bombs(data, shown)
        return data

    def _resolve(self, path: Path, data: Any, seen: tuple[Path, ...]) -> dict[str, Any]:
        shown = path.relative_to(self._root).as_posix()
        if not isinstance(data, dict):
            raise InvalidConfig("#", f"{shown} is not an object")
        if path in seen or len(seen) >= MAX_BASE_DEPTH:
            raise InvalidConfig("#/_base_", f"{shown} is its own base, or its bases are too deep")
        merged: dict[str, Any] = {}
        for base in _base_names(data):
            base_path = self._base_path(path, base)
            below = self._resolve(base_path, self._read(base_path), (*seen, path))
            _refuse_overlap(merged, below, shown)
            merged.update(below)
        own = {key: value for key, value in data.items() if key != "_base_"}
        return merge(merged, own)

    def _base_path(self, path: Path, base: str) -> Path:
        root = self._root.resolve()
        candidate = (path.parent / base).resolve()
        if not candidate.is_relative_to(root) or not candidate.is_file() or candidate.suffix not in SUFFIXES:
            raise InvalidConfig("#/_base_", f"no base {base!r} in the config directory")
        return self._root / candidate.relative_to(root)


def _parse(path: Path) -> Any:
    text = path.read_bytes()
    return orjson.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "it is not well-formed"


def _refuse_bombs(data: Any, shown: str) -> None:
    """A YAML anchor can stand for far more than its bytes; count what it unfolds to."""
    values, stack = 0, [(data, 1)]
    while stack:
        value, depth = stack.pop()
        values += 1
        if values > MAX_VALUES or depth > MAX_NESTING:
            raise InvalidConfig(
                "#", f"{shown} unfolds to more than {MAX_VALUES:,} values or {MAX_NESTING} levels"
            )
        if isinstance(value, dict):
            stack += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            stack += [(child, depth + 1) for child in value]


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


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`: objects merge key by key, everything else replaces; `_delete_: true` drops the base's keys.

    The rule of mmengine's Config (documented under "Modify the inherited fields").
    """
    merged = dict(base)
    for key, value in own.items():
        if isinstance(value, dict):
            below = merged.get(key)
            keep = isinstance(below, dict) and not value.get("_delete_", False)
            fresh = {name: child for name, child in value.items() if name != "_delete_"}
            merged[key] = merge(below if keep and isinstance(below, dict) else {}, fresh)
        else:
            merged[key] = value
    merged.pop("_delete_", None)
    return merged


def _named(name: str, written: Any, resolved: dict[str, Any]) -> NamedConfig:
    if BARE_BACKBONE & resolved.keys():
        return NamedConfig(name, written, resolved, None, None)
    backbone = resolved.get("backbone")
    if not isinstance(backbone, dict):
        raise InvalidConfig("#", f"the config {name} has neither a type nor a backbone")
    unknown = sorted(set(resolved) - set(PARTS))
    if unknown:
        raise InvalidConfig(
            f"#/{unknown[0]}", f"the config {name} has an unknown part; known: {', '.join(PARTS)}"
        )
    return NamedConfig(name, written, backbone, resolved.get("neck"), resolved.get("preprocess"))
