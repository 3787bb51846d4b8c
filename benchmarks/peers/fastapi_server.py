"""timm behind FastAPI, as both document it: what most would write."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from fastapi.responses import Response
from safetensors.torch import save

from benchmarks.jobs import JOBS, SAFETENSORS, Job
from benchmarks.networks import decode, load_levels, make_transform


def make_app(job: Job, engine: str) -> FastAPI:
    """One network, one route."""
    app = FastAPI()
    # Its threads ask at the same time, which is what OpenVINO's THROUGHPUT is for.
    network = load_levels(job, engine, "THROUGHPUT")
    transform = make_transform(job)

    def levels(image: UploadFile) -> list[torch.Tensor]:
        return network(decode(transform, image.file.read())[None])

    def pooled(image: UploadFile) -> list[float]:
        vector: list[float] = levels(image)[-1].mean((2, 3))[0].tolist()
        return vector

    def maps(image: UploadFile) -> Response:
        found = {str(index): level for index, level in zip(job.nodes, levels(image), strict=True)}
        return Response(save(found), media_type=SAFETENSORS)

    app.post("/features")(pooled if job.is_pooled else maps)
    return app


def main(job_name: str, engine: str, port: str) -> None:
    """Serve one job on one engine."""
    uvicorn.run(make_app(JOBS[job_name], engine), port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
