"""Checkpoints of timm's models, in any of the names that they are saved with, into a `TimmBackbone`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.backbones.building import SkipInitialisers
from service.backbones.timm_creation import Architecture, Capture
from service.backbones.timm_network import TimmBackbone, assemble
from service.checkpoints.keys import strip_prefix
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NAMED_KEYS = 8
OPENMMLAB_PREFIX = "timm_model."
MAX_PREFIX_PARTS = 4


def load_checkpoint(
    architecture: Architecture,
    indices: tuple[int, ...] | None,
    state: StateDict,
    ref: WeightsRef,
    *,
    nodes: Callable[[], Collection[str]],
) -> tuple[TimmBackbone, LoadedKeys]:
    """The network with the tensors of a checkpoint.

    Names may be those of the whole timm model, of its `features_only` form (`stages_0.…`), or what timm converts
    by itself; OpenMMLab's `timm_model.` before them is taken off. Entries that only features other than the
    selected ones need may be missing: they are reported.

    Args:
        architecture: what to build.
        indices: of all its features, where they are known.
        state: the file.
        ref: how the config names it.
        nodes: gives the nodes of the selected features; asked only when an entry is missing.

    Raises:
        CheckpointMismatch: an entry that a selected feature needs is missing, or one has the wrong shape.
    """
    bare, prefix, foreign = _without_prefix(state, ref)
    backbone, fits = _filled(architecture, indices, bare)
    if fits is not None and not fits.loaded:
        names = (*backbone.names, *backbone.names.values())
        bare, guessed, foreign = strip_prefix(bare, _likeliest_prefix(bare, names), pointer=ref.pointer)
        prefix += guessed
        backbone, fits = _filled(architecture, indices, bare) if guessed else (backbone, fits)
    if fits is None:
        raise CheckpointMismatch(
            ref.pointer, "timm cannot convert the names of this file to those of the model"
        )
    lacking = _needed(backbone, nodes(), fits.missing) if fits.missing else ()
    _refuse_misfit(fits, lacking, ref)
    return backbone, LoadedKeys(fits.loaded, fits.missing, (*fits.unexpected, *foreign), prefix)


def _filled(
    architecture: Architecture, indices: tuple[int, ...] | None, state: StateDict
) -> tuple[TimmBackbone, _Fits | None]:
    """The network with what fits of a file in it; None in place of the fit if timm could not convert the names."""
    capture = Capture(state=state)
    with SkipInitialisers():
        backbone = assemble(architecture, capture, indices)
    if _names_are_wrapped(backbone, state):
        return backbone, _fit_wrapped(backbone, state)
    return backbone, _fit_whole(backbone, capture)


@dataclass(frozen=True)
class _Fits:
    loaded: int
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    unexpected: tuple[str, ...]


def _without_prefix(state: StateDict, ref: WeightsRef) -> tuple[StateDict, str, tuple[str, ...]]:
    """What the config's prefix and OpenMMLab's wrapper put before the names, taken off."""
    bare, prefix, foreign = strip_prefix(state, ref.prefix, pointer=ref.pointer)
    if not any(name.startswith(OPENMMLAB_PREFIX) for name in bare):
        return bare, prefix, foreign
    inner, wrapper, beside = strip_prefix(bare, OPENMMLAB_PREFIX, pointer=ref.pointer)
    return inner, prefix + wrapper, (*foreign, *(prefix + name for name in beside))


def _likeliest_prefix(state: StateDict, names: Collection[str]) -> str:
    """The prefix under which most of the file's keys are names of the network; empty if there is none."""
    known, found = set(names), Counter[str]()
    for name in state:
        parts = name.split(".")
        depths = range(1, min(len(parts), MAX_PREFIX_PARTS + 1))
        found.update(".".join(parts[:depth]) for depth in depths if ".".join(parts[depth:]) in known)
    return found.most_common(1)[0][0] if found else ""


def _names_are_wrapped(backbone: TimmBackbone, state: StateDict) -> bool:
    """Whether more keys of the file are names of the wrapped module than names of the whole model."""
    whole = set(backbone.names.values())
    return sum(name in backbone.names for name in state) > sum(name in whole for name in state)


def _fit_wrapped(backbone: TimmBackbone, state: StateDict) -> _Fits:
    """Load a file that was saved from the `features_only` form."""
    own = backbone.net.state_dict()
    fitting = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    backbone.net.load_state_dict(fitting, strict=False)
    return _Fits(
        loaded=len(fitting),
        missing=_counted(backbone.names[name] for name in own if name not in state),
        wrong_shape=tuple(name for name in state if name in own and name not in fitting),
        unexpected=tuple(name for name in state if name not in own),
    )


def _fit_whole(backbone: TimmBackbone, capture: Capture) -> _Fits | None:
    """What timm's own loading made of a file; None if it could not convert it."""
    if capture.failure is not None or capture.state is None:
        return None
    kept = set(backbone.names.values())
    without = {*capture.missing, *capture.wrong_shape}
    cut = [name for name in capture.offered if name in capture.tensors and name not in kept]
    known = {*capture.tensors, *capture.classifiers} - kept
    dropped = [name for name in capture.state if name in known and name not in capture.offered]
    return _Fits(
        # torch fills in the counters of batch norms that a file has not.
        loaded=len(kept.intersection(capture.offered) - without),
        missing=_counted(name for name in capture.missing if name in kept),
        wrong_shape=tuple(name for name in capture.wrong_shape if name in kept),
        unexpected=tuple(dict.fromkeys((*capture.unexpected, *cut, *dropped))),
    )


def _counted(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.endswith("num_batches_tracked"))


def _refuse_misfit(fits: _Fits, lacking: tuple[str, ...], ref: WeightsRef) -> None:
    if not lacking and not fits.wrong_shape:
        return
    parts = [("missing", lacking), ("of the wrong shape", fits.wrong_shape)]
    detail = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)
    raise CheckpointMismatch(
        ref.pointer, detail, missing=lacking, wrong_shape=fits.wrong_shape, unexpected=fits.unexpected
    )


def _needed(backbone: TimmBackbone, nodes: Collection[str], missing: Sequence[str]) -> tuple[str, ...]:
    """Those of `missing` that a selected feature depends on."""
    needed = frozenset[str]().union(*(backbone.needs(node) for node in nodes))
    return tuple(name for name in missing if name in needed)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMED_KEYS])
    return shown + (f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else "")
