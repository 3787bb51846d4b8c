"""Features from a timm module, by timm's kinds of wrapper, no deeper than the deepest one asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

Maps = dict[int, Tensor]
# timm's hooks leave their tensors in one place per device, so that two passes at once would mix them up.
_HOOKS = threading.Lock()


def collect(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """The features of these indices, in ascending order, as [n, c, h, w]."""
    return COLLECTORS.get(type(net).__name__, _collect_all)(net, images, wanted)


def unpooled(net: Any, images: Tensor) -> Tensor:
    """What a model without classifier and pooling gives: a map as [n, c, h, w], tokens or a vector."""
    output: Tensor = net(images)
    return _channels_first(net, output) if output.ndim == 4 else output


def _collect_list(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureListNet: modules in a row, some of which give a feature."""
    maps: Maps = {}
    current: Any = images
    for name, module in net.items():
        current = module(current)
        index = int(net.return_layers.get(name, -1))
        if index in wanted:
            maps[index] = _channels_first(net, _one_tensor(net, current))
        if len(maps) == len(wanted):
            break
    return maps


def _one_tensor(net: Any, output: Any) -> Tensor:
    """Some modules hand on several tensors; timm says whether the feature is the first or all of them."""
    if isinstance(output, tuple | list):
        return torch.cat(output, 1) if net.concat else output[0]
    tensor: Tensor = output
    return tensor


def _collect_getter(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureGetterNet: the model itself gives intermediate features, and stops after the last one."""
    features = net.model.forward_intermediates(
        images,
        indices=list(wanted),
        norm=net.norm,
        stop_early=True,
        output_fmt=net.output_fmt,
        intermediates_only=True,
    )
    return dict(zip(wanted, features, strict=True))


def _collect_efficientnet(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """EfficientNetFeatures and MobileNetV3Features: a stem (stage 0) and stages of blocks."""
    index_of = {info["stage"]: info["index"] for info in net.feature_info.get_dicts()}
    current = net.bn1(net.conv_stem(images))
    if hasattr(net, "act1"):
        current = net.act1(current)
    maps: Maps = {}
    for stage, block in enumerate([nn.Identity(), *net.blocks]):
        current = block(current)
        if index_of.get(stage) in wanted:
            maps[index_of[stage]] = current
        if len(maps) == len(wanted):
            break
    return maps


def _collect_hrnet(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """HighResolutionNetFeatures: the stem, or all branches and what widens those wanted."""
    features = net.forward_intermediates(
        images, indices=list(wanted), stop_early=True, intermediates_only=True
    )
    return dict(zip(wanted, features, strict=True))


class _Reached(Exception):
    """The deepest feature wanted is noted: the rest of the network need not run."""


def _stop(*_: Any) -> None:
    raise _Reached


def _collect_hooked(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureHookNet: timm's hooks note the features of a pass, which ends at the deepest one wanted."""
    names = {info["index"]: info["module"] for info in net.feature_info.get_dicts()}
    with _HOOKS:
        # It runs after timm's own hook of the module, which notes what the module gives.
        handle = _hooked_module(net, names[wanted[-1]]).register_forward_hook(_stop)
        try:
            with suppress(_Reached):
                net(images)
        finally:
            handle.remove()
            noted = net.hooks.get_output(images.device)
    return {index: _channels_first(net, noted[names[index]]) for index in wanted}


def _hooked_module(net: nn.Module, name: str) -> nn.Module:
    """The module that timm calls so: in the model as it was, or in one whose `blocks.0` has become `blocks_0`."""
    whole = dict(net.named_children()).get("body")
    return net.get_submodule(name.replace(".", "_", 1)) if whole is None else whole.get_submodule(name)


def _collect_all(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """Any other wrapper: every feature is computed, in the order of the indices."""
    features = dict(zip(net.feature_info.out_indices, net(images), strict=True))
    return {index: _channels_first(net, features[index]) for index in wanted}


def _channels_first(net: Any, feature: Tensor) -> Tensor:
    # Swin and its like give NHWC, and timm says so on the module; the service promises NCHW.
    return feature.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else feature


COLLECTORS: Mapping[str, Callable[[Any, Tensor, Sequence[int]], Maps]] = {
    "FeatureListNet": _collect_list,
    "FeatureGetterNet": _collect_getter,
    "EfficientNetFeatures": _collect_efficientnet,
    "MobileNetV3Features": _collect_efficientnet,
    "FeatureHookNet": _collect_hooked,
    "HighResolutionNetFeatures": _collect_hrnet,
}
