"""Caffe2's names of a ResNet's weights, which detectron2's published `.pkl` files have, in detectron2's own names.

    conv1_w, res_conv1_bn_s          stem.conv1.weight, stem.conv1.norm.weight
    res4_11_branch2a_w               res4.11.conv1.weight
    res4_0_branch1_bn_riv            res4.0.shortcut.norm.running_var
    pred_w                           linear.weight

The rules are those of detectron2's `checkpoint/c2_model_loading.py`. Most of these files have batch norms fused into
a scale and a bias, without statistics; a FrozenBN then takes them as 0 and 1, as detectron2 does.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import torch

from service.checkpoints.keys import clipped
from service.errors import CheckpointMismatch

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

_LEAVES: Final = {
    "w": "weight",
    "b": "bias",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_gamma": "norm.weight",
    "bn_beta": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
    "bn_running_mean": "norm.running_mean",
    "bn_running_var": "norm.running_var",
    "gn_s": "norm.weight",
    "gn_b": "norm.bias",
}
_BRANCHES: Final = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_LEAF: Final = "|".join(sorted(_LEAVES, key=len, reverse=True))
_STEM: Final = re.compile(rf"(?:res_)?conv1_({_LEAF})")
_BLOCK: Final = re.compile(rf"res([2-5])_([0-9]{{1,4}})_branch({'|'.join(_BRANCHES)})_({_LEAF})")
_CLASSIFIER: Final = {"pred_w": "linear.weight", "pred_b": "linear.bias"}
_MARK: Final = re.compile(r"res2_0_branch2a_w|conv1_w")


def is_caffe2(names: Collection[str]) -> bool:
    """Whether a file has Caffe2's names of a ResNet."""
    return any(_MARK.fullmatch(name) for name in names)


def detectron2_name(name: str) -> str:
    """detectron2's name for one of Caffe2's; a name that is not of a ResNet stays."""
    if stem := _STEM.fullmatch(name):
        return f"stem.conv1.{_LEAVES[stem[1]]}"
    if block := _BLOCK.fullmatch(name):
        return f"res{block[1]}.{int(block[2])}.{_BRANCHES[block[3]]}.{_LEAVES[block[4]]}"
    return _CLASSIFIER.get(name, name)


def renamed(state: StateDict, entries: Collection[str], *, pointer: str) -> StateDict:
    """The tensors of a Caffe2 file under detectron2's names, where those are `entries` of the network.

    Raises:
        CheckpointMismatch: two of the file's names mean one of detectron2's.
    """
    made: StateDict = {}
    for name, tensor in state.items():
        new = detectron2_name(name)
        if new in made:
            raise CheckpointMismatch(pointer, f"two keys of the file are {clipped(new)}")
        made[new if new in entries else name] = tensor
    return made


def with_statistics(state: StateDict, norms: Collection[str]) -> StateDict:
    """The tensors, and a mean of 0 and a variance of 1 for each of the `norms` that has a scale and no statistics."""
    made = dict(state)
    for norm in norms:
        scale = state.get(f"{norm}.weight")
        if scale is None or f"{norm}.running_mean" in state or f"{norm}.running_var" in state:
            continue
        made[f"{norm}.running_mean"] = torch.zeros_like(scale)
        made[f"{norm}.running_var"] = torch.ones_like(scale)
    return made
