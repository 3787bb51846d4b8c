"""timm behind LitServe, as it documents: one API, requests batched while they wait."""

import sys
from typing import Any

import litserve
import torch
from fastapi import Request
from fastapi.responses import Response
from safetensors.torch import save

from benchmarks.jobs import JOBS, SAFETENSORS
from benchmarks.networks import decode, load_levels, make_transform

MAX_BATCH = 8
BATCH_TIMEOUT_S = 0.01


class Features(litserve.LitAPI):  # type: ignore[misc]  # untyped where it is not installed
    """One job on one engine."""

    def __init__(self, job_name: str, engine: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S, api_path="/features")
        self._job = JOBS[job_name]
        self._engine = engine

    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe's signature
        """Run once in the worker."""
        self._network = load_levels(self._job, self._engine)
        self._transform = make_transform(self._job)

    def decode_request(self, request: Request) -> torch.Tensor:
        """A form's image to [3, 224, 224]."""
        return decode(self._transform, request["image"].file.read())

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Stack what waits."""
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The levels of a batch."""
        found = self._network(x)
        return [found[-1].mean((2, 3))] if self._job.is_pooled else found

    def unbatch(self, output: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Each image's levels."""
        return [list(levels) for levels in zip(*output, strict=True)]

    def encode_response(self, output: list[torch.Tensor]) -> Any:
        """A list of numbers, or safetensors."""
        if self._job.is_pooled:
            return output[0].tolist()
        named = {
            str(index): level[None].contiguous() for index, level in zip(self._job.nodes, output, strict=True)
        }
        return Response(save(named), media_type=SAFETENSORS)


def main(job_name: str, engine: str, port: str) -> None:
    """Serve one job on one engine."""
    server = litserve.LitServer(Features(job_name, engine), accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
