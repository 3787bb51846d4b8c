"""Devices and their budgets; what needs a GPU is skipped, and says so, where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.runtime.device import budget_bytes, free_bytes, pick_device
from tests.conftest import Serve, multipart

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_budget_is_bytes_or_percent_of_what_is_free() -> None:
    assert budget_bytes("123456789", CPU) == 123456789
    assert 0 < budget_bytes("50%", CPU) < free_bytes(CPU)


def test_auto_takes_the_best_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected


def test_a_device_that_is_not_there_is_an_error_and_no_fallback() -> None:
    with pytest.raises(ValueError, match="cuda:99 is not there"):
        pick_device("cuda:99")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_gives_the_numbers_of_the_cpu(serve: Serve, precision: str) -> None:
    config = {"type": "ResNet", "depth": 18, "out_indices": [3]}
    tensor = np.random.default_rng(0).standard_normal((2, 3, 96, 96), np.float32)
    asked = multipart(config, tensor=tensor, precision=precision, **{"return": "tensors"})
    vectors = []
    for device in ("cpu", "cuda"):
        service = serve(device=device)
        vectors.append(np.asarray(service.http.post("/features", **asked).json()["levels"][0]["data"]))
    error = np.linalg.norm(vectors[1] - vectors[0]) / np.linalg.norm(vectors[0])
    assert error < (1e-3 if precision == "float32" else 5e-2)


@pytest.mark.gpu
@needs_cuda
def test_an_unloaded_model_gives_the_memory_of_the_gpu_back(serve: Serve) -> None:
    service = serve(device="cuda")
    before = torch.cuda.memory_allocated()
    loaded = service.http.post("/models", json={"backbone": "resnet50_c5"}).json()
    assert torch.cuda.memory_allocated() > before
    service.http.delete(f"/models/{loaded['id']}")
    assert torch.cuda.memory_allocated() <= before + 2**20
