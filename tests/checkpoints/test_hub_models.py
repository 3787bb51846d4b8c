"""timm models that are named by a repository of the hub, over HTTP, from a hub on loopback."""

from __future__ import annotations

import numpy as np
import orjson
import timm
import torch
from safetensors.torch import save

from tests.checkpoints.conftest import Remote
from tests.conftest import RunningService, Serve, multipart

REPOSITORY = "/acme/tiny/resolve/main"
CONFIG = {
    "architecture": "resnet10t",
    "model_args": {"in_chans": 3},
    "pretrained_cfg": {"tag": "c3_in1k", "num_classes": 1000},
}
ASKED = {"type": "TIMMBackbone", "model_name": "hf-hub:acme/tiny", "features_only": True}


def served_from(remote: Remote, serve: Serve) -> RunningService:
    return serve(HF_ENDPOINT=remote.url)


def test_a_repository_names_the_architecture_and_its_weights(remote: Remote, serve: Serve) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", features_only=False).eval()
    remote.has(f"{REPOSITORY}/config.json", orjson.dumps(CONFIG))
    remote.has(f"{REPOSITORY}/model.safetensors", save(model.state_dict()))
    service = served_from(remote, serve)
    tensor = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    reply = service.http.post(
        "/features", **multipart({**ASKED, "pretrained": True}, tensor=tensor, encoding="base64")
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"]["weights"]["source"] == "hub"
    with torch.inference_mode():
        expected = model.forward_intermediates(torch.from_numpy(tensor), intermediates_only=True)[-1]
    stats = reply.json()["levels"][-1]["stats"]
    assert abs(stats["mean"] - float(expected.mean())) < 1e-5


def test_an_argument_that_a_config_cannot_have_is_refused(remote: Remote, serve: Serve) -> None:
    remote.has(
        f"{REPOSITORY}/config.json", orjson.dumps({**CONFIG, "model_args": {"block_fns": "os.system"}})
    )
    service = served_from(remote, serve)
    reply = service.http.post("/backbones/inspect", json={"backbone": ASKED})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["pointer"] == "#/backbone/model_name"


def test_a_repository_that_is_not_there_is_an_error(remote: Remote, serve: Serve) -> None:
    reply = served_from(remote, serve).http.post("/backbones/inspect", json={"backbone": ASKED})
    assert reply.status_code == 422


def test_a_hub_that_refuses_connections_is_told_within_seconds(remote: Remote, serve: Serve) -> None:
    service = served_from(remote, serve)
    remote.stop()
    reply = service.http.post("/backbones/inspect", json={"backbone": ASKED}, timeout=20)
    assert reply.status_code == 502
