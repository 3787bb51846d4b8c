"""Prefixes of the names in a checkpoint: which there are, which one fits, taking one off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from service.checkpoints.read import DATA_PARALLEL, StateDict
from service.errors import CheckpointMismatch

MAX_NAME_LENGTH = 120
MAX_PREFIXES = 8


def strip_prefix(
    state: StateDict, prefix: str | None, *, pointer: str
) -> tuple[StateDict, str, tuple[str, ...]]:
    """The tensors below `prefix`, under their names without it.

    `backbone` and `backbone.` are the same (as in OpenMMLab's `Pretrained`); no prefix leaves the names as
    they are. A prefix may begin with the `module.` that `read_checkpoint` has taken off.

    Returns:
        the tensors; the prefix taken off, with its dot; the names of the file that are not below it.

    Raises:
        CheckpointMismatch: no name begins with the prefix; the error names the prefixes that there are.
    """
    if not prefix:
        return state, "", ()
    used = _as_written(state, prefix.rstrip(".") + ".")
    kept = {name.removeprefix(used): tensor for name, tensor in state.items() if name.startswith(used)}
    if not kept:
        detail = f"no key of the file begins with {used!r}; they begin with {listed_prefixes(state)}"
        raise CheckpointMismatch(pointer, detail)
    return kept, used, tuple(name for name in state if not name.startswith(used))


def _as_written(state: StateDict, prefix: str) -> str:
    if any(name.startswith(prefix) for name in state):
        return prefix
    return prefix.removeprefix(DATA_PARALLEL)


def guess_prefix(state: StateDict, names: Iterable[str]) -> str:
    """The one prefix under which the file has all of `names`, empty if it has any of them bare.

    Two prefixes that fit equally well (a network and its momentum copy) are no guess: empty.
    """
    wanted = set(names)
    if not wanted or any(name in wanted for name in state):
        return ""
    found = _matches(state, wanted)
    fitting = [prefix for prefix, count in found.items() if count == len(wanted)]
    return fitting[0] if len(fitting) == 1 else ""


def _matches(state: StateDict, wanted: Collection[str]) -> Counter[str]:
    """How many of the wanted names there are under each prefix."""
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        found.update(
            ".".join(parts[:depth]) + "."
            for depth in range(1, min(len(parts), MAX_PREFIXES))
            if ".".join(parts[depth:]) in wanted
        )
    return found


def listed_prefixes(state: Iterable[str]) -> str:
    """The first parts of the names, most frequent first, for an error's text: `'backbone.', 'head.'`."""
    counts = Counter(_first_part(name) for name in state)
    shown = [repr(clipped(part)) for part, _ in counts.most_common(MAX_PREFIXES)]
    more = [f"{len(counts) - MAX_PREFIXES} more"] if len(counts) > MAX_PREFIXES else []
    return ", ".join(shown + more)


def _first_part(name: str) -> str:
    head, dot, _ = name.partition(".")
    return head + dot


def clipped(name: str) -> str:
    """A name of a file, short enough for an error's text."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"
