"""Weights as a client names them, and what the reply then says of them and computes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from service.backbones.resnet import RESNET
from service.client import BackboneClient
from service.protocol.decode import Features
from tests.api.problems import assert_problem, pointers
from tests.checkpoints.conftest import Remote
from tests.conftest import RunningService, Serve, multipart, settings_for

State = dict[str, Tensor]
TINY = {"type": "ResNet", "depth": 18, "base_channels": 4, "out_indices": [1, 3]}
HEAD = {"head.fc.weight": torch.zeros(10, 32), "head.fc.bias": torch.zeros(10)}
IMAGES = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
TIMM_MODEL = "test_resnet.r160_in1k"
HUB_FILE = f"/timm/{TIMM_MODEL}/resolve/main/model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[RunningService]:
    with RunningService(settings_for(folder)) as service:
        yield service


@pytest.fixture(scope="module")
def client(running: RunningService) -> Iterator[BackboneClient]:
    with BackboneClient(running.url) as client:
        yield client


def weights_of(seed: int) -> State:
    """Weights of the tiny ResNet; no two seeds give the same features."""
    torch.manual_seed(seed)
    state = RESNET.build(RESNET.config.model_validate(TINY)).state_dict()
    return {
        name: tensor.normal_(1, 0.1).abs_() if tensor.ndim == 1 else tensor for name, tensor in state.items()
    }


def maps_of(state: State) -> dict[str, np.ndarray]:
    """What the network gives with these weights."""
    network = RESNET.build(RESNET.config.model_validate(TINY)).eval()
    network.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    with torch.inference_mode():
        return {node: maps.numpy() for node, maps in network(torch.from_numpy(IMAGES), ["1", "3"]).items()}


def assert_maps(features: Features, expected: dict[str, np.ndarray]) -> None:
    assert list(features.levels) == list(expected)
    for name, maps in expected.items():
        found = features.arrays[name]
        assert np.linalg.norm(found - maps) <= 1e-5 * np.linalg.norm(maps)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save_meta(state: State, path: Path) -> None:
    meta = {"iter": np.int64(7), "lr": np.float64(0.1), "mean": np.arange(3.0), "CLASSES": ("cat",)}
    torch.save({"meta": meta, "state_dict": prefixed(state, "backbone."), "optimizer": {"state": {}}}, path)


def save_half(state: State, path: Path) -> None:
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
        path,
    )


Layout = tuple[str, Callable[[State, Path], None]]
LAYOUTS: dict[str, Layout] = {
    "bare": ("bare.pth", lambda state, path: torch.save(state, path)),
    "old pickle": ("old.pth", lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False)),
    "state_dict": ("state.pt", lambda state, path: torch.save({"state_dict": state}, path)),
    "model": ("model.bin", lambda state, path: torch.save({"model": state, "epoch": 3}, path)),
    "data parallel": ("parallel.pth", lambda state, path: torch.save(prefixed(state, "module."), path)),
    "safetensors": ("bare.safetensors", save_file),
    "OpenMMLab": ("meta.pth", save_meta),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout: str, client: BackboneClient, folder: Path) -> None:
    name, write = LAYOUTS[layout]
    state = weights_of(1)
    write(state, folder / name)
    features = client.features(backbone={**TINY, "checkpoint": name}, tensor=IMAGES)
    assert_maps(features, maps_of(state))
    weights = features.model["weights"]
    assert (weights["source"], weights["checkpoint"]) == ("checkpoint", name)
    assert weights["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert weights["loaded"] == len(state)
    assert weights["missing"] == weights["unexpected"] == []


def test_other_weights_give_other_features() -> None:
    first, second = maps_of(weights_of(1)), maps_of(weights_of(2))
    for name, maps in first.items():
        assert np.linalg.norm(maps - second[name]) > 0.1 * np.linalg.norm(maps)


def test_half_precision_files_are_computed_with_in_full(client: BackboneClient, folder: Path) -> None:
    state = weights_of(3)
    save_half(state, folder / "half.safetensors")
    features = client.features(backbone={**TINY, "checkpoint": "half.safetensors"}, tensor=IMAGES)
    rounded = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    assert_maps(features, maps_of(rounded))
    assert features.arrays["3"].dtype == np.float32


@pytest.mark.parametrize("prefix", ["backbone.", "backbone", None])
def test_a_prefix_is_stripped_and_what_a_head_leaves_over_is_reported(
    client: BackboneClient, folder: Path, prefix: str | None
) -> None:
    state = weights_of(4)
    torch.save({"state_dict": {**prefixed(state, "backbone."), **HEAD}}, folder / "detector.pth")
    init = {"type": "Pretrained", "checkpoint": "detector.pth"}
    config = {**TINY, "init_cfg": init if prefix is None else {**init, "prefix": prefix}}
    features = client.features(backbone=config, tensor=IMAGES)
    assert_maps(features, maps_of(state))
    weights = features.model["weights"]
    assert (weights["loaded"], weights["prefix"]) == (len(state), "backbone.")
    assert (weights["missing"], weights["unexpected"]) == ([], list(HEAD))


def test_a_prefix_that_is_not_there_is_refused_by_its_key(running: RunningService, folder: Path) -> None:
    torch.save(prefixed(weights_of(4), "backbone."), folder / "prefixed.pth")
    init = {"type": "Pretrained", "checkpoint": "prefixed.pth", "prefix": "encoder."}
    body = refused(running.http, {**TINY, "init_cfg": init}, 422, "checkpoint-mismatch")
    assert pointers(body)[0].startswith("#/backbone/init_cfg/")
    assert "backbone." in body["detail"]


def test_missing_and_wrong_weights_are_named_and_nothing_is_kept(
    running: RunningService, folder: Path
) -> None:
    state = weights_of(5)
    del state["layer4.1.conv2.weight"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, folder / "wrong.pth")
    before = running.http.get("/models").json()["models"]
    for _ in range(2):
        body = refused(running.http, {**TINY, "checkpoint": "wrong.pth"}, 422, "checkpoint-mismatch")
        assert pointers(body) == ["#/backbone/checkpoint"]
        assert body["missing"] == ["layer4.1.conv2.weight"]
        assert body["wrong_shape"] == ["conv1.weight: file [64,1,7,7], backbone [64,3,7,7]"]
    assert running.http.get("/models").json()["models"] == before


def test_the_weights_of_another_network_are_refused(running: RunningService, folder: Path) -> None:
    torch.save(weights_of(5), folder / "eighteen.pth")
    body = refused(
        running.http, {**TINY, "depth": 50, "checkpoint": "eighteen.pth"}, 422, "checkpoint-mismatch"
    )
    assert "layer1.0.conv3.weight" in body["missing"]


def test_a_file_that_is_none_or_no_checkpoint_is_refused(running: RunningService, folder: Path) -> None:
    (folder / "garbage.pth").write_bytes(b"not a checkpoint" * 99)
    for name, kind in (("garbage.pth", "checkpoint-unreadable"), ("garbage.pht", "checkpoint-unavailable")):
        for route in ("/features", "/models"):
            config = {**TINY, "checkpoint": name}
            reply = (
                running.http.post(route, **multipart(config, tensor=IMAGES))
                if route == "/features"
                else running.http.post(route, json={"backbone": config})
            )
            assert pointers(assert_problem(reply, 422, kind)) == ["#/backbone/checkpoint"]
    body = refused(running.http, {**TINY, "checkpoint": "garbag.pth"}, 422, "checkpoint-unavailable")
    assert "garbage.pth" in body["detail"]


def refused(http: httpx.Client, config: dict[str, Any], status: int, kind: str) -> dict[str, Any]:
    return assert_problem(http.post("/features", **multipart(config, tensor=IMAGES)), status, kind)


def test_a_replaced_file_is_another_model_with_another_etag(running: RunningService, folder: Path) -> None:
    config, replies = {**TINY, "checkpoint": "replaced.pth"}, []
    for seed in (6, 7):
        written = folder / "replaced.tmp"
        torch.save(weights_of(seed), written)
        written.rename(folder / "replaced.pth")
        replies.append(running.http.post("/features", **multipart(config, tensor=IMAGES)).raise_for_status())
    first, second = replies
    assert first.headers["x-model-id"] != second.headers["x-model-id"]
    assert first.headers["etag"] != second.headers["etag"]
    assert first.json()["levels"] != second.json()["levels"]
    for reply, status in ((first, 200), (second, 304)):
        headers = {"If-None-Match": reply.headers["etag"]}
        again = running.http.post("/features", headers=headers, **multipart(config, tensor=IMAGES))
        assert again.status_code == status
        assert again.headers["x-model-id"] == second.headers["x-model-id"]


def test_a_removed_file_is_refused_although_its_model_is_in_memory(
    running: RunningService, folder: Path
) -> None:
    torch.save(weights_of(8), folder / "removed.pth")
    config = {**TINY, "checkpoint": "removed.pth"}
    running.http.post("/features", **multipart(config, tensor=IMAGES)).raise_for_status()
    (folder / "removed.pth").unlink()
    refused(running.http, config, 422, "checkpoint-unavailable")


def test_two_names_of_one_file_share_a_model_and_keep_their_names(
    client: BackboneClient, folder: Path
) -> None:
    torch.save(weights_of(9), folder / "one.pth")
    (folder / "two.pth").write_bytes((folder / "one.pth").read_bytes())
    found = [
        client.features(backbone={**TINY, "checkpoint": name}, tensor=IMAGES).model
        for name in ("one.pth", "two.pth")
    ]
    assert found[0]["id"] == found[1]["id"]
    assert [model["weights"]["checkpoint"] for model in found] == ["one.pth", "two.pth"]


def test_a_model_loaded_ahead_says_what_its_weights_are(client: BackboneClient, folder: Path) -> None:
    torch.save(weights_of(10), folder / "ahead.pth")
    config = {**TINY, "checkpoint": "ahead.pth"}
    loaded = client.load(config)
    features = client.features(backbone=config, tensor=IMAGES)
    assert loaded["id"] == features.model["id"]
    assert loaded["weights"] == features.model["weights"]
    listed = {model["id"]: model["weights"] for model in client.models()["models"]}
    assert listed[loaded["id"]]["sha256"] == hashlib.sha256((folder / "ahead.pth").read_bytes()).hexdigest()


def test_the_checkpoint_decides_the_answer_and_not_its_name_alone(
    client: BackboneClient, folder: Path
) -> None:
    torch.save(weights_of(11), folder / "eleven.pth")
    with_weights = client.features(backbone={**TINY, "checkpoint": "eleven.pth"}, tensor=IMAGES)
    without = client.features(backbone=TINY, tensor=IMAGES)
    assert without.model["weights"]["source"] == "random"
    assert without.model_id != with_weights.model_id
    assert without.etag != with_weights.etag


# --- the hub --------------------------------------------------------------------------------------


def timm_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


def timm_features(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        features = model.forward_intermediates(torch.from_numpy(IMAGES), intermediates_only=True)  # type: ignore[operator]
    return np.asarray(features[-1])


def test_pretrained_is_fetched_from_the_hub_once(
    remote: Remote, serve: Serve, photo: bytes, tmp_path: Path
) -> None:
    model = timm_model()
    remote.has(HUB_FILE, save(model.state_dict()))
    config = {"type": f"timm.{TIMM_MODEL}", "pretrained": True, "out_indices": [-1]}
    for _ in range(2):  # the second service finds the file that the first one has kept
        with BackboneClient(serve(hub_endpoint=remote.url).url) as client:
            features = client.features(backbone=config, tensor=IMAGES)
            of_photo = client.features(photo, backbone=config, returns="shapes")
        expected = timm_features(model)
        found = next(iter(features.arrays.values()))
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
        weights = features.model["weights"]
        assert (weights["source"], weights["missing"]) == ("hub", [])
        assert sorted(weights["unexpected"]) == ["fc.bias", "fc.weight"]
        assert weights["sha256"] == hashlib.sha256(save(model.state_dict())).hexdigest()
        assert remote.asked_for("GET", HUB_FILE) == 1
        assert_preprocess_of_timm(of_photo)
        remote.answers.clear()


def assert_preprocess_of_timm(features: Features) -> None:
    cfg = timm.get_pretrained_cfg(TIMM_MODEL)
    assert features.preprocess is not None
    used = features.preprocess
    assert (used["mean"], used["std"]) == (list(cfg.mean), list(cfg.std))
    assert used["size"] == list(cfg.input_size[1:])
    assert (used["crop_pct"], used["interpolation"]) == (cfg.crop_pct, cfg.interpolation)
    assert features.images[0]["input"] == [160, 160]


def test_a_file_of_the_hub_can_be_any_types_checkpoint(remote: Remote, serve: Serve) -> None:
    model, state = timm_model(), weights_of(12)
    remote.has("/acme/tiny/resolve/main/model.safetensors", save(model.state_dict()))
    remote.has("/acme/mm/resolve/v1/resnet.safetensors", save(state))
    with BackboneClient(serve(hub_endpoint=remote.url).url) as client:
        config = {"type": "timm.test_resnet", "checkpoint": "hf-hub:acme/tiny", "out_indices": [-1]}
        features = client.features(backbone=config, tensor=IMAGES)
        expected = timm_features(model)
        assert np.linalg.norm(next(iter(features.arrays.values())) - expected) <= 1e-5 * np.linalg.norm(
            expected
        )
        assert features.model["weights"]["checkpoint"] == "hf-hub:acme/tiny"
        config = {**TINY, "checkpoint": "hf-hub:acme/mm@v1/resnet.safetensors"}
        assert_maps(client.features(backbone=config, tensor=IMAGES), maps_of(state))


def test_what_the_hub_does_not_give_is_never_random_weights(
    remote: Remote, serve: Serve, tmp_path: Path
) -> None:
    http = serve(hub_endpoint=remote.url).http
    pretrained = {"type": f"timm.{TIMM_MODEL}", "pretrained": True}
    body = refused(http, pretrained, 422, "checkpoint-unavailable")
    assert pointers(body) == ["#/backbone/pretrained"]
    whole = save(timm_model().state_dict())
    remote.has(HUB_FILE, whole, sent=whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "damaged" in refused(http, pretrained, 502, "remote-failed")["detail"]
    remote.stop()
    refused(http, pretrained, 502, "remote-failed")
    assert http.get("/models").json()["models"] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- other hosts ----------------------------------------------------------------------------------

TORCHVISION_FILE = "/models/resnet18-f37072fd.pth"


def test_torchvisions_weights_are_refused_unless_they_are_the_bytes_of_their_name(
    remote: Remote, serve: Serve, tmp_path: Path
) -> None:
    sink = tmp_path / "made.bin"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, sink)
    remote.has(TORCHVISION_FILE, sink.read_bytes())
    sink.unlink()
    http = serve(checkpoint_mirrors=f"download.pytorch.org={remote.url}").http
    for count, weights in enumerate(("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"), start=1):
        body = refused(http, {"type": "torchvision.resnet18", "weights": weights}, 502, "remote-failed")
        assert "sha256" in body["detail"]
        assert remote.asked_for("GET", TORCHVISION_FILE) == count
    assert http.get("/models").json()["models"] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_url_is_fetched_once_and_checked_against_its_name(
    remote: Remote, serve: Serve, tmp_path: Path
) -> None:
    state = weights_of(13)
    data = save(state)
    digest = hashlib.sha256(data).hexdigest()
    path = f"/some/tiny-{digest[:8]}.safetensors"
    remote.has(path, data)
    url = f"https://download.openmmlab.com{path}"
    config = {**TINY, "init_cfg": {"type": "Pretrained", "checkpoint": url}}
    with BackboneClient(serve(checkpoint_mirrors=f"download.openmmlab.com={remote.url}").url) as client:
        first = client.features(backbone=config, tensor=IMAGES)
        client.unload(first.model["id"])
        again = client.features(backbone=config, tensor=IMAGES)
    assert remote.asked_for("GET", path) == 1
    for features in (first, again):
        assert_maps(features, maps_of(state))
        weights = features.model["weights"]
        assert (weights["source"], weights["checkpoint"], weights["sha256"]) == ("url", url, digest)


def test_a_host_that_is_not_allowed_is_refused_unasked(remote: Remote, serve: Serve) -> None:
    http = serve(checkpoint_mirrors=f"example.org={remote.url}").http
    body = refused(http, {**TINY, "checkpoint": "https://example.org/a.pth"}, 422, "checkpoint-unavailable")
    assert "example.org" in body["detail"]
    assert remote.requests == []
