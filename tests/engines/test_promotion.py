"""From torch to OpenVINO and back, seen through the door: real conversions by the real converter process."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
import pytest

from service.runtime.engines.base import FIRST_REQUESTS
from service.runtime.engines.openvino_engine import network_sha256
from tests.api.problems import assert_problem, pointers
from tests.api.test_third_party import TINY_NET, site, write_package  # noqa: F401 - site is a fixture
from tests.conftest import RunningService, Serve, multipart
from tests.processes import Start

pytest.importorskip("openvino", reason="OpenVINO is not installed on this machine")

# Small, and faster on OpenVINO whatever else runs.
SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 3]}


def images(count: int = 1, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 3, height, width), np.float32)


def ask(
    service: RunningService, config: Any = SMALL, tensor: np.ndarray | None = None, **parts: Any
) -> httpx.Response:
    given = {"return": "tensors", **parts}
    tensor = images() if tensor is None else tensor
    return service.http.post("/features", **multipart(config, tensor=tensor, **given))


def maps(reply: httpx.Response) -> list[np.ndarray]:
    assert reply.status_code == 200, reply.text
    return [np.asarray(level["data"], np.float32) for level in reply.json()["levels"]]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def wait_for_the_way_to_end(service: RunningService, model_id: str) -> None:
    """Until the promotion that is under way has ended, well or not."""
    task = service.engine.networks.promotions._records[model_id].task
    if task is None:
        return

    async def ended() -> None:
        await asyncio.wait([task])

    asyncio.run_coroutine_threadsafe(ended(), task.get_loop()).result(200)


def promote(service: RunningService, config: Any = SMALL, tensor: np.ndarray | None = None) -> httpx.Response:
    """Ask until the model's way begins, and wait for its end; the last reply of torch."""
    for _ in range(FIRST_REQUESTS):
        reply = ask(service, config, tensor)
        assert reply.status_code == 200, reply.text
        assert reply.json()["model"]["engine"] == "torch"
    wait_for_the_way_to_end(service, reply.headers["x-model-id"])
    return reply


def entry_of(service: RunningService, model_id: str) -> dict[str, Any]:
    [entry] = [entry for entry in service.http.get("/models").json()["models"] if entry["id"] == model_id]
    return entry


def test_a_model_goes_over_to_openvino_and_answers_the_same(serve: Serve) -> None:
    service = serve(engine="auto")
    before = promote(service)
    after = ask(service)
    assert after.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(after), maps(before), strict=True):
        assert distance(found, expected) <= 1e-5
    assert after.headers["etag"] == before.headers["etag"]
    entry = entry_of(service, before.headers["x-model-id"])  # torch's weights are gone: there is one entry
    assert (entry["engine"], entry["promotion"]) == ("openvino", {"state": "promoted"})
    assert 'backbone_model_promotions_total{outcome="promoted"} 1.0' in service.http.get("/metrics").text


def test_images_of_other_sizes_and_batches_do_not_change_an_answer(serve: Serve) -> None:
    service, torch_service = serve(engine="auto"), serve(engine="torch")
    promote(service)
    for count, height, width in ((1, 64, 96), (5, 64, 96), (2, 33, 47), (1, 320, 40), (3, 33, 47)):
        tensor = images(count, height, width)
        found, expected = ask(service, tensor=tensor), ask(torch_service, tensor=tensor)
        assert found.json()["model"]["engine"] == "openvino"
        for mine, theirs in zip(maps(found), maps(expected), strict=True):
            assert distance(mine, theirs) <= 1e-5
        first_alone = ask(service, tensor=tensor[:1])
        for mine, theirs in zip(maps(first_alone), maps(found), strict=True):
            assert distance(mine, theirs[:1]) <= 1e-5


def test_other_levels_of_a_promoted_model_need_no_torch(serve: Serve) -> None:
    service = serve(engine="auto")
    promote(service)
    reply = ask(service, {**SMALL, "out_indices": [1, 2]}, pool="avg")
    assert reply.json()["model"]["engine"] == "openvino"
    assert [level["shape"] for level in reply.json()["levels"]] == [[1, 16], [1, 32]]


def test_a_restart_answers_with_what_was_converted_before(serve: Serve) -> None:
    first = serve(engine="auto")
    before = promote(first)
    first.stop()
    second = serve(engine="auto")
    reply = ask(second)
    assert reply.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(reply), maps(before), strict=True):
        assert distance(found, expected) <= 1e-5
    loads = re.findall(r'model_loads_total\{outcome="loaded"\} (\S+)', second.http.get("/metrics").text)
    assert loads == ["1.0"]  # the converted network, and not torch's before it


@pytest.mark.parametrize("suffix", [".bin", ".xml", ".json"])
def test_a_damaged_file_of_the_cache_is_made_again(serve: Serve, tmp_path: Path, suffix: str) -> None:
    first = serve(engine="auto")
    before = promote(first)
    first.stop()
    [path] = (tmp_path / "engine_cache").glob(f"*{suffix}")
    path.write_bytes(b"" if suffix == ".bin" else path.read_bytes()[: path.stat().st_size // 2])
    second = serve(engine="auto")
    reply = promote(second)
    for found, expected in zip(maps(reply), maps(before), strict=True):
        assert distance(found, expected) <= 1e-5
    assert ask(second).json()["model"]["engine"] == "openvino"


Altered = Callable[[str], dict[str, Any]]


@pytest.fixture
def altered(site: Path, monkeypatch: pytest.MonkeyPatch) -> Altered:  # noqa: F811
    """Install a network whose first map is multiplied by an expression of Python, a constant to tracing."""

    def install(factor: str) -> dict[str, Any]:
        source = "import time\n" + TINY_NET
        for old, new in {
            "torch.relu(self.stage1(images))": f"torch.relu(self.stage1(images)) * ({factor})",
            # enough work for OpenVINO to be faster, whatever else runs
            "self.stage2 = ": "deep = [nn.Conv2d(width, width, 3, padding=1) for _ in range(6)]\n        "
            "self.stage2 = nn.Sequential(*deep, ",
            "2 * width, 3, stride=2, padding=1)": "2 * width, 3, stride=2, padding=1))",
        }.items():
            assert old in source
            source = source.replace(old, new)
        write_package(site, "acme_altered", source, {"acme.Altered": "acme_altered:FAMILY"})
        monkeypatch.setenv("PYTHONPATH", str(site) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        return {"type": "acme.Altered", "width": 64}

    return install


def test_a_network_that_takes_one_size_is_answered_by_torch_at_others(serve: Serve, altered: Altered) -> None:
    config = altered("float(images.shape[2])")
    service = serve(engine="auto")
    promote(service, config, images(1, 64, 64))
    assert ask(service, config, images(2, 64, 64)).json()["model"]["engine"] == "openvino"
    other = ask(service, config, images(1, 96, 80))
    assert (other.status_code, other.json()["model"]["engine"]) == (200, "torch")
    assert ask(service, config, images(1, 64, 64)).json()["model"]["engine"] == "openvino"


def test_a_network_that_differs_on_a_real_request_stays_on_torch_and_says_why(
    serve: Serve, altered: Altered
) -> None:
    config = altered("2.0 if not images.is_meta and float(images.mean()) > 1 else 1.0")
    service = serve(engine="auto")
    bright = images(1, 64, 96) + 5
    reply = promote(service, config, bright)
    again = ask(service, config, bright)
    assert again.json()["model"]["engine"] == "torch"
    np.testing.assert_array_equal(maps(again)[1], maps(reply)[1])
    promotion = entry_of(service, reply.headers["x-model-id"])["promotion"]
    assert promotion["state"] == "stays"
    assert "differs from torch" in promotion["reason"]
    assert 'backbone_model_promotions_total{outcome="refused"} 1.0' in service.http.get("/metrics").text
    service.stop()
    after_restart = serve(engine="auto")
    assert ask(after_restart, config, bright).json()["model"]["engine"] == "torch"
    assert entry_of(after_restart, reply.headers["x-model-id"])["promotion"] == promotion


def save_a_network_that_fails_at_other_sizes(path: Path) -> None:
    """In the place of a converted network one with the same outputs, which has a size built in."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    network = core.read_model(path)
    opset = openvino.opset13
    results = network.get_results()
    source = results[-1].input_value(0)
    fixed = opset.reshape(source, np.array([1, 64, 2, 3], np.int64), special_zero=False)
    copy = path.with_name("copy.xml")
    kept = [result.input_value(0) for result in results[:-1]]
    outputs = [*(opset.result(value) for value in kept), opset.result(fixed.output(0))]
    openvino.save_model(openvino.Model(outputs, network.get_parameters()), copy, compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        copy.with_suffix(suffix).replace(path.with_suffix(suffix))
    facts = path.with_suffix(".json")
    told = {**orjson.loads(facts.read_bytes()), "sha256": network_sha256(path)}
    facts.write_bytes(orjson.dumps(told))


def test_a_promoted_network_that_fails_hands_over_to_torch_within_the_request(
    serve: Serve, tmp_path: Path
) -> None:
    first = serve(engine="auto")
    promote(first)
    first.stop()
    [path] = (tmp_path / "engine_cache").glob("*.xml")
    save_a_network_that_fails_at_other_sizes(path)
    second = serve(engine="auto")
    reply = ask(second)
    assert reply.json()["model"]["engine"] == "openvino"
    other = ask(second, tensor=images(1, 96, 128))
    assert (other.status_code, other.json()["model"]["engine"]) == (200, "torch")
    entry = entry_of(second, reply.headers["x-model-id"])
    assert entry["promotion"] == {"state": "stays", "reason": "it failed on a request of 96x128"}


def test_openvino_from_the_first_answer_on(serve: Serve) -> None:
    service, torch_service = serve(engine="openvino"), serve(engine="torch")
    reply = ask(service)
    assert reply.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(reply), maps(ask(torch_service)), strict=True):
        assert distance(found, expected) <= 1e-5


def test_an_engine_that_is_asked_for_is_not_silently_another(serve: Serve, altered: Altered) -> None:
    config = altered("time.perf_counter()")
    reply = ask(serve(engine="openvino", request_timeout=120), config)
    problem = assert_problem(reply, 422)
    assert pointers(problem) == ["#/backbone"]
    assert "acme.Altered does not run on OpenVINO" in problem["errors"][0]["detail"]


def test_bfloat16_is_computed_by_the_promoted_engine_too(serve: Serve) -> None:
    service = serve(engine="auto", emulate_precision=True)
    before = promote(service)
    reply = ask(service, precision="bfloat16")
    assert reply.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(reply), maps(before), strict=True):
        assert 0 < distance(found, expected) <= 5e-2


def test_a_promoted_model_is_unloaded_and_comes_back(serve: Serve) -> None:
    service = serve(engine="auto")
    before = promote(service)
    model_id = before.headers["x-model-id"]
    assert ask(service).json()["model"]["engine"] == "openvino"
    assert service.http.delete(f"/models/{model_id}").status_code == 200
    assert service.http.get("/models").json()["models"] == []
    assert ask(service).json()["model"]["engine"] == "openvino"


def test_the_budget_counts_what_the_engines_hold(serve: Serve) -> None:
    service = serve(engine="auto")
    promote(service)
    assert ask(service).status_code == 200
    listed = service.http.get("/models").json()
    assert listed["budget"]["used"] == sum(entry["bytes"] for entry in listed["models"]) > 0


def test_stopping_ends_a_conversion_that_is_under_way(start: Start) -> None:
    process = start(BACKBONE_ENGINE="auto")
    parts = multipart({"type": "ResNet", "depth": 50}, tensor=images())
    for _ in range(FIRST_REQUESTS):
        assert process.http.post("/features", **parts).status_code == 200
    children = psutil.Process(process._process.pid).children()
    assert [child for child in children if "service.runtime.engines.converter" in " ".join(child.cmdline())]
    process.signal(15)
    assert process.wait() == 0
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop_the_service(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    service = serve(engine="auto", engine_cache=tmp_path / "taken")
    assert "cannot be written" in caplog.text
    promote(service)
    assert ask(service).json()["model"]["engine"] == "openvino"


def test_what_a_killed_conversion_left_is_removed_once_it_is_old(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "engine_cache"
    folder.mkdir()
    old, young = folder / ".0123.bin", folder / ".4567.bin"
    for path in (old, young):
        path.write_bytes(b"half a network")
    a_week_ago = time.time() - 7 * 24 * 3600
    os.utime(old, (a_week_ago, a_week_ago))
    serve(engine="auto")
    assert (old.exists(), young.exists()) == (False, True)
