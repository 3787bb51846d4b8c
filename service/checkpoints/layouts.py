"""One network under the names of several libraries: the rules between them, and which of them a file is in.

A family has one layout of its own (the names of its library's checkpoints) and tells, as a `Naming`, by which
rules the same weights are named elsewhere. A rule is a pair of templates:

    KeyRule("layers.{i}.ffn.layers.0.0.{leaf}", "blocks.{i}.mlp.fc1.{leaf}")

`{leaf}` and `{part}` stand for one part of a name and `{rest}` for all that is left of it; every other field is a
number, and `{i+1}` is the number one higher. Rules are read in both directions, the first that fits wins. What no
rule fits has no counterpart in the other library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from service.checkpoints.keys import strip_prefix
from service.checkpoints.read import StateDict

OWN: Final = "own"
MAX_PREFIXES: Final = 8
PATTERNS: Final[Mapping[str, str]] = {"leaf": r"[^.]+", "part": r"[^.]+", "rest": r".+"}
_FIELD: Final = re.compile(r"\{(\w+?)(?:([+-]\d+))?\}")

TensorChange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Change:
    """How the numbers of one tensor are laid out elsewhere: into our order, and into theirs."""

    to_ours: TensorChange
    to_theirs: TensorChange


@dataclass(frozen=True)
class KeyRule:
    """A name of ours, the same in another library, and how the tensor changes on the way, if it does."""

    ours: str
    theirs: str
    change: Change | None = None


Rules = Sequence[KeyRule]


def rules(names: Mapping[str, str], change: Change | None = None) -> tuple[KeyRule, ...]:
    """The rules of a table from our templates to theirs."""
    return tuple(KeyRule(ours, theirs, change) for ours, theirs in names.items())


def below(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """The table of a part of a network for the place where it is: each name with its library's prefix."""
    return {ours + mine: theirs + other for mine, other in names.items()}


@dataclass(frozen=True)
class Regrouping:
    """Tensors that are one in one library and several in the other, side by side along the first dimension.

    Attributes:
        ours, theirs: templates of the parts in order, of which one side has only one; None where a part is not
            there, which is all zeros, or does not matter.
        shares: how long the parts are, relative to each other.
    """

    ours: tuple[str | None, ...]
    theirs: tuple[str | None, ...]
    shares: tuple[int, ...]


# Where blocks are counted through, the rules follow from the file: of ours (True) or of theirs (False).
RulesFromNames = Callable[[StateDict, bool], Rules]


@dataclass(frozen=True)
class Renamed:
    """Tensors under other names.

    `origins` gives for each name those in the file; `left` are the file's names that have no counterpart.
    """

    state: StateDict
    origins: Mapping[str, tuple[str, ...]]
    left: tuple[str, ...]


@dataclass(frozen=True)
class KeyLayout:
    """The names that one library has for a network.

    Attributes:
        name: the library: `timm`, `torchvision`, `detectron2`, `official`, …
        rules: between our names and theirs.
        differs: why weights of this library would fit and yet compute something else, with how to tell; None where
            the networks are the same.
        regroupings: what is not one tensor for one; their names are no rule's.
    """

    name: str
    rules: Rules | RulesFromNames
    differs: str | None = None
    regroupings: tuple[Regrouping, ...] = ()

    def to_ours(self, state: StateDict) -> Renamed:
        """A file of this library under our names."""
        rules = self._rules(state, ours=False)
        regrouped = _regrouped(state, [(one.theirs, one.ours, one.shares) for one in self.regroupings])
        return _renamed(state, [(rule.theirs, rule.ours, _into_ours(rule)) for rule in rules], regrouped)

    def to_theirs(self, state: StateDict) -> Renamed:
        """A file of ours under this library's names."""
        rules = self._rules(state, ours=True)
        regrouped = _regrouped(state, [(one.ours, one.theirs, one.shares) for one in self.regroupings])
        return _renamed(state, [(rule.ours, rule.theirs, _into_theirs(rule)) for rule in rules], regrouped)

    def known(self, sample: Collection[str], state: StateDict) -> int:
        """How many names of a sample of a file's names are this library's."""
        templates = [rule.theirs for rule in self._rules(state, ours=False)]
        templates += [part for one in self.regroupings for part in one.theirs if part is not None]
        return sum(any(_compiled(template)[0].fullmatch(name) for template in templates) for name in sample)

    def has(self, marks: Collection[str], state: StateDict) -> bool:
        """Whether a file of this library may have all of some names of ours; quick, and sure where it says no."""
        pairs = [_rewriting(rule.ours, rule.theirs) for rule in self._rules(state, ours=False)]
        return all(any(pair.of(mark) in state for pair in pairs) for mark in marks)

    def _rules(self, state: StateDict, *, ours: bool) -> Rules:
        return self.rules(state, ours) if callable(self.rules) else self.rules


@dataclass(frozen=True)
class Naming:
    """The names of one kind of network in all libraries that have it.

    Attributes:
        kind: what the network is called: `ResNet`.
        own: the libraries whose names are ours: the first gives the layout its name.
        marks: names of ours that every network of the kind has, and those of other kinds have not.
        layouts: the others.
        stem_kernel: (name of ours, width of its kernel) where the names alone do not tell the kind.
    """

    kind: str
    own: tuple[str, ...]
    marks: tuple[str, ...]
    layouts: tuple[KeyLayout, ...] = ()
    stem_kernel: tuple[str, int] | None = None

    def libraries(self) -> tuple[str, ...]:
        """All libraries, ours first."""
        return (*self.own, *(layout.name for layout in self.layouts))

    def layout(self, library: str) -> KeyLayout | None:
        """The layout of a library; None if it has not this network."""
        if library in self.own:
            return KeyLayout(library, (KeyRule("{rest}", "{rest}"),))
        return next((layout for layout in self.layouts if layout.name == library), None)

    def translate(self, state: StateDict, source: str, target: str) -> Renamed | None:
        """A file's tensors by another library's names; None if a library has not this network."""
        into, out_of = self.layout(source), self.layout(target)
        if into is None or out_of is None:
            return None
        ours = into.to_ours(state)
        theirs = out_of.to_theirs(ours.state)
        return Renamed(
            theirs.state,
            {
                name: tuple(origin for between in several for origin in ours.origins[between])
                for name, several in theirs.origins.items()
            },
            (*ours.left, *(origin for name in theirs.left for origin in ours.origins[name])),
        )

    def differs(self, source: str, target: str) -> str | None:
        """Why weights of one library mean something else in another, None where the networks are the same."""
        reasons = [layout.differs for layout in self.layouts if layout.name in (source, target)]
        return next((reason for reason in reasons if reason is not None), None)

    def recognises(self, state: StateDict, library: str) -> bool:
        """Whether a file is of this kind in the names of a library."""
        layout = self.layout(library)
        if layout is None or not layout.has(self.marks, state):
            return False
        ours = layout.to_ours(state).state
        if not set(self.marks) <= ours.keys():
            return False
        if self.stem_kernel is None:
            return True
        name, width = self.stem_kernel
        return ours[name].shape[-1:] == (width,)


def _into_ours(rule: KeyRule) -> TensorChange | None:
    return rule.change.to_ours if rule.change is not None else None


def _into_theirs(rule: KeyRule) -> TensorChange | None:
    return rule.change.to_theirs if rule.change is not None else None


def _renamed(
    state: StateDict, rules: Sequence[tuple[str, str, TensorChange | None]], regrouped: Sequence[_Part]
) -> Renamed:
    ready = [(_rewriting(source, target), change) for source, target, change in rules]
    renamed = {part.name: part.tensor for part in regrouped}
    origins = {part.name: part.origins for part in regrouped}
    used = {name for part in regrouped for name in part.origins}
    for name, tensor in state.items():
        for rewriting, change in ready if name not in used else ():
            # Most rules begin with other letters: a file has thousands of names.
            found = rewriting.of(name) if name.startswith(rewriting.beginning) else None
            if found is not None:
                renamed[found] = tensor if change is None else change(tensor)
                origins[found] = (name,)
                break
    used |= {name for several in origins.values() for name in several}
    return Renamed(renamed, origins, tuple(name for name in state if name not in used))


@dataclass(frozen=True)
class _Part:
    """A tensor that was joined or split, and the names of what it is made of."""

    name: str
    tensor: Tensor
    origins: tuple[str, ...]


_Group = tuple[tuple[str | None, ...], tuple[str | None, ...], tuple[int, ...]]


def _regrouped(state: StateDict, groups: Sequence[_Group]) -> list[_Part]:
    return [part for name in state for group in groups for part in _parts_of(name, state, *group)]


def _parts_of(
    name: str,
    state: StateDict,
    sources: tuple[str | None, ...],
    targets: tuple[str | None, ...],
    shares: tuple[int, ...],
) -> Iterator[_Part]:
    """What becomes of the group that `name` is the first of; nothing if it is of none, or the group not whole."""
    first = sources[0]
    if first is None or state[name].ndim == 0 or _rewriting(first, first).of(name) is None:
        return
    origins = [None if source is None else _rewriting(first, source).of(name) for source in sources]
    names = tuple(origin for origin in origins if origin is not None)
    if any(origin not in state or state[origin].shape[1:] != state[name].shape[1:] for origin in names):
        return
    whole = torch.cat([torch.zeros_like(state[name]) if one is None else state[one] for one in origins])
    if whole.shape[0] % sum(shares):
        return
    sizes = [whole.shape[0] // sum(shares) * share for share in shares]
    tensors = torch.split(whole, sizes) if len(targets) > 1 else (whole,)
    for target, tensor in zip(targets, tensors, strict=True):
        made = None if target is None else _rewriting(first, target).of(name)
        if made is not None:
            yield _Part(made, tensor, names)


@dataclass(frozen=True)
class _Rewriting:
    """A pair of templates, ready for use; `beginning` is what all names of the first begin with."""

    beginning: str
    pattern: re.Pattern[str]
    offsets: Mapping[str, int]
    target: tuple[str | tuple[str, int], ...]

    def of(self, name: str) -> str | None:
        """The name by the second template, None if it is not of the first."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        values: dict[str, str | int] = {}
        for field, text in found.groupdict().items():
            values[field] = text if field in PATTERNS else int(text) - self.offsets[field]
        if any(isinstance(value, int) and value < 0 for value in values.values()):
            return None
        return "".join(_filled(part, values) for part in self.target)


@lru_cache(maxsize=16_384)
def _rewriting(source: str, target: str) -> _Rewriting:
    pattern, offsets = _compiled(source)
    beginning = next(part for part in _split(source) if isinstance(part, str))
    return _Rewriting(beginning, pattern, offsets, tuple(_split(target)))


def _filled(part: str | tuple[str, int], values: Mapping[str, str | int]) -> str:
    if isinstance(part, str):
        return part
    field, offset = part
    value = values[field]
    return str(value + offset) if isinstance(value, int) else value


def _split(template: str) -> Iterator[str | tuple[str, int]]:
    """The literals of a template and its fields, each with what is added to it; a literal first."""
    end = 0
    for found in _FIELD.finditer(template):
        yield template[end : found.start()]
        yield found.group(1), int(found.group(2) or 0)
        end = found.end()
    yield template[end:]


@lru_cache(maxsize=16_384)
def _compiled(template: str) -> tuple[re.Pattern[str], Mapping[str, int]]:
    parts = tuple(_split(template))
    pattern = "".join(
        re.escape(part) if isinstance(part, str) else f"(?P<{part[0]}>{PATTERNS.get(part[0], r'[0-9]{1,4}')})"
        for part in parts
    )
    return re.compile(pattern), {part[0]: part[1] for part in parts if not isinstance(part, str)}


# --- files ----------------------------------------------------------------------------------------


def without_prefix(state: StateDict) -> Iterator[tuple[str, StateDict]]:
    """The file as it is, and below each of the prefixes that most of its names share, with that prefix."""
    yield "", state
    for prefix in _prefixes(state):
        below, _, _ = strip_prefix(state, prefix, pointer="")
        yield prefix, below


def _prefixes(names: Collection[str]) -> tuple[str, ...]:
    """`backbone.`, `backbone.bottom_up.`, …: those that at least a third of the names begin with."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, min(len(parts), 4)):
            prefix = ".".join(parts[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    shared = [prefix for prefix, count in counts.items() if 3 * count >= len(names)]
    return tuple(sorted(shared, key=len)[:MAX_PREFIXES])
