"""Put a state dict into a network, all of it or nothing, with every key of either side accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from service.checkpoints.keys import clipped, guess_prefix, listed_prefixes, strip_prefix
from service.checkpoints.read import StateDict
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch

COUNTER: Final = "num_batches_tracked"
SHOWN_NAMES: Final = 3
Part = Literal["backbone", "neck"]


def never(_name: str) -> bool:
    """No entry of the network is optional."""
    return False


@dataclass(frozen=True)
class _Comparison:
    """The names of a network against those of a file."""

    missing: tuple[str, ...]
    optional: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_strict(
    module: nn.Module,
    state: StateDict,
    ref: WeightsRef,
    *,
    optional: Callable[[str], bool] = never,
    part: Part = "backbone",
) -> LoadedKeys:
    """Fill the parameters and persistent buffers of `module` in place, or copy nothing if anything is wrong.

    `ref.prefix` is taken off the file's names; without one, a prefix under which the file has everything is
    found and reported. Tensors are cast to the dtype and device of the entry. `num_batches_tracked` may be
    absent.

    Args:
        module: allocated (not on the meta device).
        state: from `read_checkpoint`, with the family's own names.
        ref: the prefix, and the key of the request to blame.
        optional: entries that may be missing; they are reported and keep their values.
        part: what errors call the module.

    Raises:
        CheckpointMismatch: an entry is missing, or has another shape or kind of number in the file.
        ValueError: the module is on the meta device.
    """
    entries = _entries(module)
    named, prefix, dropped = _named(state, ref, [name for name in entries if _is_needed(name, optional)])
    compared = _compare(entries, named, optional, part)
    unexpected = (*(prefix + name for name in compared.unexpected), *dropped)
    nothing_fits = bool(entries) and not any(name in named for name in entries)
    if compared.missing or compared.wrong_shape or nothing_fits:
        detail = _explained(compared, entries, state, part)
        raise CheckpointMismatch(
            ref.pointer,
            detail,
            missing=compared.missing,
            wrong_shape=compared.wrong_shape,
            unexpected=unexpected,
        )
    loaded = _copy(entries, named)
    return LoadedKeys(loaded, missing=compared.optional, unexpected=unexpected, prefix=prefix)


def _entries(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharing the module's memory."""
    entries = {name: entry for name, entry in module.state_dict().items() if isinstance(entry, Tensor)}
    if any(entry.is_meta for entry in entries.values()):
        raise ValueError("a module on the meta device cannot be filled")
    return entries


def _named(
    state: StateDict, ref: WeightsRef, needed: Sequence[str]
) -> tuple[StateDict, str, tuple[str, ...]]:
    return strip_prefix(state, ref.prefix or guess_prefix(state, needed), pointer=ref.pointer)


def _is_needed(name: str, optional: Callable[[str], bool]) -> bool:
    return name.rpartition(".")[2] != COUNTER and not optional(name)


def _compare(
    entries: Mapping[str, Tensor], named: StateDict, optional: Callable[[str], bool], part: Part
) -> _Comparison:
    absent = [name for name in entries if name not in named and name.rpartition(".")[2] != COUNTER]
    both = [name for name in entries if name in named]
    return _Comparison(
        missing=tuple(name for name in absent if not optional(name)),
        optional=tuple(name for name in absent if optional(name)),
        wrong_shape=tuple(
            f"{name}: file {_shown(named[name])}, {part} {_shown(entries[name])}"
            for name in both
            if not _fits(name, named[name], entries[name])
        ),
        unexpected=tuple(name for name in named if name not in entries),
    )


def _fits(name: str, tensor: Tensor, entry: Tensor) -> bool:
    # Averaged checkpoints keep even their counters as floats; otherwise integers for weights are another
    # model.
    same_kind = tensor.is_floating_point() == entry.is_floating_point()
    return tensor.shape == entry.shape and (same_kind or name.rpartition(".")[2] == COUNTER)


def _shown(tensor: Tensor) -> str:
    shape = str(list(tensor.shape)).replace(" ", "")
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _explained(compared: _Comparison, entries: Mapping[str, Tensor], state: StateDict, part: Part) -> str:
    """What is wrong, with counts and the first names."""
    if len(compared.missing) + len(compared.optional) == _without_counters(entries):
        theirs, ours = listed_prefixes(state), listed_prefixes(entries)
        return f"none of the file's {len(state)} keys fit; they begin with {theirs}; the {part}'s with {ours}"
    parts = []
    if compared.missing:
        first = _first(compared.missing)
        parts.append(f"{len(compared.missing)} of {len(entries)} weights are missing: {first}")
    if compared.wrong_shape:
        parts.append(f"{len(compared.wrong_shape)} have another shape: {_first(compared.wrong_shape)}")
    if compared.unexpected:
        parts.append(f"{len(compared.unexpected)} of the file are not used: {_first(compared.unexpected)}")
    return "; ".join(parts)


def _without_counters(entries: Iterable[str]) -> int:
    return sum(name.rpartition(".")[2] != COUNTER for name in entries)


def _first(names: Iterable[str]) -> str:
    names = tuple(names)
    shown = ", ".join(clipped(name) for name in names[:SHOWN_NAMES])
    return f"{shown}, …" if len(names) > SHOWN_NAMES else shown


def _copy(entries: Mapping[str, Tensor], named: StateDict) -> int:
    found = [name for name in entries if name in named]
    with torch.no_grad():
        for name in found:
            entries[name].copy_(named[name])
    return len(found)
