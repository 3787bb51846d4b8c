"""What an output depends on, read from the autograd graph: the one rule of freezing that fits every architecture.

A graph is cheap on the meta device: no numbers are computed, so a forward pass and the walk take milliseconds
whatever the size of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RUNNING_STATISTICS = ("running_mean", "running_var")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def parameters_behind(output: Tensor, module: nn.Module) -> frozenset[str]:
    """The names of the parameters of `module` that `output` was computed from.

    `output` must have been computed with gradients enabled and every parameter requiring one. A tied parameter is
    given under each of its names.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    leaves = (names.get(id(leaf), []) for leaf in _leaves(output))
    return frozenset(name for found in leaves for name in found)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of the graph of `output`, each once."""
    waiting: list[Any] = [output.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        # Only AccumulateGrad nodes, the leaves of the graph, have a variable.
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        fresh = {before for before, _ in node.next_functions} - seen
        seen |= fresh
        waiting.extend(fresh)


def forward_with_graph(module: nn.Module, images: Tensor, *arguments: Any) -> Any:
    """The outputs of `module` in eval mode, with the graph of all its parameters (also of fixed ones)."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    module.eval()
    with torch.inference_mode(False), torch.enable_grad():
        return module(images, *arguments)


def entries_behind(parameters: Set[str], module: nn.Module) -> frozenset[str]:
    """The entries of a checkpoint that belong to `parameters`: themselves and the running statistics beside them.

    Other buffers (indices into a table of position biases) are what the constructor computes.
    """
    owners = {name.rpartition(".")[0] for name in parameters}
    beside = {f"{owner}.{name}" if owner else name for owner in owners for name in RUNNING_STATISTICS}
    return frozenset(parameters | (beside & {name for name, _ in module.named_buffers()}))


def batch_norms_of(parameters: Set[str], module: nn.Module) -> tuple[str, ...]:
    """The names of the batch norms of `module` with a parameter among `parameters`, in network order."""
    return tuple(
        path
        for path, child in module.named_modules()
        if isinstance(child, BATCH_NORMS)
        and any(f"{path}.{name}" in parameters for name, _ in child.named_parameters(recurse=False))
    )


def batch_norms(module: nn.Module) -> tuple[str, ...]:
    """The names of all batch norms of `module`, in network order."""
    return tuple(path for path, child in module.named_modules() if isinstance(child, BATCH_NORMS))


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
