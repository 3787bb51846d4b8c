"""Deterministic weights and inputs from key names: the same bytes wherever a pack is made or checked.

A tensor's values follow from its name, shape and dtype alone: PCG64 seeded with the CRC-32 of the name, drawn
in float64 in C order, scaled by a rule, cast once. There are two recipes, one for each kind of pack; they
differ in which rule a name falls under. The expected outputs are outputs of the real libraries, filled this
way; their versions are inside each pack.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Draw = Callable[[np.random.Generator, tuple[int, ...], float], NDArray[np.float64]]


def _normal(mean: float, std: float) -> Draw:
    def draw(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float64]:
        return mean + std * random.standard_normal(shape)

    return draw


def _variance(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float64]:
    return random.uniform(0.5, 1.5, shape)


def _fan_in(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float64]:
    return random.standard_normal(shape) * (gain * math.sqrt(2.0 / max(1, math.prod(shape[1:]))))


def _offset(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float64]:
    return 0.02 * _fan_in(random, shape, gain)


def _zero(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float64]:
    return np.zeros(shape)


DRAWS: Mapping[str, Draw] = {
    "zero": _zero,
    "variance": _variance,
    "fan_in": _fan_in,
    "offset": _offset,
    "input": _normal(0, 1),
    "small": _normal(0, 0.02),
    "bias": _normal(0, 0.1),
    "gain": _normal(1, 0.1),
    "residual_scale": _normal(0.5, 0.1),
    "logit_scale": _normal(math.log(10), 0.1),
}

_OPENMMLAB_SCALE = re.compile(
    r"gamma|gamma_?\d+|gamma_\w+|ls\d*|layer_?scale\w*|token_layer_scale\w*",
)
_OPENMMLAB_SMALL = re.compile(
    r"pos_embed|pos_token|position|rel_pos|relative|cls_token|dist_token|dist_tkn|mask_token|register_token"
    r"|absolute_pos|class_token|prompt|query_token|attention_biases"
)
_TIMM_COMPUTED = re.compile(
    r"attn_mask|relative_coords_table|relative_position_index|attention_bias_idxs|inv_freq|freqs(_cos|_sin)?"
    r"|bands|pos_enc|rel_coords|rel_pos_indices|fixed_pos|pixel_mean|pixel_std|dilation_grids|k_bias|periods"
)
_TIMM_SMALL = re.compile(
    r"pos_embed|pos_emb|pos_embedding|position_embedding|rel_pos|relative_position|relative_pos|cls_token"
    r"|class_token|dist_token|reg_token|register|mask_token|attention_bias|query_embed"
)
_TIMM_SCALE = re.compile(
    r"gamma|gamma_?\d|layer_scale(_?\d)?|ls\d?|scale|logit_scale|alpha|beta|temperature|gain|skip_gain|rezero"
)
_STATISTICS = {"num_batches_tracked": "zero", "running_mean": "bias", "running_var": "variance"}
_OPENMMLAB_SCALARS = {
    "temperature": "gain",
    "temperature1": "gain",
    "alpha": "gain",
    "logit_scale": "logit_scale",
}


@dataclass(frozen=True)
class Entry:
    """One entry of a state dict, by its name without any prefix."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))


def openmmlab_rule(entry: Entry) -> str | None:
    """The rule for an entry of an OpenMMLab pack; None for what a network computes itself."""
    leaf = entry.leaf
    if leaf == "num_batches_tracked" or not entry.is_float:
        return _STATISTICS.get(leaf)
    if leaf in _STATISTICS:
        return _STATISTICS[leaf]
    if any(_OPENMMLAB_SCALE.fullmatch(part) for part in entry.name.split(".")):
        return "residual_scale"
    if _OPENMMLAB_SMALL.search(leaf):
        return "small"
    if leaf.endswith("bias") or leaf in ("b", "beta"):
        return "bias"
    if leaf.endswith("weight") or leaf == "w":
        return "fan_in" if len(entry.shape) >= 2 else "gain"
    return _OPENMMLAB_SCALARS.get(leaf, "gain" if leaf.startswith("scale") else "bias")


def timm_rule(entry: Entry) -> str | None:
    """The rule for an entry of a timm or torchvision pack; None for what a network computes itself."""
    leaf = entry.leaf
    if leaf in _STATISTICS:
        return _STATISTICS[leaf]
    if not entry.is_float or _TIMM_COMPUTED.fullmatch(leaf):
        return None
    if _TIMM_SMALL.search(leaf):
        return "small"
    if _TIMM_SCALE.fullmatch(leaf):
        return "residual_scale"
    if leaf.endswith("bias"):
        return "bias"
    if len(entry.shape) <= 1:
        return "gain" if leaf.endswith("weight") else "residual_scale"
    return "fan_in"


def detectron2_rule(entry: Entry) -> str | None:
    """The rule for an entry of a detectron2 or detrex pack: timm's, with the offsets of deformable layers small."""
    if "offset" not in entry.name:
        return timm_rule(entry)
    return "offset" if len(entry.shape) > 1 else "small"


def fill(entry: Entry, rule: str, gain: float = 1.0) -> Array:
    """The values of an entry under a rule; `gain` multiplies convolutions and linear layers."""
    random = np.random.Generator(np.random.PCG64(zlib.crc32(entry.name.encode())))
    return DRAWS[rule](random, entry.shape, gain).astype(entry.dtype)


def make_input(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """A normal input tensor."""
    return fill(Entry(name, tuple(shape)), "input").astype(np.float32)
