"""The norms `norm0`, `norm1`, … that OpenMMLab puts on each output of ConvNeXt, Swin and their like.

A checkpoint of a classifier has only the last of them: the others start at 1 and 0 there, and so here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

OUTPUT_NORM = re.compile(r"(?:.*\.)?norm(\d+)\.(?:weight|bias)")


def asked_stages(
    indices: Sequence[int], strides: Sequence[int] | None, stage_strides: Sequence[int]
) -> tuple[int, ...]:
    """The stages that `out_indices`, or `strides` instead of them, ask for; what is out of range is left out."""
    count = len(stage_strides)
    if strides is not None:
        return tuple(stage for stage, stride in enumerate(stage_strides) if stride in strides)
    found = {index if index >= 0 else index + count for index in indices}
    return tuple(sorted(stage for stage in found if 0 <= stage < count))


def without_output_norms(network: nn.Module) -> frozenset[str]:
    """Names of the weights of a network but those of its output norms."""
    return frozenset(name for name in network.state_dict() if not _is_output_norm(name))


def may_lack_output_norms(state: Iterable[str], *, last: int | None) -> Callable[[str], bool]:
    """Which entries a file may leave out: the output norms before the `last` stage, if it has none of them.

    A file with some of them is damaged, not a classifier's. Where `last` is None, that of the last stage may
    be absent too.
    """
    stages = {int(match[1]) for name in state if (match := _top_level(name))}
    has_early = any(stage != last for stage in stages)

    def optional(name: str) -> bool:
        match = OUTPUT_NORM.fullmatch(name) if _is_output_norm(name) else None
        return match is not None and not has_early and int(match[1]) != last

    return optional


def _is_output_norm(name: str) -> bool:
    return re.fullmatch(r"norm\d+\.(weight|bias)", name) is not None


def _top_level(name: str) -> re.Match[str] | None:
    # `backbone.norm0.weight` is an output norm, `stages.0.blocks.0.norm1.weight` is not.
    return (
        None
        if re.search(r"(?:^|\.)(?:blocks|layers|network|stages)\.\d+\.", name)
        else OUTPUT_NORM.fullmatch(name)
    )
