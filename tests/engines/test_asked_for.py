"""OpenVINO asked for by name: what `auto` would leave to torch, and requests of several sizes at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.test_third_party import site  # noqa: F401 - a fixture that `altered` needs
from tests.conftest import Serve
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

# 1 while torch computes it, and as much from forty products of matrices in what is traced.
SLOW_WHEN_TRACED = (
    "1.0 if not torch.jit.is_tracing() else __import__('functools').reduce(lambda found, _: found @ found, "
    "range(40), torch.full((256, 256), 1 / 256) + images.mean() * 1e-20)[0, 0] * 256"
)


def test_a_slower_network_answers_only_where_its_engine_is_asked_for(serve: Serve, altered: Altered) -> None:  # noqa: F811
    config = altered(SLOW_WHEN_TRACED)
    automatic = serve(engine="auto")
    before = promote(automatic, config)
    promotion = entry_of(automatic, before.headers["x-model-id"])["promotion"]
    assert promotion["state"] == "stays"
    assert "it is slower here" in promotion["reason"]
    automatic.stop()

    asked_for = serve(engine="openvino", request_timeout=120)
    reply = ask(asked_for, config)
    assert reply.json()["model"]["engine"] == "openvino"
    for found, expected in zip(maps(reply), maps(before), strict=True):
        assert distance(found, expected) <= 1e-4
    asked_for.stop()

    again = serve(engine="auto")  # finds the network that was made, and leaves it alone
    promote(again, config)
    assert ask(again, config).json()["model"]["engine"] == "torch"
    assert entry_of(again, before.headers["x-model-id"])["promotion"] == promotion


def test_sizes_that_are_asked_for_at_once_are_all_answered(serve: Serve, altered: Altered) -> None:  # noqa: F811
    config = altered("float(images.shape[2])")  # a network for each size
    service = serve(engine="openvino", request_timeout=120)
    tensors = [images(1, 64, 64), images(1, 96, 80), images(1, 64, 64)]
    with ThreadPoolExecutor(len(tensors)) as threads:
        replies = list(threads.map(lambda tensor: ask(service, config, tensor), tensors))
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert {reply.json()["model"]["engine"] for reply in replies} == {"openvino"}
