"""`backbone-service convert`: a checkpoint file from one library's names into another's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from service.backbones.translation import all_namings
from service.checkpoints.keys import clipped
from service.checkpoints.layouts import Naming, Renamed, without_prefix
from service.checkpoints.read import StateDict, read_checkpoint
from service.errors import CheckpointMismatch, CheckpointUnavailable, CheckpointUnreadable

INPUT: Final = "#/input"
OUTPUT: Final = "#/output"
SHOWN_STRANGERS: Final = 3
# What a classifier is called, whose norm may be the network's.
HEADS: Final = frozenset({"head", "heads", "head_dist", "classifier", "fc"})
# What libraries store though it follows from the network.
COMPUTED: Final = frozenset(
    {
        "relative_position_index",
        "relative_coords_table",
        "attention_bias_idxs",
        "attn_mask",
        "num_batches_tracked",
    }
)


@dataclass(frozen=True)
class Conversion:
    """A file under another library's names.

    Attributes:
        kind: the network that was recognised.
        source: the library whose names the file has.
        target: the library whose names the tensors have now.
        prefix: what stood before the names in the file.
        renamed: the tensors, where they come from, and the names below the prefix that have no counterpart.
    """

    kind: str
    source: str
    target: str
    prefix: str
    renamed: Renamed


def libraries() -> tuple[str, ...]:
    """All libraries that some network is known in, sorted."""
    return tuple(sorted({library for naming in all_namings() for library in naming.libraries()}))


def convert(state: StateDict, target: str, source: str | None = None) -> Conversion:
    """The tensors of a file by the names that `target` has for the same network.

    Args:
        state: as read from the file, in any library's names, with or without a prefix (`backbone.`).
        target: a library of `libraries()`.
        source: the library whose names the file has; found out where it is None.

    Raises:
        CheckpointMismatch: the file is of no network that is known, not in the names of `source`, of one that is
            only like a known one, or of one that `target` has not, or has with other numbers.
    """
    found = max(_recognised(state, source), key=lambda one: _likelihood(one, target), default=None)
    if found is None:
        names = f"{source}'s names" if source else f"the names of {', '.join(libraries())}"
        raise CheckpointMismatch(INPUT, f"is not a network that is known by {names}")
    naming, library, prefix, below = found
    differs = naming.differs(library, target)
    renamed = naming.translate(below, library, target)
    if renamed is None:
        has = ", ".join(naming.libraries())
        raise CheckpointMismatch(
            OUTPUT, f"{target} has no names for {naming.kind}, which is known by those of {has}"
        )
    if differs is not None:
        raise CheckpointMismatch(OUTPUT, f"{naming.kind} is another network there: {differs}")
    if strangers := _strangers(renamed):
        more = f" and {len(strangers) - SHOWN_STRANGERS} more" if len(strangers) > SHOWN_STRANGERS else ""
        shown = ", ".join(clipped(name) for name in strangers[:SHOWN_STRANGERS])
        raise CheckpointMismatch(
            INPUT, f"is like a {naming.kind} by {library}'s names, which has not {shown}{more}"
        )
    return Conversion(naming.kind, library, target, prefix, renamed)


def _strangers(renamed: Renamed) -> list[str]:
    """Names without a counterpart among those that have one: of another network, not of a head behind it."""
    inside = {name.partition(".")[0] for origins in renamed.origins.values() for name in origins} - HEADS
    return [
        name
        for name in renamed.left
        if name.partition(".")[0] in inside and name.rpartition(".")[2] not in COMPUTED
    ]


def _recognised(state: StateDict, source: str | None) -> Iterator[tuple[Naming, str, str, StateDict]]:
    for prefix, below in without_prefix(state):
        for naming in all_namings():
            wanted = naming.libraries() if source is None else (source,)
            for library in wanted:
                if naming.recognises(below, library):
                    yield naming, library, prefix, below


def _likelihood(found: tuple[Naming, str, str, StateDict], target: str) -> tuple[int, bool, int, int]:
    """More names with a counterpart, then a network that the target has, more marks, a longer prefix taken off."""
    naming, library, prefix, below = found
    layout = naming.layout(library)
    known = len(layout.to_ours(below).state) if layout is not None else 0
    return known, target in naming.libraries(), len(naming.marks), len(prefix)


def convert_file(
    source_path: Path,
    target_path: Path,
    target: str,
    *,
    source: str | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> Conversion:
    """Convert a file into a new one, which is there whole or not at all.

    Args:
        source_path: any file that is served as a checkpoint.
        target_path: its suffix says in what form: `.safetensors`, or `.pth` or `.pt`.
        target, source: as for `convert`.
        prefix: put before every name that is written.
        overwrite: whether a file that is there is replaced.

    Raises:
        CheckpointMismatch: as for `convert`.
        CheckpointUnavailable, CheckpointUnreadable: the source is not there or not a checkpoint, or the target is there
            or of no form that is written.
        OSError: the target cannot be written.
    """
    writer = WRITERS.get(target_path.suffix.lower())
    if writer is None:
        raise CheckpointUnreadable(OUTPUT, f"{target_path.name}: the output is one of {', '.join(WRITERS)}")
    if target_path.exists() and not overwrite:
        raise CheckpointUnavailable(OUTPUT, f"{target_path.name} is there already")
    if not source_path.is_file():
        raise CheckpointUnavailable(INPUT, f"no file {str(source_path)!r}")
    done = convert(read_checkpoint(source_path, pointer=INPUT), target, source)
    state = {prefix + name: tensor.contiguous().clone() for name, tensor in done.renamed.state.items()}
    with tempfile.TemporaryDirectory(dir=target_path.parent) as folder:
        whole = Path(folder) / target_path.name
        writer(state, whole)
        whole.replace(target_path)
    return done


WRITERS: Final[Mapping[str, Callable[[StateDict, Path], None]]] = {
    ".safetensors": safetensors.torch.save_file,
    ".pth": torch.save,
    ".pt": torch.save,
}
