"""Weights that hold NaN or infinity: the level is named, whatever the form of the reply, and no neighbour suffers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from service.backbones.catalogue import backbone_registry
from tests.conftest import RunningService, Serve, multipart

CONFIG: dict[str, Any] = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 1, 2, 3]}
TENSOR = np.zeros((1, 3, 64, 64), np.float32)
FORMS = [
    {"return": "shapes"},
    {"return": "tensors"},
    {"return": "tensors", "encoding": "base64"},
    {"pool": "avg"},
    {"pool": "max", "return": "tensors"},
    {"pool": "gem"},
    {"normalize": True},
    {"dtype": "float16"},
    {"neck": {"type": "GlobalAveragePooling"}},
    {"neck": {"type": "mmdet.FPN", "in_channels": [8, 16, 32, 64], "out_channels": 16, "num_outs": 4}},
]
BINARY = [
    "application/x-npz",
    "application/vnd.safetensors",
    "application/vnd.apache.arrow.stream",
]


@pytest.fixture(scope="session")
def broken(checkpoint_dir: Path) -> Callable[[float], str]:
    """Names of checkpoints of `CONFIG` with one number of the last stage that is none."""

    def make(value: float) -> str:
        name = f"broken_{value}.safetensors"
        resolved = backbone_registry().resolve("ResNet")
        config = resolved.family.config.model_validate({**CONFIG, "type": resolved.type})
        state = dict(resolved.family.build(config).state_dict())
        weight = next(key for key in state if key.startswith("layer4.1.") and state[key].ndim == 4)
        state[weight] = state[weight].clone()
        state[weight][0, 0, 0, 0] = value
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(checkpoint_dir / name))
        return name

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_level_that_is_not_finite_is_named_and_never_in_json(service, broken, form, value) -> None:
    config = {**CONFIG, "checkpoint": broken(value)}
    tensor = np.ones_like(TENSOR)
    refused = service.http.post("/features", **multipart(config, tensor=tensor, **form))
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/non-finite-level"), refused.text
    assert "level" in refused.json()["detail"]
    for accept in BINARY:
        reply = service.http.post(
            "/features", headers={"Accept": accept}, **multipart(config, tensor=tensor, **form)
        )
        assert reply.status_code == 422


def test_levels_before_the_one_that_is_not_finite_are_served(service, broken) -> None:
    config = {**CONFIG, "checkpoint": broken(float("nan")), "out_indices": [0, 1, 2]}
    assert service.http.post("/features", **multipart(config, tensor=TENSOR)).status_code == 200


def test_one_image_that_overflows_leaves_its_neighbours_in_the_batch_alone(service: RunningService) -> None:
    def ask(value: float) -> int:
        tensor = np.full_like(TENSOR, value)
        return int(service.http.post("/features", **multipart(CONFIG, tensor=tensor)).status_code)

    values = [1.0, 3e38] * 8
    with ThreadPoolExecutor(8) as clients:
        statuses = list(clients.map(ask, values))
    assert statuses == [200, 422] * 8


def test_weights_that_are_not_finite_do_not_go_over_to_openvino(serve: Serve, broken, checkpoint_dir) -> None:
    """Whose ReLU makes zeros of NaN, which would be served."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed on this machine")
    service = serve(engine="openvino", checkpoint_dir=checkpoint_dir, request_timeout=250.0)
    config = {**CONFIG, "checkpoint": broken(float("nan"))}
    refused = service.http.post("/features", **multipart(config, tensor=np.ones_like(TENSOR)))
    assert refused.status_code == 422, refused.text
    assert "it gives nothing like torch's at 3" in refused.json()["detail"]
