"""Networks without weights: on the meta device to describe them, or with memory that a checkpoint fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from service.backbones.base import Backbone
from service.backbones.shapes import ShapeRules
from service.config.spec import Description, FeatureInfo, PreprocessDefaults

N = TypeVar("N", bound=nn.Module)

# What a library's constructor raises when it is given arguments that it cannot build from.
CONSTRUCTOR_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    NotImplementedError,
    ArithmeticError,
)


def on_meta(make: Callable[[], N]) -> N:
    """The network without memory: shapes and names only."""
    with torch.device("meta"), ShapeRules():
        return make()


def unset(make: Callable[[], N]) -> N:
    """The network on the default device with memory that holds anything; a strict load fills all of it.

    The counters of batch norms, which checkpoints may leave out, are set to 0.
    """
    network = on_meta(make)
    device = torch.get_default_device()
    if device.type == "meta":
        return network
    with _PlainMemory():
        network = network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network


class _PlainMemory(TorchFunctionMode):
    """Memory for what is on the meta device without torch's description of it in Python, which imports sympy."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty_like and args[0].is_meta and set(kwargs or ()) == {"device"}:
            like: Tensor = args[0]
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def initialised(make: Callable[[], N]) -> N:
    """The network on the default device as its constructor initialises it; on the meta device there is nothing to."""
    if torch.get_default_device().type != "meta":
        return make()
    with ShapeRules(), SkipInitialisers():
        return make()


class Size(NamedTuple):
    """How large a network is: numbers, the parameters that they are in, and bytes with buffers.

    A parameter with several names counts once in `parameters`, and under each of its names in `tensors`, as in
    `FreezeReport.of`.
    """

    parameters: int
    tensors: int
    bytes: int


def size_of(network: nn.Module) -> Size:
    """The size of a network on any device."""
    held = (*network.parameters(), *network.buffers())
    return Size(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        tensors=sum(1 for _ in network.named_parameters(remove_duplicate=False)),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
    )


def describe(
    make: Callable[[], Backbone],
    *,
    in_channels: int,
    input_defaults: PreprocessDefaults | None = None,
    prefix_tokens: int = 0,
) -> Description:
    """Features and size of the network that `make` builds; takes milliseconds and no memory."""
    network = on_meta(make)
    return description(
        network,
        network.features,
        in_channels=in_channels,
        input_defaults=input_defaults,
        prefix_tokens=prefix_tokens,
    )


def description(
    network: nn.Module,
    features: tuple[FeatureInfo, ...],
    *,
    in_channels: int,
    input_defaults: PreprocessDefaults | None = None,
    fixed_input: bool = False,
    prefix_tokens: int = 0,
) -> Description:
    """These features with the size of the network that gives them."""
    size = size_of(network)
    return Description(
        features=features,
        parameters=size.parameters,
        bytes=size.bytes,
        in_channels=in_channels,
        input=input_defaults or PreprocessDefaults(),
        fixed_input=fixed_input,
        tensors=size.tensors,
        prefix_tokens=prefix_tokens,
    )


class SkipInitialisers(TorchFunctionMode):
    """Leaves parameters, and everything on the meta device, as allocated: the numbers come later or never."""

    FILLS = frozenset(
        {
            Tensor.normal_,
            Tensor.uniform_,
            Tensor.fill_,
            Tensor.zero_,
            Tensor.mul_,
            Tensor.add_,
            Tensor.clamp_,
            Tensor.erfinv_,
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.constant_,
            nn.init.ones_,
            nn.init.zeros_,
            nn.init.kaiming_normal_,
            nn.init.kaiming_uniform_,
            nn.init.trunc_normal_,
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter) or (isinstance(target, Tensor) and target.is_meta):
                return target
        return func(*args, **(kwargs or {}))
