"""Checkpoints in the names of another library than the config's: recognised, renamed, and loaded as strictly."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from torch import Tensor

from service.backbones import building
from service.backbones.base import Backbone, BackboneConfig, Family
from service.backbones.catalogue import TYPES
from service.checkpoints.keys import strip_prefix
from service.checkpoints.layouts import Naming, Renamed, without_prefix
from service.checkpoints.read import StateDict
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch

SAMPLED_NAMES: Final = 48


@dataclass(frozen=True)
class Translation:
    """A file under the names of a network.

    Attributes:
        source: the library whose names the file has.
        prefix: what stood before each of them.
        renamed: its tensors, in the shapes of the network.
        differs: why the numbers would mean something else all the same, or None.
        fitting: how many of the network's entries it fills.
    """

    source: str
    prefix: str
    renamed: Renamed
    differs: str | None
    fitting: int


def load_any(
    family: Family[Any], config: BackboneConfig, state: StateDict, ref: WeightsRef
) -> tuple[Backbone, LoadedKeys]:
    """The network with a checkpoint in it, whatever library of those that have the network named its tensors.

    The network's own names are tried first. What is loaded is what `Family.load` loads; its names in the report
    are those of the file.

    Raises:
        CheckpointMismatch: it does not fit under any names, or fits and is another network.
    """
    try:
        backbone, keys = family.load(config, state, ref)
    except CheckpointMismatch:
        found = translate(family, config, state, ref)
        if found is None:
            raise
    else:
        _refuse(config.misfits("", ref.name, state), ref)
        return backbone, keys
    _refuse(found.differs or config.misfits(found.source, ref.name, state), ref, source=found.source)
    return _loaded(family, config, found, state, ref)


def _refuse(detail: str | None, ref: WeightsRef, *, source: str = "") -> None:
    if detail is not None:
        raise CheckpointMismatch(
            ref.pointer, f"the file has {source}'s names: {detail}" if source else detail
        )


def _loaded(
    family: Family[Any], config: BackboneConfig, found: Translation, state: StateDict, ref: WeightsRef
) -> tuple[Backbone, LoadedKeys]:
    try:
        backbone, keys = family.load(config, found.renamed.state, replace(ref, prefix=None))
    except CheckpointMismatch as error:
        detail = f"read by {found.source}'s names: {error.faults[0].detail}"
        raise CheckpointMismatch(
            ref.pointer,
            detail,
            missing=error.missing,
            wrong_shape=error.wrong_shape,
            unexpected=error.unexpected,
        ) from error
    used = {
        found.prefix + origin
        for name, origins in found.renamed.origins.items()
        if name not in keys.unexpected
        for origin in origins
    }
    unexpected = tuple(name for name in state if name not in used)
    return backbone, replace(keys, unexpected=unexpected, prefix=found.prefix, layout=found.source)


def translate(
    family: Family[Any], config: BackboneConfig, state: StateDict, ref: WeightsRef
) -> Translation | None:
    """The file under the network's names; None if no library's names fill at least half of it."""
    entries = building.on_meta(lambda: family.build(config)).checkpoint_entries()
    below, prefix, _ = strip_prefix(state, ref.prefix, pointer=ref.pointer)
    found = [replace(one, prefix=prefix + one.prefix) for one in _candidates(family, below, entries)]
    best = max(found, key=lambda one: one.fitting, default=None)
    return best if best is not None and 2 * best.fitting >= len(entries) else None


def _candidates(
    family: Family[Any], state: StateDict, entries: Mapping[str, Tensor]
) -> Iterator[Translation]:
    for prefix, below in without_prefix(state):
        for naming, source in _readings(family, below):
            target = family.key_library or naming.own[0]
            if not _is_same(naming, source, target):
                renamed = naming.translate(below, source, target)
                if renamed is not None:
                    fitted = _fitted(renamed, entries)
                    fitting = sum(name in entries for name in fitted.state)
                    differs = naming.differs(source, target)
                    yield Translation(source, prefix, fitted, differs, fitting)


def _readings(family: Family[Any], state: StateDict) -> Iterator[tuple[Naming, str]]:
    """The kinds of network that a file may be of, each with the library whose names it may have."""
    sample = _sample(state)
    if family.naming is not None:
        for source in family.naming.libraries():
            if _reads(family.naming, source, state, sample):
                yield family.naming, source
        return
    for naming in all_namings():
        if family.key_library in naming.libraries():
            yield from ((naming, source) for source in naming.libraries() if naming.recognises(state, source))


def _is_same(naming: Naming, source: str, target: str) -> bool:
    return source == target or (source in naming.own and target in naming.own)


def _reads(naming: Naming, source: str, state: StateDict, sample: Sequence[str]) -> bool:
    """Whether a library's names are likely to be the file's: its rules know most of a sample."""
    if source in naming.own:
        return set(naming.marks) <= state.keys()
    layout = naming.layout(source)
    known = layout.known(sample, state) if layout is not None else 0
    return 2 * known >= len(sample)


def _sample(names: Iterable[str]) -> tuple[str, ...]:
    every = tuple(names)
    return every[:: max(1, len(every) // SAMPLED_NAMES)]


def _fitted(renamed: Renamed, entries: Mapping[str, Tensor]) -> Renamed:
    """The tensors in the network's shapes, where only dimensions of one are more or fewer: 1x1 kernels, scales."""
    state = {}
    for name, tensor in renamed.state.items():
        entry = entries.get(name)
        same = entry is None or entry.shape == tensor.shape or not _is_same_but_ones(tensor, entry)
        state[name] = tensor if same or entry is None else tensor.reshape(entry.shape)
    return replace(renamed, state=state)


def _is_same_but_ones(tensor: Tensor, entry: Tensor) -> bool:
    return [side for side in tensor.shape if side != 1] == [side for side in entry.shape if side != 1]


@cache
def all_namings() -> tuple[Naming, ...]:
    """The names of every kind of network that a shipped family knows in other libraries."""
    found: dict[str, Naming] = {}
    for _, path, _ in TYPES:
        module, _, attribute = path.partition(":")
        family: Family[Any] = getattr(importlib.import_module(f"service.backbones.{module}"), attribute)
        if family.naming is not None:
            found[family.naming.kind] = family.naming
    return tuple(found.values())
