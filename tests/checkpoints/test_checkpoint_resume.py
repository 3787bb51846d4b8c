"""Downloads that break off are gone on with, and whatever a host does there is an end to them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from service.checkpoints.parts import MAX_AGE_S, MAX_PARTS, open_part, sweep_parts
from service.config.spec import WeightsRef
from service.errors import CheckpointUnavailable, Draining, RemoteFailed, RemoteTimeout
from tests.checkpoints.conftest import Answer, MakeStore, Remote

BODY = bytes(range(256)) * 4
REF = WeightsRef("https://download.pytorch.org/a.pth", pointer="#/backbone/checkpoint")
SHA256 = hashlib.sha256(BODY).hexdigest()
PATH = "/a.pth"


def kept(directory: Path) -> list[str]:
    """Every file below the directory, without what tells URLs apart."""
    return sorted(path.name.partition("-")[2] for path in directory.rglob("*") if path.is_file())


WHOLE = ["a.pth", "a.pth.json"]
BEGUN = ["a.pth.part", "a.pth.part.json"]


def store_of(make_store: MakeStore, remote: Remote, **more: object) -> Any:
    return make_store(remote.url, **{"download_timeout_s": 30.0, **more})


def fails(store: Any, kind: type[Exception] = RemoteFailed, match: str | None = None) -> str:
    with pytest.raises(kind, match=match) as raised:
        store.resolve(REF)
    assert "127.0.0.1" not in str(raised.value)
    return str(raised.value)


# --- going on -------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_is_gone_on_with(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, ranges=True, breaks=[500])
    file = store_of(make_store, remote).resolve(REF)
    assert file.path.read_bytes() == BODY
    assert file.sha256 == SHA256
    assert remote.ranges == [None, "bytes=500-"]
    assert kept(directory) == WHOLE


def test_it_is_gone_on_with_twice_and_then_by_the_next_request(remote, make_store, directory) -> None:
    answer = remote.has(PATH, BODY, ranges=True, breaks=[300, 200, 100])
    fails(store_of(make_store, remote), match="broke off|could not be reached")
    assert remote.ranges == [None, "bytes=300-", "bytes=500-"]
    assert kept(directory) == BEGUN
    assert answer.breaks == []
    file = store_of(make_store, remote).resolve(REF)  # a store of another process, or of the next day
    assert remote.ranges[3:] == ["bytes=600-"]
    assert (file.path.read_bytes(), kept(directory)) == (BODY, WHOLE)


def test_a_host_that_sends_nothing_more_is_not_asked_again(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, ranges=True, breaks=[300, 0, 0])
    fails(store_of(make_store, remote))
    assert remote.ranges == [None, "bytes=300-"]
    assert kept(directory) == BEGUN


def test_a_host_without_ranges_begins_again(remote, make_store) -> None:
    remote.has(PATH, BODY, breaks=[500])
    file = store_of(make_store, remote).resolve(REF)
    assert remote.ranges == [None, "bytes=500-"]
    assert file.path.read_bytes() == BODY


def test_another_file_of_the_same_name_begins_again(remote, make_store) -> None:
    remote.has(PATH, BODY, ranges=True, breaks=[500])
    old = remote.answers[PATH]
    remote.has(PATH, BODY[::-1], ranges=True)
    old.then, remote.answers[PATH] = remote.answers[PATH], old
    assert store_of(make_store, remote).resolve(REF).path.read_bytes() == BODY[::-1]
    assert remote.ranges == [None, "bytes=500-"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 400-1023/1024"},
        {"Content-Range": "bytes 500-1022/1024"},
        {"Content-Range": "bytes 500-1023/1025"},
        {"Content-Range": "bytes 500-2047/2048"},
        {"Content-Range": "bytes */1024"},
        {"Content-Range": "bytes 500-1023/1024", "ETag": '"another"'},
        {"Content-Range": "bytes 500-1023/1024", "Content-Encoding": "gzip"},
        {"Content-Range": "bytes 500-" + "9" * 40 + "/*"},
        {"Content-Range": ""},
    ],
)
def test_another_range_than_asked_for_is_not_taken(remote, make_store, headers) -> None:
    whole = remote.has(PATH, BODY)
    wrong = Answer(b"?" * 524, 206, {"ETag": whole.headers["ETag"], **headers}, then=whole)
    remote.has(PATH, BODY, ranges=True, breaks=[500], then=wrong)
    assert store_of(make_store, remote).resolve(REF).path.read_bytes() == BODY
    assert remote.ranges == [None, "bytes=500-", None]


def test_a_range_that_is_not_there_begins_again(remote, make_store) -> None:
    whole = remote.has(PATH, BODY)
    gone = Answer(b"", 416, {"Content-Range": "bytes */9"}, then=whole)
    remote.has(PATH, BODY, ranges=True, breaks=[500], then=gone)
    assert store_of(make_store, remote).resolve(REF).path.read_bytes() == BODY


@pytest.mark.parametrize("etag", ["", 'W/"weak"', "bare"])
def test_a_file_without_a_validator_is_not_gone_on_with(remote, make_store, directory, etag) -> None:
    remote.has(PATH, BODY, ranges=True, breaks=[500], headers={"ETag": etag})
    fails(store_of(make_store, remote))
    assert remote.ranges == [None]
    assert kept(directory) == []


@pytest.mark.parametrize(
    ("modified", "goes_on"),
    [("Thu, 01 Jan 2015 00:00:00 GMT", True), ("Fri, 01 Jan 2100 00:00:00 GMT", False)],
)
def test_a_date_is_a_validator_once_the_file_is_older_than_its_answer(
    remote, make_store, modified, goes_on
) -> None:
    remote.has(PATH, BODY, ranges=True, breaks=[500], headers={"ETag": "", "Last-Modified": modified})
    store = store_of(make_store, remote)
    if goes_on:
        assert store.resolve(REF).path.read_bytes() == BODY
        assert remote.ranges == [None, "bytes=500-"]
    else:
        fails(store)


def begun(remote: Remote, make_store: MakeStore, directory: Path, ref: WeightsRef = REF) -> Path:
    """A part of 500 bytes, left behind by a request that failed."""
    remote.has(ref.name.removeprefix("https://download.pytorch.org"), BODY, ranges=True, breaks=[500, 0])
    with pytest.raises(RemoteFailed):
        store_of(make_store, remote).resolve(ref)
    remote.ranges.clear()
    return next(directory.rglob("*.part"))


def test_the_digest_is_of_the_whole_and_a_bad_beginning_is_thrown_away(remote, make_store, directory) -> None:
    ref = WeightsRef(f"https://download.pytorch.org/a-{SHA256[:12]}.pth")
    begun(remote, make_store, directory, ref).write_bytes(b"?" * 500)
    assert store_of(make_store, remote).resolve(ref).sha256 == SHA256
    assert remote.ranges == ["bytes=500-", None]


def test_a_part_whose_note_is_gone_or_broken_is_not_used(remote, make_store, directory) -> None:
    for note in (
        None,
        b"",
        b"[1]",
        b'{"url": 1}',
        b'{"url": "x", "validator": "\\"y\\"", "size": null}',
        b"\xff",
    ):
        part = begun(remote, make_store, directory)
        beside = part.with_name(part.name + ".json")
        beside.unlink() if note is None else beside.write_bytes(note)
        assert store_of(make_store, remote).resolve(REF).path.read_bytes() == BODY
        assert remote.ranges == [None]
        for path in list(directory.rglob("*a.pth*")):
            path.unlink()


def test_a_part_is_no_checkpoint(remote, make_store, directory) -> None:
    part = begun(remote, make_store, directory)
    remote.stop()
    store = store_of(make_store, remote)
    with pytest.raises(CheckpointUnavailable):
        store.resolve(WeightsRef(f"url/{part.name}"))
    fails(store)
    assert kept(directory) == BEGUN
    part.rename(part.with_name(part.name.removesuffix(".part")))  # without a receipt it is none either
    fails(store_of(make_store, remote))


def test_a_file_that_is_gone_takes_its_part_along(remote, make_store, directory) -> None:
    begun(remote, make_store, directory)
    remote.answers.clear()
    fails(store_of(make_store, remote), CheckpointUnavailable, "no such public file")
    assert kept(directory) == []


def test_a_host_in_trouble_leaves_the_part(remote, make_store, directory) -> None:
    begun(remote, make_store, directory)
    remote.has(PATH, b"", status=503)
    fails(store_of(make_store, remote), match="answered 503")
    assert kept(directory) == BEGUN


# --- parts that stay ------------------------------------------------------------------------------


def parts_in(folder: Path, count: int, *, size: int = 10, age_s: float = 0) -> list[Path]:
    """So many parts, each older than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index in range(count):
        path = folder / f"{index:02}.pth.part"
        path.write_bytes(bytes(size))
        path.with_name(path.name + ".json").write_bytes(b"{}")
        moment = time.time() - age_s - index
        os.utime(path, (moment, moment))
        made.append(path)
    return made


@pytest.mark.parametrize(
    ("count", "size", "age_s", "limit", "left"),
    [
        (3, 10, 0, 1000, 3),
        (3, 10, MAX_AGE_S, 1000, 0),
        (MAX_PARTS + 4, 10, 0, 1000, MAX_PARTS),
        (5, 10, 0, 30, 3),
    ],
)
def test_old_many_and_large_parts_are_removed(directory, count, size, age_s, limit, left) -> None:
    made = parts_in(directory / "url", count, size=size, age_s=age_s)
    sweep_parts(directory, limit)
    assert [path.exists() for path in made] == [index < left for index in range(count)]
    assert len(list(directory.rglob("*.json"))) == left


def test_a_part_that_is_being_written_is_not_removed(directory) -> None:
    with open_part(directory / "a.pth") as part:
        os.utime(part.path, (0, 0))
        sweep_parts(directory, 1000)
        assert part.path.exists()
        part.discard()


def test_a_download_removes_old_parts_of_others(remote, make_store, directory) -> None:
    [old] = parts_in(directory / "hub" / "o--n" / "main", 1, age_s=2 * MAX_AGE_S)
    remote.has(PATH, BODY)
    store_of(make_store, remote).resolve(REF)
    assert not old.exists()


def test_two_that_want_one_file_have_a_part_each(directory) -> None:
    target = directory / "a.pth"
    with open_part(target) as first, open_part(target) as second:
        assert first.path != second.path
        first.write(b"one")
        second.write(b"two")
        second.sync()
        second.move_to(target)
        first.sync()
        assert (target.read_bytes(), first.path.read_bytes()) == (b"two", b"one")
        first.discard()
    assert [path.name for path in directory.iterdir()] == ["a.pth"]


FETCH = """
import sys
from pathlib import Path
from service.checkpoints.resolve import CheckpointStore
from service.config.spec import WeightsRef

store = CheckpointStore(
    Path(sys.argv[1]), hosts=frozenset({"download.pytorch.org"}), mirrors={"download.pytorch.org": sys.argv[2]},
    max_bytes=10**7, connect_timeout_s=5, download_timeout_s=60,
)
print(store.resolve(WeightsRef(sys.argv[3])).sha256)
"""


def test_two_processes_that_share_the_folder_both_get_the_file(remote, make_store, directory) -> None:
    answer = remote.has(PATH, BODY * 1000, ranges=True, breaks=[300_000] * 2)
    arguments = [sys.executable, "-c", FETCH, str(directory), remote.url, REF.name]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(subprocess.run, arguments, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
        told = {run.result(100).stdout.strip() for run in runs}
    assert told == {hashlib.sha256(answer.body).hexdigest()}
    assert kept(directory) == WHOLE


# --- hosts that mean no good ----------------------------------------------------------------------


def within(seconds: float, work: Callable[[], object]) -> None:
    started = time.monotonic()
    work()
    assert time.monotonic() - started < seconds


def test_a_trickling_body_ends_at_the_deadline(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, trickle_s=0.005)
    within(8, lambda: fails(make_store(remote.url, download_timeout_s=2.0), RemoteTimeout, "took too long"))
    assert kept(directory) == BEGUN


def test_a_trickling_head_ends_at_the_deadline(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, trickle_s=0.1)
    within(8, lambda: fails(make_store(remote.url, download_timeout_s=1.0), RemoteTimeout, "took too long"))
    assert kept(directory) == []


def test_a_length_that_is_a_lie_is_a_remote_failure(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, sent=BODY, headers={"Content-Length": "2000", "ETag": ""})
    fails(store_of(make_store, remote))
    assert kept(directory) == []


@pytest.mark.parametrize("length", ["-5", "1e3", "\u0661", "9" * 30, "5, 6"])
def test_a_length_that_is_none_is_an_error_and_nothing_else(remote, make_store, directory, length) -> None:
    remote.has(PATH, BODY, sent=BODY, headers={"ETag": ""})
    remote.answers[PATH].headers["Content-Length"] = length.encode("utf-8").decode("latin-1")
    with pytest.raises((RemoteFailed, CheckpointUnavailable)):
        store_of(make_store, remote).resolve(REF)
    assert kept(directory) == []


CHUNKS = b"400\r\n" + BODY + b"\r\n"
CHUNKED = {"Content-Length": "", "Transfer-Encoding": "chunked", "ETag": ""}


def test_an_endless_body_is_over_the_limit(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, sent=CHUNKS * 1000, hold=Event(), headers=CHUNKED)
    fails(
        store_of(make_store, remote, max_bytes=100_000),
        CheckpointUnavailable,
        "over the limit of 100000 bytes",
    )
    assert kept(directory) == []


def test_a_chunked_body_is_whole_with_its_last_chunk_only(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, sent=CHUNKS, headers=CHUNKED)
    fails(store_of(make_store, remote))
    assert kept(directory) == []
    remote.has(PATH, BODY, sent=CHUNKS + b"0\r\n\r\n", headers=CHUNKED)
    assert store_of(make_store, remote).resolve(REF).path.read_bytes() == BODY


def test_a_body_that_only_the_connection_ends_needs_a_digest(remote, make_store) -> None:
    unending = {"Content-Length": "", "Connection": "close"}
    remote.has(PATH, BODY, sent=BODY, headers=unending)
    fails(store_of(make_store, remote), match="does not say how long the file is")
    named = WeightsRef(f"https://download.pytorch.org/a-{SHA256[:8]}.pth")
    remote.has(f"/a-{SHA256[:8]}.pth", BODY, sent=BODY, headers=unending)
    assert store_of(make_store, remote).resolve(named).sha256 == SHA256


def test_a_part_of_a_file_that_was_asked_for_whole_is_an_error(remote, make_store, directory) -> None:
    remote.has(PATH, BODY[:9], status=206, headers={"Content-Range": "bytes 0-8/1024"})
    fails(store_of(make_store, remote), match="answered 206")
    assert kept(directory) == []


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-unknown"])
def test_a_compressed_answer_says_so(remote, make_store, directory, encoding) -> None:
    remote.has(PATH, BODY, headers={"Content-Encoding": encoding})
    fails(store_of(make_store, remote), match="compressed")
    assert kept(directory) == []


def test_a_service_that_stops_ends_its_downloads_and_keeps_what_came(remote, make_store, directory) -> None:
    remote.has(PATH, BODY, sent=BODY[:500], hold=Event())
    store = store_of(make_store, remote)
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(store.resolve, REF)
        assert remote.asked.wait(10)
        deadline = time.monotonic() + 10
        while not any(transfer.received for transfer in store.transfers):
            assert time.monotonic() < deadline
        [transfer] = store.transfers
        assert (transfer.name, transfer.received, transfer.total) == (REF.name, 500, 1024)
        store.stop()
        with pytest.raises(RemoteFailed, match="was stopped"):
            download.result(10)
    assert (store.transfers, store.fetched_bytes) == ((), 500)
    assert kept(directory) == BEGUN
    fails(store, Draining)
