"""What an output depends on, read from the autograd graph: the one rule of freezing that fits every architecture.

A graph is cheap on the meta device: no numbers are computed, so a forward pass and the walk take milliseconds
whatever the size of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn

from service.backbones.freezing import norm_names
from service.backbones.norms import BATCH_NORMS

RUNNING_STATISTICS = ("running_mean", "running_var")


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
    norms = norm_names(module, BATCH_NORMS)
    return tuple(path for path in norms if not parameters.isdisjoint({f"{path}.weight", f"{path}.bias"}))
