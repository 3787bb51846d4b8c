"""Shapes of a network on the meta device without what torch works out in Python.

torch describes most operators on the meta device by Python references. The first of them in a process imports torch's
compiler and sympy (a second of CPU, 150 MB that stay), and each costs a fraction of a millisecond, a thousand times in
a network. The rules here say the same for the operators that backbones are made of, where that is plain arithmetic;
whatever else, or is not plain, goes to torch, which also says what is wrong with what does not fit.

Source of the arithmetic: the formulas in the documentation of `torch.nn` (`Conv2d`, `MaxPool2d`, …); of the layouts:
what torch's own meta kernels give, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from service.errors import TooLarge

Rule = Callable[..., Tensor | None]
Sides = int | Sequence[int]
# Calls of torch while one network is built or run on the meta device, 10 to 20 µs each. timm's MaxViT-XL at 512 pixels
# has 31,226, mmpretrain's EfficientNet-L2 12,716 and most have 3,000; a config that asks for every bound of its type
# at once had 407,541.
MAX_STEPS = 60_000


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which networks on the meta device are run for the shapes of what they give."""
    with torch.inference_mode(), torch.device("meta"), ShapeRules():
        yield


class ShapeRules(TorchFunctionMode):
    """Answers for tensors on the meta device by a rule where there is one.

    A rule that gives None leaves the call to torch. Every call takes its time, and so there may only be so many:
    TooLarge ends a network, or a forward pass, that has `MAX_STEPS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = MAX_STEPS

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise TooLarge(f"the network takes more than {MAX_STEPS:,} steps to build or to run")
        rule = RULES.get(func)
        # torch.fx traces with what is no tensor.
        if rule is not None and args and isinstance(args[0], Tensor | Sequence):
            made = rule(*args, **(kwargs or {}))
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))


def _made(like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A contiguous tensor; None where a side is not there."""
    if not like.is_meta or min(shape, default=1) < 1:
        return None
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """As `torch.empty_like`: the layout too, where memory has no gaps."""
    if not isinstance(x, Tensor) or not x.is_meta:
        return None
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _is_dense(x) else None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements of a tensor fill their memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _same_floats(x: Tensor, *more: Any, **options: Any) -> Tensor | None:
    """What keeps the type of floats, and would make some of whole numbers."""
    return _same(x, *more, **options) if isinstance(x, Tensor) and x.is_floating_point() else None


def _contiguous(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _made(x, x.shape)


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], *_: Any, **__: Any) -> Tensor | None:
    return _made(x, x.shape) if tuple(x.shape[-len(normalized_shape) :]) == tuple(normalized_shape) else None


def _elementwise(x: Tensor, other: Any, **options: Any) -> Tensor | None:
    """Arithmetic of two tensors of one type, or of one with a number that leaves its type."""
    if not isinstance(x, Tensor) or not x.is_meta or x.dtype == torch.bool or options:
        return None
    if isinstance(other, int | float):
        return _same(x) if x.is_floating_point() or type(other) is int else None
    if not isinstance(other, Tensor) or not other.is_meta or other.dtype != x.dtype:
        return None
    shape = _broadcast(x.shape, other.shape)
    if shape is None:
        return None
    # The first that is not stretched decides the layout.
    whole = next((operand for operand in (x, other) if operand.shape == shape), None)
    same = None if whole is None else _same(whole)
    return _mixed(x.dtype, shape, (x, other)) if same is None else same


def _mixed(dtype: torch.dtype, shape: tuple[int, ...], operands: Sequence[Tensor]) -> Tensor:
    """Memory in the order of the operands': sides by their strides in the first operand that tells two apart.

    Source: `TensorIteratorBase::reorder_dimensions` of ATen, an insertion sort that leaves what nobody tells apart.
    """
    strides = [_stretched_strides(operand, len(shape)) for operand in operands]
    order = list(reversed(range(len(shape))))
    for place in range(1, len(order)):
        moved = place
        for before in reversed(range(place)):
            larger = _compare_sides(order[before], order[moved], shape, strides)
            if larger < 0:
                break
            if larger > 0:
                order[before], order[moved] = order[moved], order[before]
                moved = before
    found, step = [0] * len(shape), 1
    for side in order:
        found[side], step = step, step * shape[side]
    return torch.empty_strided(shape, found, dtype=dtype, device="meta")


def _stretched_strides(x: Tensor, rank: int) -> tuple[int, ...]:
    """Strides as of a shape of this rank; 0 where a side of 1 stands for all."""
    own = (stride if side > 1 else 0 for side, stride in zip(x.shape, x.stride(), strict=True))
    return (0,) * (rank - x.ndim) + tuple(own)


def _compare_sides(first: int, second: int, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """Above 0 where the first side is further out in memory than the second, below 0 where further in."""
    for own in strides:
        if own[first] and own[second] and own[first] != own[second]:
            return 1 if own[first] > own[second] else -1
        if own[first] and own[first] == own[second] and shape[first] > shape[second]:
            return 1
    return 0


def _divided(x: Tensor, other: Any, **options: Any) -> Tensor | None:
    return _elementwise(x, other, **options) if isinstance(x, Tensor) and x.is_floating_point() else None


def _compared(x: Tensor, other: Any) -> Tensor | None:
    made = _elementwise(x, other)
    return (
        None
        if made is None
        else torch.empty_strided(made.shape, made.stride(), dtype=torch.bool, device="meta")
    )


def _clamped(x: Tensor, *limits: Any, **named: Any) -> Tensor | None:
    plain = all(limit is None or isinstance(limit, int | float) for limit in (*limits, *named.values()))
    return _same_floats(x) if plain else None


def _elementwise_in_place(x: Tensor, other: Any, **options: Any) -> Tensor | None:
    made = _elementwise(x, other, **options)
    return x if made is not None and made.shape == x.shape else None


def _broadcast(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that two shapes have together; None if they have none."""
    rank = max(len(first), len(second))
    pairs = zip(
        (1,) * (rank - len(first)) + tuple(first), (1,) * (rank - len(second)) + tuple(second), strict=True
    )
    sides = [(a, b) for a, b in pairs]
    if any(a != b and 1 not in (a, b) for a, b in sides):
        return None
    return tuple(max(a, b) for a, b in sides)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None = None,
    stride: Sides = 1,
    padding: Sides | str = 0,
    dilation: Sides = 1,
    groups: int = 1,
    **options: Any,
) -> Tensor | None:
    """[n, c, h, w] by a kernel [o, c / groups, kh, kw]."""
    plain = x.ndim == 4 and weight.ndim == 4 and not isinstance(padding, str) and x.dtype == weight.dtype
    if options or not plain or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    sides = _windows(x.shape[2:], weight.shape[2:], stride, padding, dilation, ceil_mode=False)
    return _made(x, (x.shape[0], weight.shape[0], *sides))


def _windows(
    sides: Sequence[int], kernel: Sides, stride: Sides, padding: Any, dilation: Sides, *, ceil_mode: bool
) -> tuple[int, ...]:
    """How many places a window has along each of two sides."""
    found = []
    each = zip(sides, *map(_pair, (kernel, stride, padding, dilation)), strict=True)
    for side, size, step, pad, spread in each:
        room = side + 2 * pad - spread * (size - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        # The last window starts inside the image or its padding to the left.
        found.append(count - 1 if ceil_mode and (count - 1) * step >= side + pad else count)
    return tuple(found)


def _pair(sides: Sides) -> tuple[int, ...]:
    if isinstance(sides, int):
        return sides, sides
    return tuple(sides) * 2 if len(sides) == 1 else tuple(sides)


def _max_pool2d(
    x: Tensor,
    kernel_size: Sides,
    stride: Sides | None = None,
    padding: Sides = 0,
    dilation: Sides = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if x.ndim != 4 or return_indices or not x.is_contiguous():
        return None
    step = kernel_size if stride is None or stride == [] else stride
    pads_too_much = any(2 * pad > size for pad, size in zip(_pair(padding), _pair(kernel_size), strict=True))
    sides = _windows(x.shape[2:], kernel_size, step, padding, dilation, ceil_mode=ceil_mode)
    return None if pads_too_much else _made(x, (*x.shape[:2], *sides))


def _avg_pool2d(
    x: Tensor,
    kernel_size: Sides,
    stride: Sides | None = None,
    padding: Sides = 0,
    ceil_mode: bool = False,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    return _max_pool2d(x, kernel_size, stride, padding, 1, ceil_mode)


def _adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor | None:
    sides = _pair(output_size)
    if x.ndim != 4 or not x.is_contiguous() or any(side is None for side in sides):
        return None
    return _made(x, (*x.shape[:2], *sides))


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """[…, in] by [out, in]."""
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    return _made(x, (*x.shape[:-1], weight.shape[0]))


def _matmul(x: Tensor, other: Tensor) -> Tensor | None:
    """[…, n, k] by […, k, m]."""
    if min(x.ndim, other.ndim) < 2 or x.shape[-1] != other.shape[-2] or x.dtype != other.dtype:
        return None
    if x.shape[:-2] != other.shape[:-2]:
        return None
    return _made(x, (*x.shape[:-1], other.shape[-1]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """Queries [n, heads, l, e], keys [n, heads, s, e] and values [n, heads, s, v]."""
    heads = {tensor.shape[:-2] for tensor in (query, key, value)}
    if len(heads) > 1 or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return None
    return _made(query, (*query.shape[:-1], value.shape[-1]))


def _cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor | None:
    plain = all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)
    if not plain or options or len({(tensor.ndim, tensor.dtype) for tensor in tensors}) != 1:
        return None
    # Maps may keep another order of memory; what has other than four or five sides never does.
    if tensors[0].ndim in (4, 5) and not all(tensor.is_contiguous() for tensor in tensors):
        return None
    axis = dim % tensors[0].ndim
    others = {(*tensor.shape[:axis], *tensor.shape[axis + 1 :]) for tensor in tensors}
    if len(others) != 1:
        return None
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return _made(tensors[0], shape)


def _stacked(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor | None:
    plain = all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)
    if not plain or options or len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
        return None
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return _made(tensors[0], shape)


def _interpolated(
    x: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **options: Any
) -> Tensor | None:
    """Maps [n, c, h, w] resized to a size, or by a factor."""
    exact = options.get("recompute_scale_factor") is None
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_contiguous() or not exact:
        return None
    if size is not None:
        return _made(x, (*x.shape[:2], *_pair(size)))
    factors = (scale_factor,) * 2 if isinstance(scale_factor, int | float) else tuple(scale_factor)
    return _made(x, (*x.shape[:2], *(int(side * by) for side, by in zip(x.shape[2:], factors, strict=True))))


def _grid_sampled(x: Tensor, grid: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """Maps [n, c, h, w] at the places of a grid [n, oh, ow, 2]."""
    fits = x.ndim == 4 and grid.ndim == 4 and x.shape[0] == grid.shape[0] and grid.shape[3] == 2
    return _made(x, (*x.shape[:2], *grid.shape[1:3])) if fits and x.dtype == grid.dtype else None


def _taken(x: Tensor, index: Any) -> Tensor | None:
    """Rows of a table, by a tensor of their numbers; whatever else is a view, which torch makes itself."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        return None
    return _made(x, (*index.shape, *x.shape[1:]))


def _repeated(x: Tensor, *times: Any) -> Tensor | None:
    if len(times) != x.ndim or not all(type(count) is int for count in times):
        return None
    return _made(x, [side * count for side, count in zip(x.shape, times, strict=True)])


def _rolled(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _same(x) if x.is_contiguous() else None


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor | None:
    if dim is None or options or not x.is_floating_point():
        return None
    axes = {axis % x.ndim for axis in ((dim,) if isinstance(dim, int) else dim)}
    kept = [1 if axis in axes else side for axis, side in enumerate(x.shape) if keepdim or axis not in axes]
    return _made(x, kept)


def _methods(rule: Rule, *names: str) -> dict[Any, Rule]:
    """A rule for the functions of torch and the methods of tensors with these names."""
    homes = (torch, Tensor)
    return {getattr(home, name): rule for name in names for home in homes if hasattr(home, name)}


F = nn.functional
ACTIVATIONS = (
    F.relu,
    F.gelu,
    F.hardswish,
    F.hardtanh,
    F.hardsigmoid,
    F.leaky_relu,
    F.silu,
    F.elu,
    F.mish,
    F.normalize,
)
RULES: Mapping[Any, Rule] = {
    F.batch_norm: _same,
    F.group_norm: _contiguous,
    torch.group_norm: _contiguous,
    F.layer_norm: _layer_norm,
    **dict.fromkeys(ACTIVATIONS, _same_floats),
    **_methods(
        _same_floats, "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "neg", "exp", "sin", "cos", "sqrt"
    ),
    **_methods(_elementwise, "add", "sub", "mul"),
    **_methods(_divided, "div", "true_divide"),
    **_methods(_compared, "eq", "ne", "ge", "gt", "le", "lt"),
    **_methods(_clamped, "clamp", "clip"),
    **_methods(_elementwise_in_place, "add_", "sub_", "mul_", "div_"),
    **_methods(_matmul, "matmul"),
    **_methods(_mean, "mean"),
    **_methods(_rolled, "roll"),
    torch.conv2d: _conv2d,
    torch.cat: _cat,
    torch.stack: _stacked,
    F.interpolate: _interpolated,
    F.grid_sample: _grid_sampled,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    Tensor.repeat: _repeated,
    Tensor.__getitem__: _taken,
}
