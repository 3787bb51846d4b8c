"""Random weights: every number of every type is set, whatever the memory held before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from service.backbones.catalogue import TYPES, backbone_registry

# The same kind of network with fewer weights.
SMALLER: Mapping[str, Mapping[str, Any]] = {
    "detectron2.ViT": {"depth": 2, "window_block_indexes": [0], "img_size": 256},
    "detrex.EVA02_ViT": {"depth": 2, "window_block_indexes": [0], "img_size": 256},
    "detrex.EVAViT": {"depth": 2, "window_block_indexes": [0], "img_size": 256},
    "detrex.TimmBackbone": {"model_name": "resnet18d"},
}
RANDOM = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.trunc_normal_,
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
    }
)


class _Zeros(TorchFunctionMode):
    """Writes zeros where an initialiser draws numbers, which takes most of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in RANDOM:
            return (args[0] if args else (kwargs or {})["tensor"]).detach().zero_()
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _memory_without_numbers() -> Iterator[None]:
    """New memory holds NaN, so that a weight which nothing sets is seen. More threads than one would be slower."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("type_name", [entry[0] for entry in TYPES])
def test_a_network_without_a_checkpoint_has_all_of_its_weights_set(type_name: str) -> None:
    assert torch.empty(1).isnan().all()
    family = backbone_registry().resolve(type_name).family
    raw = {**family.example(type_name), **SMALLER.get(type_name, {}), "type": type_name}
    config = family.config.model_validate(raw, context={"scope": type_name.partition(".")[0]})
    with _Zeros():
        network = family.build(config)
    held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert [name for name, tensor in held.items() if not tensor.isfinite().all()] == []
