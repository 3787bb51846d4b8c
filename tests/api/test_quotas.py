"""Quotas: what each client may take in a minute, who a client is, and what replies say of it."""

from __future__ import annotations

import asyncio
import io
import re
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.keys import Holder, make_key, written_hash
from service.api.quotas import Account, Accounts, client_of
from service.errors import QuotaExceeded, TooLarge
from service.images.decode import decode_image, image_size
from tests.api.problems import assert_problem
from tests.conftest import RunningService, Serve, encoded, multipart

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}
ALICE, BOB, ROOT_KEY = make_key(), make_key(), make_key()
# 0.9 megapixels, so that of a quota of 1 too little is back within any test for another one.
LARGE = encoded(np.zeros((900, 1000, 3), np.uint8))
SMALL = encoded(np.zeros((64, 64, 3), np.uint8))


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(account: Account, quota: str = "requests", amount: float = 1) -> bool:
    try:
        account.take(quota, amount)
    except QuotaExceeded:
        return False
    return True


def features(service: RunningService, config: Any = THIN, key: str = "", **given: Any) -> httpx.Response:
    request = multipart(config, **{"image": LARGE, **given})
    return service.http.post("/features", headers={"X-API-Key": key} if key else {}, **request)


def left(reply: httpx.Response, policy: str = "requests") -> int:
    """Units that a reply says are left."""
    found = re.search(rf'"{policy}";r=(\d+)', reply.headers["ratelimit"])
    assert found
    return int(found[1])


# --- the bucket ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_minute", [1, 2, 3, 7, 60, 999])
def test_a_minutes_quota_is_there_at_first_and_comes_back_evenly(clock: Clock, per_minute: int) -> None:
    account = Account({"requests": per_minute}, clock)
    assert [taken(account) for _ in range(per_minute + 1)] == [True] * per_minute + [False]
    clock.now_s += 60 / per_minute
    assert [taken(account), taken(account)] == [True, False]
    clock.now_s += 3600
    assert [taken(account) for _ in range(per_minute + 1)] == [True] * per_minute + [False]


def test_who_waits_as_long_as_told_is_let_in(clock: Clock) -> None:
    account = Account({"megapixels": 10}, clock)
    account.take("megapixels", 9.5)
    with pytest.raises(QuotaExceeded) as refused:
        account.take("megapixels", 4)
    assert refused.value.retry_after_s == pytest.approx(21)
    clock.now_s += refused.value.retry_after_s or 0
    assert taken(account, "megapixels", 4)


def test_a_refused_request_takes_nothing(clock: Clock) -> None:
    account = Account({"megapixels": 10}, clock)
    assert [taken(account, "megapixels", 8), taken(account, "megapixels", 8)] == [True, False]
    assert taken(account, "megapixels", 2)


def test_more_than_a_whole_minutes_quota_is_refused_for_good(clock: Clock) -> None:
    with pytest.raises(TooLarge, match=r"takes 12\.5 megapixels; the quota of this client is 10 a minute"):
        Account({"megapixels": 10}, clock).take("megapixels", 12.5)


def test_the_header_says_what_is_left_and_when_there_is_more(clock: Clock) -> None:
    account = Account({"requests": 4, "megapixels": 0, "new_models": 2}, clock)
    assert account.policy == b'"requests";q=4;w=60, "new-models";q=2;w=60;qu="new-models"'
    assert account.left() == b'"requests";r=4, "new-models";r=2'
    account.take("requests")
    assert account.left() == b'"requests";r=3;t=15, "new-models";r=2'
    clock.now_s += 5
    assert account.left() == b'"requests";r=3;t=10, "new-models";r=2'


# --- who a client is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(address: str, client: str) -> None:
    assert client_of(address) == client


def test_many_addresses_push_nobody_out_and_share_what_is_over(clock: Clock) -> None:
    accounts = Accounts({"requests": 2}, max_strangers=100, clock=clock)
    honest = accounts.of_address("192.0.2.7")
    assert taken(honest)
    hostile = [f"10.0.{number // 250}.{number % 250}" for number in range(5000)]
    assert sum(taken(accounts.of_address(address)) for address in hostile for _ in range(3)) == 99 * 2 + 2
    assert accounts.of_address("192.0.2.7") is honest
    assert [taken(honest), taken(honest)] == [True, False]


def test_who_has_everything_left_makes_room(clock: Clock) -> None:
    accounts = Accounts({"requests": 2}, max_strangers=2, clock=clock)
    for address in ("a", "b"):
        accounts.of_address(address).take("requests")
    late = accounts.of_address("c")
    late.take("requests")
    assert accounts.of_address("d") is late
    clock.now_s += 30
    fresh = accounts.of_address("e")
    assert fresh is not late
    assert [taken(fresh) for _ in range(3)] == [True, True, False]


def test_keys_that_are_read_again_keep_what_they_have_spent(clock: Clock) -> None:
    accounts = Accounts({"requests": 2}, clock=clock)
    alice, bob = Holder("alice"), Holder("bob", quotas={"requests": 1})
    accounts.know([alice])
    accounts.of_holder(alice).take("requests")
    accounts.know([alice, bob])
    assert [taken(accounts.of_holder(alice)) for _ in range(2)] == [True, False]
    assert [taken(accounts.of_holder(bob)) for _ in range(2)] == [True, False]
    accounts.know([Holder("alice", quotas={"requests": 0})])
    assert all(taken(accounts.of_holder(alice)) for _ in range(10))


# --- requests -----------------------------------------------------------------------------------


def test_each_key_has_its_own_quota_and_replies_say_what_is_left(serve: Serve) -> None:
    service = serve(api_keys=f"{ALICE},{BOB}", admin_keys=ROOT_KEY, requests_per_minute=2)

    def ask(key: str, path: str = "/configs") -> httpx.Response:
        return service.http.get(path, headers={"X-API-Key": key})

    first, second, third = ask(ALICE), ask(ALICE, "/nothing"), ask(ALICE)
    assert [reply.status_code for reply in (first, second)] == [200, 404]
    assert [left(reply) for reply in (first, second, third)] == [1, 0, 0]
    assert first.headers["ratelimit-policy"] == '"requests";q=2;w=60'
    assert "2 requests a minute" in assert_problem(third, 429, "quota-exceeded")["detail"]
    assert int(third.headers["retry-after"]) == int(third.headers["ratelimit"].partition("t=")[2])
    assert left(ask(BOB)) == 1
    assert "ratelimit" not in ask(ROOT_KEY).headers
    assert "ratelimit" not in service.http.get("/healthz").headers
    assert 'backbone_access_refused_total{reason="requests"} 1.0' in service.http.get("/metrics").text


def test_who_may_not_ask_takes_nothing_of_anybodys_quota(serve: Serve) -> None:
    service = serve(api_keys=ALICE, requests_per_minute=1)
    for _ in range(5):
        assert service.http.get("/configs", headers={"X-API-Key": BOB}).status_code == 403
        assert service.http.get("/configs").status_code == 401
    assert service.http.get("/configs", headers={"X-API-Key": ALICE}).status_code == 200


def test_an_invented_key_is_no_way_around_the_quota_of_an_address(serve: Serve) -> None:
    service = serve(requests_per_minute=2)
    statuses = [service.http.get("/configs", headers={"X-API-Key": make_key()}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_a_line_of_the_keys_file_has_quotas_of_its_own(serve: Serve, tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text(
        f"alice {written_hash(ALICE)} requests=1\nbob {written_hash(BOB)} requests=0\n"
        f"root {written_hash(ROOT_KEY)} admin requests=2\n"
    )
    service = serve(keys_file=path, requests_per_minute=5)

    def asked(key: str) -> list[int]:
        return [service.http.get("/configs", headers={"X-API-Key": key}).status_code for _ in range(3)]

    assert [asked(key) for key in (ALICE, BOB, ROOT_KEY)] == [[200, 429, 429], [200] * 3, [200, 200, 429]]


async def test_concurrent_requests_take_no_more_than_the_quota(serve: Serve) -> None:
    service = serve(requests_per_minute=2)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as client:
        replies = await asyncio.gather(*(client.get("/configs") for _ in range(40)))
    assert sorted(reply.status_code for reply in replies) == [200] * 2 + [429] * 38


# --- megapixels ---------------------------------------------------------------------------------


def test_megapixels_are_counted_before_they_are_decoded(serve: Serve) -> None:
    service = serve(megapixels_per_minute=1)
    first = features(service)
    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"megapixels";q=1;w=60;qu="megapixels"'
    # Cut short behind its header: whoever decoded it would answer 400.
    over = features(service, image=LARGE[:200])
    assert_problem(over, 429, "quota-exceeded")
    assert "1 megapixels a minute; this request takes 0.9" in over.json()["detail"]
    assert features(service, image=SMALL).status_code == 200
    assert 'backbone_access_refused_total{reason="megapixels"} 1.0' in service.http.get("/metrics").text


def test_a_request_of_more_than_a_minutes_megapixels_is_told_so(serve: Serve) -> None:
    service = serve(megapixels_per_minute=1)
    large = encoded(np.zeros((1000, 1001, 3), np.uint8))
    refused = features(service, image=large)
    assert "the quota of this client is 1 a minute" in assert_problem(refused, 413, "too-large")["detail"]
    assert features(service, image=SMALL).status_code == 200


def test_a_small_image_that_is_enlarged_counts_as_what_it_becomes(serve: Serve) -> None:
    service = serve(megapixels_per_minute=1)
    dot = encoded(np.zeros((1, 1, 3), np.uint8))
    wide = {"mode": "resize", "size": [1024, 1024]}
    assert_problem(features(service, image=dot, preprocess=wide), 413, "too-large")


def test_pixels_of_a_tensor_count_too(serve: Serve) -> None:
    service = serve(megapixels_per_minute=1)
    tensor = np.zeros((2, 3, 640, 704), np.float32)
    assert features(service, image=None, tensor=tensor).status_code == 200
    assert_problem(features(service, image=None, tensor=tensor), 429, "quota-exceeded")
    assert_problem(features(service, image=None, tensor=np.zeros((1, 3, 1000, 1001), np.float32)), 413)


def test_what_has_not_changed_costs_no_megapixels(serve: Serve) -> None:
    service = serve(megapixels_per_minute=1)
    tag = features(service).headers["etag"]
    request = multipart(THIN, image=LARGE)
    for _ in range(4):
        assert service.http.post("/features", headers={"If-None-Match": tag}, **request).status_code == 304
    assert features(service).status_code == 429


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_size_of_every_format_is_read_from_its_header(form: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (101, 100)).save(sink, form)
    assert image_size(sink.getvalue(), index=0, max_pixels=20_000) == (101, 100)
    with pytest.raises(TooLarge, match=r"image 3: 101x100 exceeds 0\.01 megapixels"):
        image_size(sink.getvalue(), index=3, max_pixels=10_000)


def test_the_size_of_an_image_on_its_side_is_that_of_the_upright_one() -> None:
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(sink, "JPEG", exif=exif)
    decoded = decode_image(sink.getvalue(), index=0, max_pixels=10_000)
    assert (
        image_size(sink.getvalue(), index=0, max_pixels=10_000) == (decoded.width, decoded.height) == (48, 64)
    )


# --- new models ---------------------------------------------------------------------------------


def asked(service: RunningService, width: int, key: str) -> int:
    """The status of a request for a network of its own."""
    return features(service, {**THIN, "base_channels": width}, key, image=SMALL).status_code


def test_new_models_of_one_client_use_up_its_own_quota_and_nobody_elses(serve: Serve) -> None:
    service = serve(api_keys=f"{ALICE},{BOB}", new_models_per_minute=1)
    assert [asked(service, width, ALICE) for width in (8, 16, 24)] == [200, 429, 429]
    # What is there costs nothing, whoever asked for it first.
    assert [asked(service, width, key) for width, key in ((8, BOB), (16, BOB), (8, ALICE), (16, ALICE))] == [
        200
    ] * 4
    refused = service.http.post(
        "/backbones/inspect",
        json={"backbone": {**THIN, "base_channels": 40}},
        headers={"X-API-Key": ALICE},
    )
    assert "1 new models a minute" in assert_problem(refused, 429, "quota-exceeded")["detail"]
    assert 'backbone_access_refused_total{reason="new_models"} 3.0' in service.http.get("/metrics").text


def test_a_new_model_is_counted_once(serve: Serve) -> None:
    reply = features(serve(new_models_per_minute=3), image=SMALL)
    assert reply.status_code == 200
    assert left(reply, "new-models") == 2


def test_a_config_that_cannot_be_built_counts_as_new(serve: Serve) -> None:
    service = serve(new_models_per_minute=1)
    assert_problem(features(service, {**THIN, "depth": 51}, image=SMALL), 422, "invalid-config")
    assert_problem(features(service, image=SMALL), 429, "quota-exceeded")
