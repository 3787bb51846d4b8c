"""The `Accept` header."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import NotAcceptable
from service.protocol.negotiate import ARROW, JSON, MEDIA_TYPES, NPY, NPZ, SAFETENSORS, negotiate

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, JSON),
        ("", JSON),
        (" , ,\t", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (BROWSER, JSON),
        ("application/json; charset=utf-8", JSON),
        ("Application/JSON", JSON),
        ("application/x-npz", NPZ),
        ("application/x-npy", NPY),
        ("application/x-safetensors", SAFETENSORS),
        ("application/vnd.apache.arrow.stream", ARROW),
        ("application/x-npz, */*", NPZ),
        ("*/*, application/x-npz", NPZ),
        ("application/x-npz, application/json", NPZ),
        ("application/json;q=0.5, application/x-npz;q=0.6", NPZ),
        ("application/json;q=0.5, application/*;q=0.6", NPZ),
        ("*/*, application/json;q=0", NPZ),
        ("application/json;q=0, application/x-npz;q=0, */*;q=0.1", SAFETENSORS),
        ('application/json;profile="a,b;q=0", text/html', JSON),
        ('application/json;profile="a\\",b";q=0.1, application/x-npz;q=0.2', NPZ),
        ("application/json ; Q=0.300 , application/x-npz ; q=0.2", JSON),
        ("garbage, ;;;, /, a/b/c, application/x-npy", NPY),
        ("application/json;q=nan, application/x-npz;q=0.1", NPZ),
        ("application/json;q=1e9, application/x-npz;q=0.1", NPZ),
        ("application/json;q=-1, application/x-npz;q=0.1", NPZ),
        ("application/json;q=2, application/x-npz;q=0.1", NPZ),
    ],
)
def test_what_an_accept_header_gets(accept: str | None, chosen: str) -> None:
    assert negotiate(accept) == chosen


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/*",
        "garbage",
        "application/json;q=0",
        "*/*;q=0",
        "application/json;q=inf",
        "application/json;q=",
        '"',
        "*/json",
        "application/jsonx",
        "\x00",
    ],
)
def test_nothing_that_fits_is_refused_with_the_list(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate(accept)
    assert all(name in caught.value.detail for name in MEDIA_TYPES)


@pytest.mark.parametrize(
    "accept",
    ["," * 100_000 + "application/json", '"' * 100_001, '"\\' * 50_000, "a/b;" * 100_000, "*/*," * 100_000],
)
def test_a_huge_header_is_refused_at_once(accept: str) -> None:
    started = time.perf_counter()
    with pytest.raises(NotAcceptable, match="limit is 8192"):
        negotiate(accept)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    "unit", [",", '"', '"\\', ";", "a/b;", "*/*,", "a/b;q=0.1,", "application/json;q=nan,"]
)
def test_a_header_as_long_as_is_read_takes_milliseconds(unit: str) -> None:
    accept = (unit * 8192)[:8170] + ",application/json"
    started = time.perf_counter()
    with contextlib.suppress(NotAcceptable):
        negotiate(accept)
    assert time.perf_counter() - started < 0.5


@given(st.text(alphabet='aq/*;=,." \\01-', max_size=60))
@settings(deadline=None)
def test_any_header_is_answered_or_refused(accept: str) -> None:
    with contextlib.suppress(NotAcceptable):
        assert negotiate(accept) in MEDIA_TYPES
