"""`python -m tests.parity.document`: writes docs/backbones.md, the table of what is served and how exactly.

With `--measure` every parity pack is computed first and its error noted in `measured.json`, which the table is made
from; `test_document.py` holds both to what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from service.backbones.catalogue import backbone_registry
from service.backbones.lazyconfig import from_lazyconfig
from service.backbones.registry import TypeEntry, json_type
from service.necks.catalogue import neck_registry
from service.runtime.inspect import checkpoint_layouts
from tests.parity.compute import error_of
from tests.parity.packs import FOLDER, load_pack, pack_names

MEASURED = Path(__file__).with_name("measured.json")
DOCUMENT = FOLDER.parents[2] / "docs" / "backbones.md"
MODEL_LIBRARIES = ("timm", "torchvision")
SHOWN_ARCHITECTURES = 12
INTRODUCTION = """# Backbones and necks

What is served, and how exactly. `GET /backbones` lists the same types; `GET /backbones/{type}` has the parameters of
one, what its indices mean and what its `frozen_stages` freezes.

- *Also written*: other scopes of the same type. A type without scope (`ResNet`) is mmpretrain's if that has one.
- *Error*: the largest relative L2 distance from the features of the real library, over the levels of all of its parity
  packs, whose number is in parentheses (float32, the torch engine, CPU; weights and images from a recipe). It is empty
  where there is no pack.
- *Checkpoints by the names of*: files of these libraries load as they are, below any prefix (`backbone.`, `module.`);
  whose names a file has is found out. `backbone-service convert` writes one as another.

Made by `make docs`; a test fails if it is out of date.
"""


@dataclass(frozen=True)
class Row:
    """One type of the table."""

    entry: TypeEntry
    architectures: Sequence[str]
    layouts: Sequence[str]
    packs: int
    error: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, after measuring if asked to."""
    parser = argparse.ArgumentParser("python -m tests.parity.document", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="compute every pack first (minutes)")
    if parser.parse_args(arguments).measure:
        MEASURED.write_bytes(orjson.dumps(dict(measured()), option=orjson.OPT_INDENT_2) + b"\n")
    DOCUMENT.write_text(document())


def measured() -> Iterator[tuple[str, float]]:
    """The largest relative error of each pack, to two digits."""
    names = pack_names()
    for number, name in enumerate(names, 1):
        pack = load_pack(name)
        error = float(f"{error_of(pack):.1e}")
        print(f"{number}/{len(names)} {name}: {error:.1e}", file=sys.stderr)
        yield name, error


# --- the table ------------------------------------------------------------------------------------


def document() -> str:
    """The text of docs/backbones.md."""
    parts = [INTRODUCTION]
    for scope, rows in _by_scope(backbone_rows()).items():
        parts.append(f"\n## {scope}\n\n{_table(rows)}")
    parts.append(_model_libraries())
    parts.append(f"\n## Necks\n\n{_table(neck_rows())}")
    parts.append(f"\n## Not served\n\n{_refused()}")
    return "".join(parts)


def _by_scope(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.entry.scope].append(row)
    return found


def backbone_rows() -> Iterator[Row]:
    """The served backbone types but timm's and torchvision's."""
    registry, errors = backbone_registry(), _errors(necks=False)
    for entry in registry.entries():
        if entry.scope in MODEL_LIBRARIES or entry.unsupported is not None:
            continue
        family = registry.resolve(entry.type).family
        layouts = checkpoint_layouts(entry, family)
        found = errors.get(entry.type, ())
        yield Row(entry, family.architectures(entry.type), layouts, len(found), max(found, default=None))


def neck_rows() -> Iterator[Row]:
    """The served neck types."""
    errors = _errors(necks=True)
    for entry in neck_registry().entries():
        if entry.unsupported is None:
            found = errors.get(entry.type, ())
            yield Row(entry, (), (entry.scope,), len(found), max(found, default=None))


@cache
def _errors(*, necks: bool) -> Mapping[str, Sequence[float]]:
    """The measured errors by type."""
    registry: Any = neck_registry() if necks else backbone_registry()
    found: dict[str, list[float]] = defaultdict(list)
    for name, error in orjson.loads(MEASURED.read_bytes()).items():
        pack = load_pack(name)
        if pack.is_neck == necks:
            given = pack.config if necks else from_lazyconfig(pack.config)
            found[registry.resolve(json_type(given, pointer="")).entry.type].append(error)
    return found


def _table(rows: Iterable[Row]) -> str:
    head = "| type | what | also written | architectures | error | checkpoints by the names of |\n"
    return head + "|---|---|---|---|---|---|\n" + "".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    error = "" if row.error is None else f"{row.error:.0e} ({row.packs})"
    cells = (
        f"`{row.entry.type}`",
        row.entry.summary,
        ", ".join(f"`{alias}`" for alias in row.entry.aliases),
        _architectures(row.architectures),
        error,
        ", ".join(row.layouts),
    )
    return f"| {' | '.join(cells)} |\n"


def _architectures(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_ARCHITECTURES} more" if len(names) > SHOWN_ARCHITECTURES else ""
    return ", ".join(names[:SHOWN_ARCHITECTURES]) + more


def _model_libraries() -> str:
    """timm and torchvision: a type for every model."""
    lines = []
    registry = backbone_registry()
    for library in MODEL_LIBRARIES:
        entries = [entry for entry in registry.entries() if entry.scope == library]
        served = [entry for entry in entries if entry.unsupported is None]
        errors = {t: found for t, found in _errors(necks=False).items() if t.partition(".")[0] == library}
        worst = max(max(found) for found in errors.values())
        packs = sum(len(found) for found in errors.values())
        lines.append(
            f"\n## {library}\n\n{len(served)} types, one for each architecture (`{served[0].type}` to "
            f"`{served[-1].type}`). Largest error over {packs} packs of {len(errors)} types: {worst:.0e}.\n"
        )
    return "".join(lines)


def _refused() -> str:
    entries = [*backbone_registry().entries(), *neck_registry().entries()]
    refused = [entry for entry in entries if entry.unsupported is not None]
    lines = "".join(f"| `{entry.type}` | {entry.unsupported} |\n" for entry in refused)
    return f"| type | why |\n|---|---|\n{lines}"


if __name__ == "__main__":
    main()
