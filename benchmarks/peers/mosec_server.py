"""timm behind mosec, as its ResNet-50 example does it: a stage that decodes in many processes, one that infers.

mosec reads the command line itself, and makes its workers in fresh processes: what they serve comes in the environment.
"""

from __future__ import annotations

import json
import os

import numpy as np
import torch
from mosec import Server, Worker
from safetensors.torch import save

from benchmarks.jobs import JOBS, SAFETENSORS
from benchmarks.networks import decode, load_levels, make_transform

MAX_BATCH = 8
MAX_WAIT_MS = 10
JOB = JOBS[os.environ["BENCHMARK_JOB"]]
ENGINE = os.environ["BENCHMARK_ENGINE"]


class Decode(Worker):  # type: ignore[misc]  # untyped where it is not installed
    """A JPEG to float32 [3, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        self._transform = make_transform(JOB)

    def deserialize(self, data: bytes) -> bytes:
        """The body as it is."""
        return data

    def forward(self, data: bytes) -> np.ndarray:
        """Decode, resize, crop, normalise."""
        return decode(self._transform, data).numpy()


class Infer(Worker):  # type: ignore[misc]  # untyped where it is not installed
    """A batch of images to the levels of each."""

    resp_mime_type = "application/json" if JOB.is_pooled else SAFETENSORS

    def __init__(self) -> None:
        super().__init__()
        self._network = load_levels(JOB, ENGINE)

    def forward(self, data: list[np.ndarray]) -> list[list[torch.Tensor]]:
        """One forward pass for what waits."""
        levels = self._network(torch.from_numpy(np.stack(data)))
        found = [levels[-1].mean((2, 3))] if JOB.is_pooled else levels
        return [list(of_image) for of_image in zip(*found, strict=True)]

    def serialize(self, data: list[torch.Tensor]) -> bytes:
        """A list of numbers, or safetensors."""
        if JOB.is_pooled:
            return json.dumps(data[0].tolist()).encode()
        return save(
            {str(index): level[None].contiguous() for index, level in zip(JOB.nodes, data, strict=True)}
        )


def main() -> None:
    """Serve on the port of the command line."""
    cores = os.cpu_count() or 1
    server = Server()
    # Decoding uses no second thread; without this each process would keep a pool of them.
    server.append_worker(Decode, num=cores, env=[{"OMP_NUM_THREADS": "1"}] * cores)
    server.append_worker(Infer, num=1, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    server.run()


if __name__ == "__main__":
    main()
