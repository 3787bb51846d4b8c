"""The arithmetic of a forward pass, counted by the shapes of its products: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Count = Callable[..., int]


def products_of(func: Any, made: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Multiplications with an addition of one call; 0 of what is no product of tensors.

    Args:
        func: of torch, or as torch dispatches it (`torch.ops.aten.mm.default`).
        made: what it gave.
    """
    packet = getattr(func, "overloadpacket", func)
    # Deformable convolution is an operator that torchvision brings along when it is imported.
    deforms = str(packet) == "torchvision.deform_conv2d"
    count = _of_convolution if deforms else PRODUCTS.get(packet)
    first = made[0] if isinstance(made, tuple) and made else made
    return count(first, *args, **kwargs) if count is not None and isinstance(first, Tensor) else 0


def _of_convolution(made: Tensor, _x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Each number made is the sum over the kernel of one output channel, [o, c / groups, *sides]."""
    return made.numel() * math.prod(weight.shape[1:])


def _of_transposed(_made: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Each number given goes into the kernel of one input channel, [c, o / groups, *sides]."""
    return x.numel() * math.prod(weight.shape[1:])


def _of_any_convolution(made: Tensor, x: Tensor, weight: Tensor, *more: Any, **_: Any) -> int:
    is_transposed = bool(more[4])  # after bias, stride, padding and dilation
    return _of_transposed(made, x, weight) if is_transposed else _of_convolution(made, x, weight)


def _of_product(made: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return made.numel() * x.shape[-1]


def _of_added_product(made: Tensor, _added: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return made.numel() * x.shape[-1]


def _of_attention(made: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Queries [..., l, e] by keys [..., s, e], and that by values [..., s, v]."""
    return (query.numel() + made.numel()) * key.shape[-2]


def _of_einsum(made: Tensor, equation: str, operands: Sequence[Tensor]) -> int:
    """Each number made is a sum over the letters that it has not; `...` has none of those."""
    inputs, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    words = inputs.split(",")
    sides: dict[str, int] = {}
    for word, operand in zip(words, operands, strict=True):
        sides |= dict(zip(reversed(word), reversed(operand.shape), strict=False))
    return made.numel() * math.prod(side for letter, side in sides.items() if letter not in output)


aten = torch.ops.aten
PRODUCTS: Mapping[Any, Count] = {
    # what `ShapeRules` answers for, so that it is never dispatched
    torch.conv2d: _of_convolution,
    F.linear: _of_product,
    torch.matmul: _of_product,
    Tensor.matmul: _of_product,
    F.scaled_dot_product_attention: _of_attention,
    # what is dispatched: in inference mode that is what was called, and otherwise what it is made of
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _of_convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d), _of_transposed),
    aten.convolution: _of_any_convolution,
    aten.scaled_dot_product_attention: _of_attention,
    aten.einsum: _of_einsum,
    **dict.fromkeys((aten.linear, aten.matmul, aten.mm, aten.bmm), _of_product),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _of_added_product),
}
