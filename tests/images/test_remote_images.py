"""Fetching images from real hosts on loopback, which is allowed for the tests only."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from service.errors import CannotStart, InvalidConfig, RemoteFailed, RemoteTimeout, ServiceError, TooLarge
from service.images.addresses import Address
from service.images.lookups import Lookups
from service.images.remote import AT_ONCE_OF_A_REQUEST, RemoteImages
from service.metrics import Metrics
from service.settings import Settings
from tests.images.remotes import Names, Remote, endlessly, redirect, reply, then_silent

IMAGE = b"\x89PNG\r\n\x1a\n any bytes: nothing is decoded here"
OUTCOMES = ("fetched", "denied", "unresolved", "unreachable", "redirected", "status", "compressed", "large", "slow",
            "broken", "abandoned")  # fmt: skip


class Fetcher:
    """`RemoteImages` with settings of a test; what it counted."""

    def __init__(self, lookups: Lookups | None = None, **settings: Any) -> None:
        self.metrics = Metrics()
        given = {"image_networks": "127.0.0.0/8", **settings}
        self.images = RemoteImages.of(Settings(**given), self.metrics, lookups)

    async def fetch(self, *urls: str, max_bytes: int = 1_000_000) -> list[bytes]:
        fetched = await self.images.fetch(self.images.read(dict(enumerate(urls))), max_bytes)
        return [fetched[index] for index in range(len(urls))]

    def counted(self) -> dict[str, float]:
        """Fetches by outcome, where there were any."""
        value = self.metrics.registry.get_sample_value
        counts = {name: value("backbone_image_fetches_total", {"outcome": name}) for name in OUTCOMES}
        return {name: count for name, count in counts.items() if count}

    def in_flight(self) -> float | None:
        return self.metrics.registry.get_sample_value("backbone_image_fetches_in_flight")


Run = Callable[[Coroutine[Any, Any, list[bytes]]], list[bytes]]
run: Run = asyncio.run


def failure(fetcher: Fetcher, *urls: str, **more: Any) -> ServiceError:
    """What a fetch that comes to nothing is refused with."""
    with pytest.raises(ServiceError) as refused:
        run(fetcher.fetch(*urls, **more))
    for secret in ("127.0.0", "example", "secret", "host.test"):
        assert secret not in refused.value.detail
    return refused.value


@pytest.fixture
def remote() -> Iterator[Remote]:
    with Remote() as server:
        server.answers["/a.png"] = reply(IMAGE)
        yield server


@pytest.fixture
def fetcher(remote: Remote) -> Fetcher:
    """Allows the remote host, by its address and by a name."""
    names = Names(host_test=["127.0.0.1"])
    return Fetcher(names.lookups, image_hosts=f"http://{remote.host},http://host.test:{remote.port}")


# --- what goes well -----------------------------------------------------------------------------


def test_images_come_back_in_the_order_of_their_urls(remote: Remote, fetcher: Fetcher) -> None:
    urls = [f"http://{remote.host}/{index}" for index in range(20)]
    for index in range(20):
        remote.answers[f"/{index}"] = reply(IMAGE + bytes([index]))
    assert run(fetcher.fetch(*urls)) == [IMAGE + bytes([index]) for index in range(20)]
    assert fetcher.counted() == {"fetched": 20}
    assert fetcher.metrics.registry.get_sample_value("backbone_image_fetched_bytes_total") == 20 * (
        len(IMAGE) + 1
    )


def test_a_request_brings_nothing_but_the_url(
    remote: Remote, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    remote.answers["/a.png?q=1"] = reply(IMAGE, Set_Cookie="session=1")
    run(fetcher.fetch(f"http://host.test:{remote.port}/a.png?q=1#part"))
    run(fetcher.fetch(f"http://host.test:{remote.port}/a.png?q=1"))
    expected = [
        "GET /a.png?q=1 HTTP/1.1", f"Host: host.test:{remote.port}", "User-Agent: backbone-service", "Accept: image/*",
        "Accept-Encoding: identity", "Connection: close", "", "",
    ]  # fmt: skip
    assert [head.split("\r\n") for head in remote.heads] == [expected, expected]


def test_a_body_without_a_length_and_one_in_chunks_are_whole(remote: Remote, fetcher: Fetcher) -> None:
    chunks = b"4\r\nabcd\r\n2\r\nef\r\n0\r\n\r\n"
    remote.answers["/chunks"] = b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    remote.answers["/plain"] = b"HTTP/1.0 200 -\r\n\r\nabcdef"
    urls = [f"http://{remote.host}{path}" for path in ("/chunks", "/plain")]
    assert run(fetcher.fetch(*urls)) == [b"abcdef", b"abcdef"]


def test_a_content_type_is_not_asked_after(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/page"] = reply(b"<html>", Content_Type="text/html")
    assert run(fetcher.fetch(f"http://{remote.host}/page")) == [b"<html>"]


# --- addresses ----------------------------------------------------------------------------------


def test_a_name_is_looked_up_once_and_the_connection_goes_to_that_address() -> None:
    with Remote(address="127.0.0.2") as good, Remote(port=good.port) as evil:
        good.answers["/a.png"] = evil.answers["/a.png"] = reply(IMAGE)
        names = Names(rebound_test=["127.0.0.2", "127.0.0.1"])
        host = f"http://rebound.test:{good.port}"
        fetcher = Fetcher(names.lookups, image_hosts=host, image_networks="127.0.0.2/32")
        assert run(fetcher.fetch(f"{host}/a.png")) == [IMAGE]
        assert names.asked == ["rebound.test"]
        assert failure(fetcher, f"{host}/a.png").detail == "image 0: its host cannot be reached"
        assert fetcher.counted() == {"fetched": 1, "denied": 1}
        assert evil.connections == 0


def test_a_redirect_to_the_same_name_is_looked_up_and_checked_again() -> None:
    with Remote(address="127.0.0.2") as good, Remote(port=good.port) as evil:
        host = f"http://rebound.test:{good.port}"
        good.answers["/a.png"] = redirect(f"{host}/b.png")
        evil.answers["/b.png"] = reply(IMAGE)
        names = Names(rebound_test=["127.0.0.2", "127.0.0.1"])
        fetcher = Fetcher(names.lookups, image_hosts=host, image_networks="127.0.0.2/32")
        failure(fetcher, f"{host}/a.png")
        assert fetcher.counted() == {"denied": 1}
        assert evil.connections == 0


@pytest.mark.parametrize(
    "answer", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "::1"]]
)
def test_all_addresses_of_a_name_must_be_allowed(remote: Remote, answer: list[str]) -> None:
    host = f"http://mixed.test:{remote.port}"
    fetcher = Fetcher(Names(mixed_test=[answer]).lookups, image_hosts=host)
    failure(fetcher, f"{host}/a.png")
    assert fetcher.counted() == {"denied": 1}
    assert remote.connections == 0


def test_the_next_address_is_tried_where_the_first_does_not_answer(remote: Remote) -> None:
    host = f"http://two.test:{remote.port}"
    fetcher = Fetcher(Names(two_test=[["127.0.0.9", "127.0.0.1"]]).lookups, image_hosts=host)
    assert run(fetcher.fetch(f"{host}/a.png")) == [IMAGE]


def test_a_name_with_more_addresses_than_any_host_has_is_refused(remote: Remote) -> None:
    host = f"http://many.test:{remote.port}"
    many = [f"127.0.{index}.1" for index in range(65)]
    fetcher = Fetcher(Names(many_test=[many]).lookups, image_hosts=host)
    failure(fetcher, f"{host}/a.png")
    assert fetcher.counted() == {"denied": 1}


def test_denied_unknown_and_closed_look_the_same() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    names = Names(denied_test=["10.0.0.1"], closed_test=["127.0.0.1"])
    fetcher = Fetcher(names.lookups, image_hosts=f"http://*:{port}")
    hosts = ("denied.test", "closed.test", "unknown.test")
    told = [failure(fetcher, f"http://{host}:{port}/secret") for host in hosts]
    assert {(type(error), error.detail, error.faults) for error in told} == {
        (RemoteFailed, told[0].detail, told[0].faults)
    }
    assert fetcher.counted() == {"denied": 1, "unreachable": 1, "unresolved": 1}


def test_addresses_that_are_listed_need_no_lookup_and_their_network_still(remote: Remote) -> None:
    names = Names()
    allowed = Fetcher(names.lookups, image_hosts=f"http://{remote.host}")
    assert run(allowed.fetch(f"http://{remote.host}/a.png")) == [IMAGE]
    denied = Fetcher(names.lookups, image_hosts=f"http://{remote.host}", image_networks="")
    failure(denied, f"http://{remote.host}/a.png")
    assert names.asked == []
    assert remote.connections == 1


def test_names_that_hang_in_the_resolver_hold_up_their_own_requests_only(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.images.remote.REACH_S", 0.2)
    release, asked = threading.Event(), []

    def look_up(host: str) -> tuple[Address, ...]:
        asked.append(host)
        if host.startswith("stuck"):
            release.wait(60)
        return (ip_address("127.0.0.1"),)

    lookups = Lookups(look_up)
    fetcher = Fetcher(lookups, image_hosts=f"http://*:{remote.port}")

    async def both() -> list[bytes]:
        stuck = [f"http://stuck.test:{remote.port}/{index}" for index in range(8)]
        waiting = asyncio.create_task(fetcher.fetch(*stuck))
        fetched = await fetcher.fetch(f"http://fine.test:{remote.port}/a.png")
        with pytest.raises(RemoteFailed, match="cannot be reached"):
            await waiting
        release.set()
        lookups.stop()
        return fetched

    assert run(both()) == [IMAGE]
    assert sorted(asked) == ["fine.test", "stuck.test"]  # one lookup for eight images


# --- certificates -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


def secured(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def over_tls(remote: Remote, **settings: Any) -> Fetcher:
    return Fetcher(
        Names(good_test=["127.0.0.1"], other_test=["127.0.0.1"]).lookups,
        image_hosts=f"good.test:{remote.port},other.test:{remote.port},{remote.host}",
        **settings,
    )


def test_the_certificate_is_that_of_the_name_though_the_connection_is_to_an_address(
    authority: trustme.CA, ca_file: str
) -> None:
    asked_for: list[str | None] = []
    context = secured(authority, "good.test")
    context.sni_callback = lambda _connection, name, _context: asked_for.append(name)
    with Remote(context) as remote:
        remote.answers["/a.png"] = reply(IMAGE)
        fetcher = over_tls(remote, image_ca_file=ca_file)
        assert run(fetcher.fetch(f"https://good.test:{remote.port}/a.png")) == [IMAGE]
        assert asked_for == ["good.test"]
        for host in (f"other.test:{remote.port}", remote.host):
            assert failure(fetcher, f"https://{host}/a.png").detail == "image 0: its host cannot be reached"
        assert fetcher.counted() == {"fetched": 1, "unreachable": 2}
        assert remote.paths() == ["/a.png"]


def test_an_address_may_have_a_certificate(authority: trustme.CA, ca_file: str) -> None:
    with Remote(secured(authority, "127.0.0.1")) as remote:
        remote.answers["/a.png"] = reply(IMAGE)
        assert run(over_tls(remote, image_ca_file=ca_file).fetch(f"https://{remote.host}/a.png")) == [IMAGE]


def test_an_authority_that_is_not_listed_vouches_for_nobody(
    authority: trustme.CA, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)  # of the environment, which is not asked
    with Remote(secured(authority, "good.test")) as remote:
        remote.answers["/a.png"] = reply(IMAGE)
        fetcher = over_tls(remote)
        failure(fetcher, f"https://good.test:{remote.port}/a.png")
        assert fetcher.counted() == {"unreachable": 1}
        assert remote.heads == []


def test_plain_text_at_a_port_of_tls_and_a_record_that_is_none_are_failures(
    authority: trustme.CA, ca_file: str
) -> None:
    def garbled(connection: socket.socket) -> None:
        connection.sendall(reply(IMAGE * 9)[:-1])
        socket.socket(fileno=socket.dup(connection.fileno())).sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)

    with Remote(secured(authority, "good.test")) as remote, Remote(greeting=reply(status=400)) as plain:
        remote.answers["/a.png"] = garbled
        fetcher = over_tls(remote, image_ca_file=ca_file)
        failure(fetcher, f"https://good.test:{remote.port}/a.png")
        failure(over_tls(plain, image_ca_file=ca_file), f"https://good.test:{plain.port}/a.png")
        assert fetcher.counted() == {"broken": 1}


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_of_authorities_that_is_none_keeps_the_service_from_starting(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CannotStart, match="BACKBONE_IMAGE_CA_FILE"):
        Fetcher(image_hosts="a.example", image_ca_file=str(path))


# --- redirects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_three_redirects_are_followed(remote: Remote, fetcher: Fetcher, status: int) -> None:
    remote.answers |= {
        "/1": redirect("/2", status), "/2": redirect(f"//host.test:{remote.port}/3", status),
        "/3": redirect(f"http://{remote.host}/a.png", status),
    }  # fmt: skip
    assert run(fetcher.fetch(f"http://{remote.host}/1")) == [IMAGE]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/", "http://127.0.0.1:22/", "https://host.test/",
        "http://other.test/", "file:///etc/passwd", "ftp://host.test/", "gopher://host.test/", "http://me:secret@host.test/",
        "http://0x7f.1/", "http://[::1", "http://host.test:65536/", "x" * 2048, "data:image/png;base64,AA",
    ],
)  # fmt: skip
def test_a_redirect_is_held_to_the_same_list(remote: Remote, fetcher: Fetcher, location: str) -> None:
    remote.answers["/1"] = redirect(location)
    error = failure(fetcher, f"http://{remote.host}/1")
    assert error.detail == "image 0: its host leads to a URL that is not allowed"
    assert fetcher.counted() == {"redirected": 1}
    assert remote.paths() == ["/1"]


def test_a_redirect_to_an_allowed_name_of_a_private_address_cannot_be_reached(remote: Remote) -> None:
    host = f"http://inside.test:{remote.port}"
    fetcher = Fetcher(Names(inside_test=["10.0.0.1"]).lookups, image_hosts=f"http://{remote.host},{host}")
    remote.answers["/1"] = redirect(f"{host}/")
    assert failure(fetcher, f"http://{remote.host}/1").detail == "image 0: its host cannot be reached"
    assert fetcher.counted() == {"denied": 1}


def test_a_loop_of_redirects_ends(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = redirect("/1")
    assert failure(fetcher, f"http://{remote.host}/1").detail == "image 0: more than 3 redirects"
    assert len(remote.heads) == 4


def test_a_redirect_to_nowhere_fails(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = reply(status=302)
    failure(fetcher, f"http://{remote.host}/1")
    assert len(remote.heads) <= 4


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 404, 429, 500, 503])
def test_only_a_200_is_an_image(remote: Remote, fetcher: Fetcher, status: int) -> None:
    remote.answers["/1"] = reply(b"" if status in (204, 304) else b"secret", status)
    error = failure(fetcher, f"http://{remote.host}/1")
    assert (type(error), error.detail) == (RemoteFailed, f"image 0: its host answered {status}")


def test_a_body_over_the_limit_is_refused_by_its_length_alone(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = then_silent(b"HTTP/1.1 200 -\r\nContent-Length: 1001\r\n\r\n")
    error = failure(fetcher, f"http://{remote.host}/1", max_bytes=1000)
    assert (type(error), error.detail) == (TooLarge, "image 0: with it the images exceed 1,000 bytes")
    assert remote.hung_up.wait(10)


@pytest.mark.parametrize(
    "head", ["HTTP/1.0 200 -\r\n\r\n", "HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n"]
)
def test_an_endless_body_ends_at_the_limit(remote: Remote, fetcher: Fetcher, head: str) -> None:
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n" if "chunked" in head else b"x" * 65536
    remote.answers["/1"] = endlessly(head.encode(), piece)
    assert isinstance(failure(fetcher, f"http://{remote.host}/1"), TooLarge)
    assert remote.hung_up.wait(10)


def test_the_limit_is_for_all_images_together(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = reply(b"x" * 400)
    url = f"http://{remote.host}/1"
    assert len(run(fetcher.fetch(url, url, max_bytes=800))) == 2
    assert isinstance(failure(fetcher, url, url, max_bytes=799), TooLarge)
    assert isinstance(failure(fetcher, url, max_bytes=0), TooLarge)


def test_a_body_shorter_than_it_says_is_no_image(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = reply(IMAGE, Content_Length=str(len(IMAGE) + 1))
    remote.answers["/2"] = b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabc"
    for path in ("/1", "/2"):
        assert "broke off" in failure(fetcher, f"http://{remote.host}{path}").detail
    assert fetcher.counted() == {"broken": 2}


def test_what_comes_after_the_length_is_not_read(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/1"] = reply(IMAGE + b"more", Content_Length=str(len(IMAGE)))
    assert run(fetcher.fetch(f"http://{remote.host}/1")) == [IMAGE]


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "identity, gzip"])
def test_a_compressed_reply_is_refused_and_never_inflated(
    remote: Remote, fetcher: Fetcher, coding: str
) -> None:
    remote.answers["/1"] = reply(gzip.compress(bytes(10_000_000)), Content_Encoding=coding)
    assert "compressed" in failure(fetcher, f"http://{remote.host}/1", max_bytes=100_000).detail


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\r\n\r\n", b"not HTTP at all\r\n\r\n", b"HTTP/1.1 abc -\r\n\r\n", b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 -\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 -\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 -\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 -\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 -\r\nA\0B: c\r\n\r\n",
        b"HTTP/1.1 200 -\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", b"HTTP/1.1 101 -\r\nUpgrade: x\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http_is_a_failure_of_the_host(remote: Remote, fetcher: Fetcher, answer: bytes) -> None:
    remote.answers["/1"] = answer
    assert isinstance(failure(fetcher, f"http://{remote.host}/1"), RemoteFailed)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        ("HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\n"),
        ("HTTP/1.1 200 -\r\n", "X-Header: value\r\n"),
        ("HTTP/1.1 200 -\r\nX: ", "value"),
        ("HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n"),
    ],
)
def test_heads_without_end_and_bodies_in_crumbs_are_given_up(
    remote: Remote, fetcher: Fetcher, head: str, piece: str
) -> None:
    remote.answers["/1"] = endlessly(head.encode(), piece.encode() * 100)
    failure(fetcher, f"http://{remote.host}/1")
    assert fetcher.counted() == {"broken": 1}
    assert remote.hung_up.wait(10)


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 -\r\n", b"HTTP/1.1 200 -\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_a_host_that_falls_silent_is_given_up(remote: Remote, sent: bytes) -> None:
    remote.answers["/1"] = then_silent(sent)
    fetcher = Fetcher(image_hosts=f"http://{remote.host}", image_timeout=0.3)
    error = failure(fetcher, f"http://{remote.host}/1")
    assert (type(error), error.detail) == (RemoteTimeout, "image 0: its host did not send it within 0.3 s")
    assert fetcher.counted() == {"slow": 1}
    assert remote.hung_up.wait(10)


def test_the_time_is_of_all_redirects_together(remote: Remote) -> None:
    remote.answers |= {"/1": redirect("/2"), "/2": redirect("/3"), "/3": then_silent(b"")}
    fetcher = Fetcher(image_hosts=f"http://{remote.host}", image_timeout=0.3)
    assert isinstance(failure(fetcher, f"http://{remote.host}/1"), RemoteTimeout)


# --- side by side -------------------------------------------------------------------------------


def test_the_first_failure_ends_the_others(remote: Remote, fetcher: Fetcher) -> None:
    remote.answers["/slow"] = then_silent(b"HTTP/1.1 200 -\r\n")

    def after_the_slow_one(connection: socket.socket) -> None:
        while "/slow" not in remote.paths():
            remote.asked.wait(10)
        connection.sendall(reply(status=404))

    remote.answers["/gone"] = after_the_slow_one
    error = failure(fetcher, f"http://{remote.host}/slow", f"http://{remote.host}/gone")
    assert (error.detail, error.faults[0].pointer) == ("image 1: its host answered 404", "#/images/1/url")
    assert fetcher.counted() == {"status": 1, "abandoned": 1}
    assert remote.hung_up.wait(10)
    assert fetcher.in_flight() == 0


def test_a_request_fetches_a_few_at_once(remote: Remote, fetcher: Fetcher) -> None:
    full, most, now = threading.Event(), 0, 0
    lock = threading.Lock()

    def counted(connection: socket.socket) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
            if now == AT_ONCE_OF_A_REQUEST:
                full.set()
        full.wait(10)
        with lock:
            now -= 1
        connection.sendall(reply(IMAGE))

    remote.answers["/1"] = counted
    assert len(run(fetcher.fetch(*[f"http://{remote.host}/1"] * 24))) == 24
    assert most == AT_ONCE_OF_A_REQUEST


@pytest.mark.parametrize("encrypted", [False, True])
def test_who_leaves_ends_the_fetch_also_in_the_middle_of_a_handshake(encrypted: bool) -> None:
    scheme = "https" if encrypted else "http"

    def arrived(listener: socket.socket) -> socket.socket:
        connection = listener.accept()[0]
        connection.settimeout(10)
        assert connection.recv(1)
        return connection

    async def leave() -> list[bytes]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            host = f"127.0.0.1:{listener.getsockname()[1]}"
            fetcher = Fetcher(image_hosts=f"{scheme}://{host}")
            fetching = asyncio.create_task(fetcher.fetch(f"{scheme}://{host}/1"))
            connection = await asyncio.to_thread(arrived, listener)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            with connection:
                while await asyncio.to_thread(connection.recv, 4096):
                    pass
            assert fetcher.counted() == {"abandoned": 1}
            assert fetcher.in_flight() == 0
            return []

    run(leave())


# --- what is refused before anything is looked up -----------------------------------------------


def test_a_url_that_is_not_allowed_is_refused_with_its_place(remote: Remote) -> None:
    names = Names()
    fetcher = Fetcher(names.lookups, image_hosts="a.example")
    with pytest.raises(InvalidConfig) as refused:
        fetcher.images.read({0: "https://a.example/", 3: "https://b.example/secret"})
    assert [fault.pointer for fault in refused.value.faults] == ["#/images/3/url"]
    assert "secret" not in refused.value.detail
    assert names.asked == []
