"""Networks without weights: on the meta device to describe them, or with memory that a checkpoint fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from service.backbones.base import Backbone
from service.config.spec import Description, PreprocessDefaults

N = TypeVar("N", bound=nn.Module)


def on_meta(make: Callable[[], N]) -> N:
    """The network without memory: shapes and names only."""
    with torch.device("meta"):
        return make()


def unset(make: Callable[[], N]) -> N:
    """The network on the default device with memory that holds anything; a strict load fills all of it.

    The counters of batch norms, which checkpoints may leave out, are set to 0.
    """
    network = on_meta(make).to_empty(device=torch.get_default_device())
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network


def describe(
    make: Callable[[], Backbone],
    *,
    in_channels: int,
    input_defaults: PreprocessDefaults | None = None,
    prefix_tokens: int = 0,
) -> Description:
    """Features and size of the network that `make` builds; takes milliseconds and no memory."""
    network = on_meta(make)
    tensors = (*network.parameters(), *network.buffers())
    return Description(
        features=network.features,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        in_channels=in_channels,
        input=input_defaults or PreprocessDefaults(),
        tensors=len(list(network.parameters())),
        prefix_tokens=prefix_tokens,
    )
