"""OpenVINO asked for by name: what `auto` would leave to torch, and requests of several sizes at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.api.test_third_party import site  # noqa: F401 - a fixture that `altered` needs
from tests.conftest import RunningService, Serve
from tests.engines.test_promotion import (  # noqa: F401 - `altered` is a fixture
    Altered,
    altered,
    ask,
    distance,
    entry_of,
    images,
    maps,
    promote,
)

pytest.importorskip("openvino", reason="OpenVINO is not installed on this machine")

pytestmark = pytest.mark.timeout(900)
CONVERSION_TIMEOUT_S = 250.0
# 1 while torch computes it, and as much from forty products of matrices in what is traced.
SLOW_WHEN_TRACED = (
    "1.0 if not torch.jit.is_tracing() else __import__('functools').reduce(lambda found, _: found @ found, "
    "range(40), torch.full((512, 512), 1 / 512) + images.mean() * 1e-20)[0, 0] * 512"
)


def assert_it_stays_for_its_speed(service: RunningService, reply: httpx.Response) -> None:
    promotion = entry_of(service, reply.headers["x-model-id"])["promotion"]
    assert promotion["state"] == "stays"
    assert "it is slower here" in promotion["reason"]


def test_a_slower_network_answers_only_where_its_engine_is_asked_for(serve: Serve, altered: Altered) -> None:  # noqa: F811
    config = altered(SLOW_WHEN_TRACED)
    automatic = serve(engine="auto")
    before = promote(automatic, config)
    assert_it_stays_for_its_speed(automatic, before)
    automatic.stop()

    asked_for = serve(engine="openvino", request_timeout=CONVERSION_TIMEOUT_S)
    reply = ask(asked_for, config)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(reply), maps(before), strict=True):
        assert distance(found, expected) <= 1e-4
    asked_for.stop()

    again = serve(engine="auto")  # finds the network that was made, and leaves it alone
    promote(again, config)
    assert ask(again, config).json()["model"]["engine"] == "torch"
    assert_it_stays_for_its_speed(again, before)


def test_a_network_with_norms_for_its_levels_only_goes_over(serve: Serve) -> None:
    service = serve(engine="openvino", request_timeout=CONVERSION_TIMEOUT_S)
    config = {"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}}
    reply = ask(service, {**config, "out_indices": [1, 3], "gap_before_final_norm": False})
    assert reply.status_code == 200, reply.text
    assert [level["index"] for level in reply.json()["levels"]] == [1, 3]
    assert reply.json()["model"]["engine"] == "openvino"


def test_sizes_that_are_asked_for_at_once_are_all_answered(serve: Serve, altered: Altered) -> None:  # noqa: F811
    config = altered("float(images.shape[2])")  # a network for each size
    service = serve(engine="openvino", request_timeout=CONVERSION_TIMEOUT_S)
    tensors = [images(1, 64, 64), images(1, 96, 80), images(1, 64, 64)]
    with ThreadPoolExecutor(len(tensors)) as threads:
        replies = list(threads.map(lambda tensor: ask(service, config, tensor), tensors))
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert {reply.json()["model"]["engine"] for reply in replies} == {"openvino"}
