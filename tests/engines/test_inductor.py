"""From torch to compiled code, seen through the door: real compilers, small networks."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from service.errors import CannotStart
from service.metrics import Metrics
from service.runtime.engines.base import FIRST_REQUESTS
from service.runtime.engines.inductor import bucket_of
from service.runtime.networks import Networks
from tests.api.test_third_party import TINY_NET, site, write_package  # noqa: F401 - site is a fixture
from tests.conftest import RunningService, Serve, multipart, settings_for
from tests.processes import Start

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
ON_CPU = pytest.param({"device": "cpu", "engine": "inductor"}, marks=NO_COMPILER, id="cpu")
ON_CUDA = pytest.param(
    {"device": "cuda", "engine": "auto"}, marks=[pytest.mark.gpu, NO_CUDA, NO_COMPILER], id="cuda"
)
SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 1]}
MAX_BATCH = 4


def images(count: int = 1, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 3, height, width), np.float32)


def ask(service: RunningService, config: Any, tensor: np.ndarray, **parts: Any) -> httpx.Response:
    reply = service.http.post(
        "/features", **multipart(config, tensor=tensor, **{"return": "tensors", **parts})
    )
    assert reply.status_code == 200, reply.text
    return reply


def engine_of(reply: httpx.Response) -> str:
    return str(reply.json()["model"]["engine"])


def assert_close(found: httpx.Response, expected: httpx.Response, tolerance: float = 1e-5) -> None:
    """The levels of one reply are the first of another of as many images, or more."""
    levels = zip(found.json()["levels"], expected.json()["levels"], strict=True)
    for mine, theirs in ((np.asarray(mine["data"]), np.asarray(theirs["data"])) for mine, theirs in levels):
        other = theirs[: len(mine)]
        assert np.linalg.norm(mine - other) <= tolerance * np.linalg.norm(other)


def wait_for_the_compiler(service: RunningService, model_id: str) -> None:
    """Until what is being compiled of a model is there, or is not going to be."""
    task = service.engine.networks.compilations._records[model_id].task
    if task is None:
        return

    async def ended() -> None:
        await asyncio.wait([task])

    asyncio.run_coroutine_threadsafe(ended(), task.get_loop()).result(300)


def promote(service: RunningService, config: Any, tensor: np.ndarray, **parts: Any) -> httpx.Response:
    """Ask until the compiler begins, and wait for its end; the last reply of torch."""
    for _ in range(FIRST_REQUESTS):
        reply = ask(service, config, tensor, **parts)
        assert engine_of(reply) == "torch"
    wait_for_the_compiler(service, reply.headers["x-model-id"])
    return reply


def entry_of(service: RunningService, model_id: str) -> dict[str, Any]:
    [entry] = [entry for entry in service.http.get("/models").json()["models"] if entry["id"] == model_id]
    return dict(entry)


class Promoted:
    """A service where one shape of one network is compiled, for as many images as a batch may have."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.before = promote(service, SMALL, images(MAX_BATCH))
        self.model_id = self.before.headers["x-model-id"]

    def ask(self, tensor: np.ndarray, config: Any = SMALL, **parts: Any) -> httpx.Response:
        return ask(self.service, config, tensor, **parts)


@pytest.fixture(scope="module", params=[ON_CPU, ON_CUDA])
def promoted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Promoted]:
    folder = tmp_path_factory.mktemp("inductor")
    with RunningService(settings_for(folder, max_batch=MAX_BATCH, **request.param)) as service:
        yield Promoted(service)


def test_a_shape_that_is_asked_for_again_is_answered_by_compiled_code(promoted: Promoted) -> None:
    after = promoted.ask(images(MAX_BATCH))
    assert engine_of(after) == "inductor"
    assert_close(after, promoted.before)
    assert after.headers["etag"] == promoted.before.headers["etag"]
    entry = entry_of(promoted.service, promoted.model_id)
    assert (entry["engine"], entry["promotion"]) == ("inductor", {"state": "promoted"})
    metrics = promoted.service.http.get("/metrics").text
    assert 'backbone_model_promotions_total{outcome="promoted"} 1.0' in metrics


def test_images_that_do_not_fill_a_batch_are_answered_the_same(promoted: Promoted) -> None:
    fewer, more = promoted.ask(images(MAX_BATCH)[:3]), promoted.ask(images(7))
    assert (engine_of(fewer), engine_of(more)) == ("inductor", "inductor")
    assert [level["shape"][0] for level in more.json()["levels"]] == [7, 7]
    assert_close(fewer, promoted.before)
    assert_close(promoted.before, more)
    assert_close(
        promoted.ask(images(7)[::-1].copy()[:3], pool="avg"), promoted.ask(images(7)[::-1].copy(), pool="avg")
    )


@pytest.mark.parametrize(
    ("config", "tensor", "parts"),
    [
        (SMALL, images(1, 32, 96), {}),
        ({**SMALL, "out_indices": [1]}, images(), {}),
        (SMALL, images(), {"precision": "bfloat16"}),
    ],
    ids=["size", "levels", "precision"],
)
def test_torch_answers_what_is_not_compiled(
    promoted: Promoted, config: Any, tensor: np.ndarray, parts: dict[str, str]
) -> None:
    if parts and "bfloat16" not in promoted.service.engine.precisions:
        pytest.skip("this device only emulates bfloat16")
    assert engine_of(promoted.ask(tensor, config, **parts)) == "torch"


def test_a_number_of_images_that_comes_gets_code_of_its_own(promoted: Promoted) -> None:
    first = promoted.ask(images())
    wait_for_the_compiler(promoted.service, promoted.model_id)
    again = promoted.ask(images())
    assert (engine_of(first), engine_of(again)) == ("inductor", "inductor")
    assert_close(again, promoted.before)
    metrics = promoted.service.http.get("/metrics").text
    assert 'backbone_model_promotions_total{outcome="promoted"} 2.0' in metrics


def test_an_unloaded_model_takes_its_compiled_code_with_it(promoted: Promoted) -> None:
    [entry] = [entry for entry in promoted.service.engine.networks.cache if entry.key == promoted.model_id]
    weight = weakref.ref(next(entry.model.engine.backbone.parameters()))
    del entry
    wait_for_the_compiler(promoted.service, promoted.model_id)
    assert promoted.service.http.delete(f"/models/{promoted.model_id}").status_code == 200
    gc.collect()
    assert weight() is None
    assert engine_of(promoted.ask(images(MAX_BATCH))) == "torch"


# --- what does not compile -----------------------------------------------------------------------


def install(site: Path, monkeypatch: pytest.MonkeyPatch, factor: str) -> dict[str, Any]:  # noqa: F811
    """A network whose first map is multiplied by an expression of Python."""
    source = "import time\n" + TINY_NET.replace(
        "torch.relu(self.stage1(images))", f"torch.relu(self.stage1(images)) * ({factor})"
    )
    assert factor in source
    write_package(site, "acme_altered", source, {"acme.Altered": "acme_altered:FAMILY"})
    monkeypatch.setenv("PYTHONPATH", str(site) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    return {"type": "acme.Altered", "width": 4}


@NO_COMPILER
@pytest.mark.parametrize(
    ("factor", "outcome", "reason"),
    [
        ("1.0 + 0 * len(str(images))", "failed", "torch.compile ended with "),
        ("1.0 if torch.compiler.is_compiling() else 2.0", "refused", "it differs from torch by "),
    ],
)
def test_a_network_stays_on_torch_and_says_why(
    serve: Serve,
    site: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    factor: str,
    outcome: str,
    reason: str,
) -> None:
    config = install(site, monkeypatch, factor)
    service = serve(engine="inductor")
    before = promote(service, config, images())
    for _ in range(FIRST_REQUESTS):  # and is not tried again
        after = ask(service, config, images())
    assert engine_of(after) == "torch"
    assert_close(after, before)
    promotion = entry_of(service, before.headers["x-model-id"])["promotion"]
    assert promotion["state"] == "stays"
    assert promotion["reason"].startswith(reason)
    assert str(site) not in promotion["reason"]
    metrics = service.http.get("/metrics").text
    assert f'backbone_model_promotions_total{{outcome="{outcome}"}} 1.0' in metrics


@NO_COMPILER
def test_stopping_does_not_wait_for_the_compiler(start: Start) -> None:
    process = start(BACKBONE_ENGINE="inductor")
    parts = multipart({"type": "ResNet", "depth": 50}, tensor=images())
    for _ in range(FIRST_REQUESTS):
        assert process.http.post("/features", **parts).status_code == 200
    [entry] = process.http.get("/models").json()["models"]
    assert entry["promotion"] == {"state": "converting"}
    children = psutil.Process(process._process.pid).children(recursive=True)
    process.signal(15)
    assert process.wait() == 0
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_inductor_is_refused_where_it_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="not on mps"):
        Networks(settings_for(tmp_path, engine="inductor"), torch.device("mps"), Metrics())
    assert (
        Networks(settings_for(tmp_path, engine="auto"), torch.device("mps"), Metrics()).compilations is None
    )


def test_code_is_made_for_powers_of_two_and_for_the_largest_batch() -> None:
    assert [bucket_of(images, 12) for images in (1, 2, 3, 4, 5, 8, 9, 12, 40)] == [
        1,
        2,
        4,
        4,
        8,
        8,
        12,
        12,
        12,
    ]
