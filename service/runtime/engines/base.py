"""What every engine does: run one backbone on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from service.config.spec import Precision
from service.protocol.reply import FloatArray

EngineName = Literal["torch", "openvino", "inductor"]
# How far a model is on its way from torch to another engine, as `GET /models` says it.
State = Literal["waiting", "converting", "comparing", "promoted", "stays"]
# What is asked once or twice is not worth the seconds of another core.
FIRST_REQUESTS = 3
# Models whose way is remembered.
RECORDS_KEPT = 4096


class BackboneEngine(ABC):
    """One backbone with its weights, ready to run.

    Attributes:
        name: which engine it is, as replies and `GET /models` say it.
        concurrent: whether several threads may call `run` at a time and gain by it.
        gains_by_threads: whether torch should use more than one thread for what this engine does.
        by_nodes: whether requests for other features should not share a batch.
    """

    name: ClassVar[EngineName]
    concurrent: ClassVar[bool] = False
    by_nodes: ClassVar[bool] = False

    # Threads of torch pay only in networks that take longer than what it takes to wake them.
    gains_by_threads: bool = True

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What it takes of the device's memory now, weights and whatever it made of them."""

    @abstractmethod
    def run(
        self, images: FloatArray | Tensor, nodes: Sequence[str], precision: Precision, *, crowded: bool
    ) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: [n, c, h, w], float32, normalised: an array in the memory of the host, or a tensor that is on the
                device already.
            nodes: which features (`FeatureInfo.node`); none deeper than the deepest of them is computed.
            precision: of the computation; what comes back is float32.
            crowded: whether other work waits or runs beside it, so that it should not take every core.

        Returns:
            one tensor a node, on the device: [n, c, h, w], [n, l, c], [n, c, l] or [n, c].
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the weights. It must not be run any more."""

    @abstractmethod
    def needs_missing(self, node: str) -> Sequence[str]:
        """The weights that a feature depends on and the checkpoint has not; empty where all are there."""


def on_device(images: FloatArray | Tensor, device: torch.device) -> Tensor:
    """The images as a tensor on the device, the same memory where they are there already."""
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(images)
    return tensor.to(device, non_blocking=True)
