"""Fetching from the hub and from hosts: kept, checked, bounded, and once for everybody."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from service.checkpoints.download import allowed_redirects
from service.checkpoints.flights import SingleFlight
from service.config.spec import WeightsRef
from service.errors import CheckpointUnavailable, RemoteFailed, RemoteTimeout, Unavailable

HUB = WeightsRef("hf-hub:timm/resnet18.a1_in1k", pointer="#/backbone/checkpoint")
HUB_PATH = "/timm/resnet18.a1_in1k/resolve/main/model.safetensors"


def url_of(body: bytes, name: str = "resnet18") -> WeightsRef:
    """A name as the libraries publish it, with the beginning of the digest."""
    return WeightsRef(
        f"https://download.pytorch.org/models/{name}-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    )


def path_of(ref: WeightsRef) -> str:
    return ref.name.removeprefix("https://download.pytorch.org")


def kept(directory: Path) -> list[str]:
    """Every file below the directory."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


# --- the hub ------------------------------------------------------------------------------------


def test_a_hub_file_is_fetched_once_and_then_needs_no_network(remote, make_store, weights) -> None:
    remote.has(HUB_PATH, weights)
    file = make_store(remote.url).resolve(HUB)
    assert (file.source, file.name, file.size) == ("hub", HUB.name, len(weights))
    assert file.sha256 == hashlib.sha256(weights).hexdigest()
    assert file.path.read_bytes() == weights
    remote.stop()
    assert make_store(remote.url).resolve(HUB) == file


def test_a_repository_without_safetensors_gives_its_bin(remote, make_store, weights) -> None:
    remote.has("/timm/old/resolve/main/pytorch_model.bin", weights)
    store = make_store(remote.url)
    assert store.resolve(WeightsRef("hf-hub:timm/old")).path.name == "pytorch_model.bin"
    remote.stop()
    assert store.resolve(WeightsRef("hf-hub:timm/old")).size == len(weights)


def test_a_revision_and_a_file_can_be_named(remote, make_store, weights) -> None:
    remote.has("/o/n/resolve/v2/open_clip_model.safetensors", weights)
    file = make_store(remote.url).resolve(WeightsRef("hf-hub:o/n@v2/open_clip_model.safetensors"))
    assert file.size == len(weights)


def test_a_flipped_bit_is_an_error_and_nothing_is_kept(remote, make_store, weights, directory) -> None:
    flipped = bytes([weights[0] ^ 1]) + weights[1:]
    answer = remote.has(HUB_PATH, weights)
    answer.sent = flipped
    with pytest.raises(RemoteFailed, match="sha256 is not the promised one"):
        make_store(remote.url).resolve(HUB)
    assert kept(directory) == []


def test_the_digest_of_the_linked_file_counts_behind_a_redirect(remote, make_store, weights) -> None:
    linked = {"X-Linked-ETag": f'"{hashlib.sha256(weights).hexdigest()}"', "Location": "/store/blob"}
    remote.has(HUB_PATH, b"", status=302, headers={**linked, "X-Linked-Size": str(len(weights))})
    remote.has("/store/blob", bytes(len(weights)))
    with pytest.raises(RemoteFailed, match="damaged"):
        make_store(remote.url).resolve(HUB)
    remote.has("/store/blob", weights)
    assert make_store(remote.url).resolve(HUB).size == len(weights)


def test_a_renamed_repository_is_followed(remote, make_store, weights) -> None:
    moved = HUB_PATH.replace("timm", "new-timm")
    remote.has(HUB_PATH, b"moved", status=307, headers={"Location": moved, "ETag": ""})
    remote.has(moved, weights)
    assert make_store(remote.url).resolve(HUB).size == len(weights)


def test_an_unknown_repository_is_the_clients_error(remote, make_store) -> None:
    with pytest.raises(CheckpointUnavailable, match="no such public repository") as raised:
        make_store(remote.url).resolve(HUB)
    assert raised.value.faults[0].pointer == HUB.pointer


def test_an_unknown_file_of_the_hub_is_the_clients_error(remote, make_store) -> None:
    with pytest.raises(CheckpointUnavailable, match="no such public file"):
        make_store(remote.url).resolve(WeightsRef("hf-hub:o/n/x.safetensors"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_private_repository_looks_like_none(remote, make_store, status) -> None:
    remote.has("/o/n/resolve/main/x.safetensors", b"", status=status)
    with pytest.raises(CheckpointUnavailable, match="no such public file"):
        make_store(remote.url).resolve(WeightsRef("hf-hub:o/n/x.safetensors"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_a_remote_failure(remote, make_store, status) -> None:
    remote.has(HUB_PATH, b"", status=status)
    with pytest.raises(RemoteFailed, match=str(status)):
        make_store(remote.url).resolve(HUB)


@pytest.mark.parametrize("name", [HUB.name, "https://download.pytorch.org/a.pth"])
def test_a_refused_port_fails_within_seconds(remote, make_store, name) -> None:
    remote.stop()
    started = time.monotonic()
    with pytest.raises(RemoteFailed) as raised:
        make_store(remote.url).resolve(WeightsRef(name))
    assert time.monotonic() - started < 5
    assert "127.0.0.1" not in raised.value.detail


@pytest.mark.parametrize("name", [HUB.name, "https://download.pytorch.org/a.pth"])
def test_a_host_that_never_answers_is_a_timeout(silent_url, make_store, name, directory) -> None:
    started = time.monotonic()
    with pytest.raises(RemoteTimeout):
        make_store(silent_url).resolve(WeightsRef(name))
    assert time.monotonic() - started < 5
    assert kept(directory) == []


def test_a_hub_that_is_no_allowed_host_is_refused_unasked(remote, make_store) -> None:
    store = make_store(remote.url, hosts=frozenset({"download.pytorch.org"}))
    with pytest.raises(CheckpointUnavailable, match=r"huggingface\.co is not a host"):
        store.resolve(HUB)
    with pytest.raises(CheckpointUnavailable, match=r"huggingface\.co is not a host"):
        store.hub_config("hf-hub:o/n")
    assert remote.requests == []


def test_the_endpoint_can_be_the_operators_own(remote, make_store, weights) -> None:
    remote.has(HUB_PATH, weights)
    store = make_store(hosts=frozenset({"127.0.0.1"}), mirrors={}, hub_endpoint=remote.url)
    assert store.resolve(HUB).size == len(weights)


def test_the_config_of_a_repository_is_data(remote, make_store) -> None:
    path = "/timm/r18/resolve/main/config.json"
    remote.has(path, b'{"architecture": "resnet18"}', headers={"ETag": '"0123abcd"'})
    store = make_store(remote.url)
    assert store.hub_config("hf-hub:timm/r18") == {"architecture": "resnet18"}
    remote.stop()
    assert store.hub_config("hf-hub:timm/r18") == {"architecture": "resnet18"}


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"[" * 500_000])
def test_a_config_that_is_no_object_is_a_remote_failure(remote, make_store, body) -> None:
    remote.has("/o/n/resolve/main/config.json", body)
    with pytest.raises(RemoteFailed, match=r"config\.json is not"):
        make_store(remote.url).hub_config("hf-hub:o/n")


def test_a_config_is_at_most_a_megabyte(remote, make_store) -> None:
    path = "/o/n/resolve/main/config.json"
    remote.has(path, b" " * 1_000_001)
    with pytest.raises(CheckpointUnavailable, match="over the limit of 1000000 bytes"):
        make_store(remote.url).hub_config("hf-hub:o/n")
    assert remote.asked_for("GET", path) == 0


@pytest.mark.parametrize("name", ["r18", "https://download.pytorch.org/a.pth", "hf-hub:x"])
def test_only_a_hub_name_has_a_config(make_store, name) -> None:
    with pytest.raises(CheckpointUnavailable) as raised:
        make_store().hub_config(name, pointer="#/backbone/model_name")
    assert raised.value.faults[0].pointer == "#/backbone/model_name"


# --- URLs ---------------------------------------------------------------------------------------


def test_a_url_is_fetched_once_and_then_needs_no_network(remote, make_store, weights) -> None:
    ref = url_of(weights)
    remote.has(path_of(ref), weights)
    file = make_store(remote.url).resolve(ref)
    assert (file.source, file.sha256) == ("url", hashlib.sha256(weights).hexdigest())
    remote.stop()
    assert make_store(remote.url).resolve(ref) == file


def test_a_digest_in_the_name_is_checked(remote, make_store, weights, directory) -> None:
    ref = url_of(weights)
    remote.has(path_of(ref), weights + b"x")
    with pytest.raises(RemoteFailed, match="sha256"):
        make_store(remote.url).resolve(ref)
    assert kept(directory) == []


def test_a_file_damaged_on_the_disk_is_fetched_again(remote, make_store, weights) -> None:
    ref = url_of(weights)
    remote.has(path_of(ref), weights)
    path = make_store(remote.url).resolve(ref).path
    path.write_bytes(b"rotten")
    assert make_store(remote.url).resolve(ref).path.read_bytes() == weights
    assert remote.asked_for("GET", path_of(ref)) == 2


@pytest.mark.parametrize(
    "url", ["https://evil.example/a.pth", "https://127.0.0.1/a.pth", "https://localhost/a.pth"]
)
def test_other_hosts_are_refused_unasked(remote, make_store, url) -> None:
    with pytest.raises(CheckpointUnavailable, match="is not a host"):
        make_store(remote.url).resolve(WeightsRef(url))
    assert remote.requests == []


def test_a_file_that_is_not_there_is_the_clients_error(remote, make_store) -> None:
    with pytest.raises(CheckpointUnavailable, match="no such public file"):
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))


def test_a_file_over_the_limit_is_refused_before_it_is_sent(remote, make_store, directory) -> None:
    remote.has("/a.pth", b"x" * 101)
    store = make_store(remote.url, max_bytes=100)
    with pytest.raises(CheckpointUnavailable, match="over the limit of 100 bytes"):
        store.resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert kept(directory) == []


def test_a_file_of_no_announced_size_is_still_bounded(remote, make_store, directory) -> None:
    remote.has("/a.pth", b"x" * 101, headers={"Content-Length": ""}, sent=b"x" * 101)
    store = make_store(remote.url, max_bytes=100)
    with pytest.raises(CheckpointUnavailable, match="over the limit of 100 bytes"):
        store.resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert kept(directory) == []


def test_a_download_cut_short_is_a_remote_failure(remote, make_store, directory) -> None:
    remote.has("/a.pth", b"x" * 1000, sent=b"x" * 500, headers={"ETag": ""})
    with pytest.raises(RemoteFailed):
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert kept(directory) == []


def test_a_download_that_stalls_half_way_is_a_timeout(remote, make_store, directory) -> None:
    remote.has("/a.pth", b"x" * 1000, sent=b"x" * 500, hold=Event(), headers={"ETag": ""})
    with pytest.raises(RemoteTimeout):
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert kept(directory) == []


def test_a_download_over_its_time_is_a_timeout(remote, make_store, weights, directory) -> None:
    remote.has("/a.pth", weights)
    with pytest.raises(RemoteTimeout):
        make_store(remote.url, download_timeout_s=1e-9).resolve(
            WeightsRef("https://download.pytorch.org/a.pth")
        )
    assert kept(directory) == []


def test_a_compressed_answer_is_refused(remote, make_store) -> None:
    remote.has("/a.pth", b"x" * 10, headers={"Content-Encoding": "gzip"})
    with pytest.raises(RemoteFailed):
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/a.pth", "https://evil.example/a.pth", "file:///etc/passwd", "http://[", ""]
)
def test_a_redirect_to_elsewhere_is_not_followed(remote, make_store, target) -> None:
    remote.has("/a.pth", b"", status=302, headers={"Location": target})
    with pytest.raises(RemoteFailed):
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))


def test_three_redirects_are_followed_and_a_loop_is_not(remote, make_store, weights) -> None:
    for step, target in ((1, "/2.pth"), (2, "/3.pth"), (3, "/4.pth")):
        remote.has(f"/{step}.pth", b"", status=302, headers={"Location": target})
    remote.has("/4.pth", weights)
    remote.has("/loop.pth", b"", status=302, headers={"Location": "/loop.pth"})
    store = make_store(remote.url)
    assert store.resolve(WeightsRef("https://download.pytorch.org/1.pth")).size == len(weights)
    with pytest.raises(RemoteFailed, match="more than 3 redirects"):
        store.resolve(WeightsRef("https://download.pytorch.org/loop.pth"))


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("https://huggingface.co/other", True),
        ("https://cas-bridge.xethub.hf.co/blob?token=1", True),
        ("https://cdn-lfs.huggingface.co/blob", True),
        ("https://github.com/x", True),
        ("http://huggingface.co/other", False),
        ("https://huggingface.co.evil.example/x", False),
        ("https://evilhf.co/x", False),
        ("https://user@github.com/x", False),
        ("https://github.com:444/x", False),
        ("https://169.254.169.254/x", False),
    ],
)
def test_the_hub_may_lead_to_its_own_delivery_and_to_allowed_hosts(target: str, allowed: bool) -> None:
    hosts = frozenset({"huggingface.co", "github.com"})
    assert allowed_redirects(hosts, "https://huggingface.co/o/n")(target) is allowed


def test_proxies_of_the_environment_are_not_used(remote, make_store, weights, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    ref = url_of(weights)
    remote.has(path_of(ref), weights)
    assert make_store(remote.url).resolve(ref).size == len(weights)


@contextmanager
def largest_file(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow past the limit (EFBIG), as a full disk does (ENOSPC)."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_no_room_on_the_disk_says_so_and_leaves_nothing(remote, make_store, directory) -> None:
    remote.has("/a.pth", b"x" * 300_000)
    with largest_file(100_000), pytest.raises(Unavailable, match="no room") as raised:
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert raised.value.retry_after_s == 60
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.EFBIG
    assert kept(directory) == []


def test_a_directory_that_cannot_be_written_says_so(remote, make_store, weights, directory) -> None:
    (directory / "url").write_bytes(b"a file where the folder should be")
    remote.has("/a.pth", weights)
    with pytest.raises(Unavailable, match="cannot be written") as raised:
        make_store(remote.url).resolve(WeightsRef("https://download.pytorch.org/a.pth"))
    assert str(directory) not in raised.value.detail


# --- many at once -------------------------------------------------------------------------------


def test_many_threads_share_one_download(remote, make_store, weights) -> None:
    gate = Event()
    ref = url_of(weights)
    remote.has(path_of(ref), weights, gate=gate)
    store = make_store(remote.url, download_timeout_s=10.0)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(store.resolve, ref) for _ in range(8)]
        assert remote.asked.wait(10)
        gate.set()
        files = {future.result(10) for future in asked}
    assert len(files) == 1
    assert remote.asked_for("GET", path_of(ref)) == 1


def test_the_waiting_get_the_same_value_or_error() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    started, gate = Event(), Event()

    def fail() -> int:
        started.set()
        gate.wait(10)
        raise RemoteFailed("broken")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(flights.do, "a", fail)
        assert started.wait(10)
        second = pool.submit(flights.do, "a", fail)
        other = pool.submit(flights.do, "b", lambda: 7)
        assert other.result(10) == 7
        gate.set()
        errors = [future.exception(10) for future in (first, second)]
    assert [str(error) for error in errors] == ["broken", "broken"]
    assert flights.do("a", lambda: 8) == 8


def test_a_failed_download_can_be_tried_again(remote, make_store, weights) -> None:
    ref = url_of(weights)
    store = make_store(remote.url)
    with pytest.raises(CheckpointUnavailable):
        store.resolve(ref)
    remote.has(path_of(ref), weights)
    assert store.resolve(ref).size == len(weights)


def test_fetched_files_can_be_read_by_the_service_only_for_reading(remote, make_store, weights) -> None:
    ref = url_of(weights)
    remote.has(path_of(ref), weights)
    assert os.stat(make_store(remote.url).resolve(ref).path).st_mode & 0o777 == 0o644
