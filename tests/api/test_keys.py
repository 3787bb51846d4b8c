"""Keys in settings and in a file: what is taken, what is refused, and how they are exchanged while serving."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from service.api.access import Access, Who
from service.api.app import create_app
from service.api.keys import BadKeys, Holder, keys_of_setting, make_key, parse_keys, written_hash
from service.metrics import Metrics
from service.settings import Settings
from tests.conftest import Serve, settings_for
from tests.processes import COMMAND, Process, Start, environment

ALICE, BOB, ROOT_KEY = make_key(), make_key(), make_key()


def line(name: str, key: str, *options: str) -> str:
    return " ".join([name, written_hash(key), *options]) + "\n"


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *arguments]
    return subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=60, check=False
    )


def asked(http: httpx.Client, key: str) -> int:
    """What a route says to a key before anything of the engine is needed: 405 to a client's."""
    return http.put("/version", headers={"X-API-Key": key}).status_code


# --- what is taken ------------------------------------------------------------------------------


def test_a_file_has_a_key_a_line_with_its_holder() -> None:
    text = (
        "# who may ask\n\n"
        + line("alice", ALICE)
        + line("bob", BOB, "requests=60", "megapixels=0")
        + "root "
        + written_hash(ROOT_KEY)
        + "  admin # on call"
    )
    assert parse_keys(text) == {
        hashlib.sha256(ALICE.encode()).digest(): Holder("alice"),
        hashlib.sha256(BOB.encode()).digest(): Holder("bob", quotas={"requests": 60, "megapixels": 0}),
        hashlib.sha256(ROOT_KEY.encode()).digest(): Holder("root", is_operator=True),
    }


def test_a_name_may_have_several_keys_while_one_is_exchanged_for_another() -> None:
    holders = parse_keys(line("alice", ALICE, "requests=5") + line("alice", BOB, "requests=5"))
    assert list(holders.values()) == [Holder("alice", quotas={"requests": 5})] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        (ALICE, "line 1"),
        (f"alice {ALICE}", "line 1"),
        (f"\n{line('alice', ALICE)}bob sha256:{'A' * 64}\n", "line 3"),
        (f"alice sha256:{'a' * 63}", "line 1"),
        (f"al,ice sha256:{'a' * 64}", "a name is"),
        (f"{'a' * 65} sha256:{'a' * 64}", "a name is"),
        (line("alice", ALICE) + line("bob", ALICE), "line 2: the key is there twice"),
        (line("alice", ALICE) + line("alice", BOB, "admin"), "line 2: another line of this name"),
        (line("alice", ALICE, "adm1n"), "line 1"),
        (line("alice", ALICE, "admin", "admin"), "twice"),
        (line("alice", ALICE, "requests=1", "requests=2"), "twice"),
        (line("alice", ALICE, "requests=-1"), "line 1"),
        (line("alice", ALICE, "requests=1e3"), "line 1"),
        (line("alice", ALICE, "requests=9999999999"), "at most"),
        (line("alice", ALICE, f"secret={BOB}"), "line 1"),
    ],
    ids=lambda text: text[:40],
)
def test_a_broken_file_is_refused_with_its_line_and_without_what_is_in_it(text: str, said: str) -> None:
    with pytest.raises(BadKeys) as refused:
        parse_keys(text)
    assert said in str(refused.value)
    assert not any(secret in str(refused.value) for secret in (ALICE, BOB, "a" * 64))


def test_a_setting_has_keys_plain_or_as_their_hash(serve: Serve) -> None:
    service = serve(api_keys=f"{ALICE},{written_hash(BOB)}", admin_keys=written_hash(ROOT_KEY))
    assert [asked(service.http, key) for key in (ALICE, BOB, ROOT_KEY)] == [405, 405, 405]
    assert asked(service.http, written_hash(BOB)) == 403


@pytest.mark.parametrize(
    "word", ["sha256:no-digits", "sha256:abc", f"sha256:{'g' * 64}", "k" * 513, "schlüssel", "a b"]
)
def test_a_key_that_could_not_be_sent_is_refused(word: str) -> None:
    with pytest.raises(BadKeys) as refused:
        list(keys_of_setting([word], is_operator=False))
    assert word not in str(refused.value)


def test_a_short_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "service.keys"):
        create_app(Settings(api_keys="sesame", admin_keys=ROOT_KEY))
    [record] = caplog.records
    assert "can be guessed" in record.getMessage()
    assert "sesame" not in record.getMessage()


def test_settings_do_not_show_their_keys() -> None:
    settings = Settings(api_keys=ALICE, admin_keys=ROOT_KEY)
    assert ALICE not in repr(settings)
    assert ROOT_KEY not in str(settings)


# --- how it starts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "settings", "said"),
    [
        (None, [], {}, "cannot be read: No such file or directory"),
        ("", [], {}, "has no key in it"),
        (f"alice {ALICE}", [], {}, "line 1"),
        ("\x00" * (2**20 + 1), [], {}, "exceeds 1,048,576 bytes"),
        (line("alice", ALICE), [], {"BACKBONE_API_KEYS": ALICE}, "a key of it is one of the settings' too"),
        (line("root", ROOT_KEY, "admin"), ["--host", "0.0.0.0"], {}, "has no key for clients"),
    ],
    ids=["missing", "empty", "plain", "huge", "twice", "only operators"],
)
def test_a_keys_file_that_cannot_be_used_ends_the_start_with_one_line(
    tmp_path: Path, text: str | None, arguments: list[str], settings: dict[str, str], said: str
) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    done = run("serve", "--port", "0", *arguments, **settings, BACKBONE_KEYS_FILE=str(path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert ALICE not in done.stderr


def test_a_file_of_keys_lets_the_service_listen_to_others(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("alice", ALICE))
    access = create_app(Settings(host="0.0.0.0", keys_file=path)).state.access
    assert access.asks_for_key(Who.CLIENTS)


def test_a_key_that_is_in_both_settings_is_an_operators_and_clients_need_one(serve: Serve) -> None:
    service = serve(api_keys=ALICE, admin_keys=ALICE)
    assert service.http.get("/models").status_code == 401
    assert service.http.delete("/models/x", headers={"X-API-Key": ALICE}).status_code == 404


# --- the command --------------------------------------------------------------------------------


def test_the_command_makes_a_key_and_a_line_that_a_file_takes(tmp_path: Path) -> None:
    done = run(
        "key", "--name", "alice", "--admin", "--requests", "60", "--megapixels", "0", "--new-models", "5"
    )
    assert done.returncode == 0, done.stderr
    key = done.stderr.split()[-1]
    assert len(key) >= 43  # 256 bits, six in a character
    quotas = {"requests": 60, "megapixels": 0, "new_models": 5}
    assert parse_keys(done.stdout) == {hashlib.sha256(key.encode()).digest(): Holder("alice", True, quotas)}
    assert key not in done.stdout


def test_two_keys_are_never_the_same() -> None:
    assert len({make_key() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "arguments", [["--name", "a b"], ["--name", ""], ["--name", "a", "--requests", "-1"]]
)
def test_the_command_makes_no_line_that_a_file_would_not_take(arguments: list[str]) -> None:
    done = run("key", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("backbone-service: ")


# --- while it serves ----------------------------------------------------------------------------


class Keyfile:
    """A keys file, and a service that reads it again when told to."""

    def __init__(self, path: Path, start: Start) -> None:
        self._path = path
        self.write(line("alice", ALICE))
        self.process: Process = start(BACKBONE_KEYS_FILE=str(path))

    def write(self, text: str, mode: int = 0o600) -> None:
        self._path.write_text(text)
        self._path.chmod(mode)

    def exchange(self, text: str, said: str) -> None:
        """Write another text, tell the service, and wait for what it says to that."""
        self.write(text)
        self.process.signal(signal.SIGHUP)
        self.process.wait_for_line(said)

    def asked(self, *keys: str) -> list[int]:
        return [asked(self.process.http, key) for key in keys]


def test_keys_are_exchanged_while_the_service_runs(tmp_path: Path, start: Start) -> None:
    file = Keyfile(tmp_path / "keys", start)
    assert file.asked(ALICE, BOB) == [405, 403]
    both = line("alice", ALICE) + line("bob", BOB) + line("root", ROOT_KEY, "admin")
    file.exchange(both, "the keys were read again: there are 3")
    assert file.asked(ALICE, BOB, ROOT_KEY) == [405, 405, 405]
    file.exchange(line("bob", BOB), "the keys were read again: there are 1")
    assert file.asked(ALICE, BOB, ROOT_KEY) == [403, 405, 403]


def test_keys_that_cannot_be_used_change_nothing_and_are_logged_without_them(
    tmp_path: Path, start: Start
) -> None:
    file = Keyfile(tmp_path / "keys", start)
    stay = "the keys stay as they were: BACKBONE_KEYS_FILE: "
    file.exchange(line("bob", BOB) + f"alice {ALICE}\n", stay + "line 2")
    file.exchange("", stay + "has no key in it")
    file.exchange(line("root", ROOT_KEY, "admin"), stay + "has no key for clients")
    os.remove(tmp_path / "keys")
    file.process.signal(signal.SIGHUP)
    file.process.wait_for_line(stay + "cannot be read")
    assert file.asked(ALICE, BOB, ROOT_KEY) == [405, 403, 403]
    log = "".join(file.process.lines)
    assert not any(key in log or written_hash(key) in log for key in (ALICE, BOB, ROOT_KEY))
    assert "may read the keys file" not in log


async def test_a_storm_of_hangups_reads_the_file_no_more_often_than_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text(line("alice", ALICE))
    caplog.set_level("INFO", "service.keys")
    access = Access(settings_for(tmp_path, keys_file=tmp_path / "keys"), Metrics())
    with access.reading_keys_on_hangup():
        for _ in range(50):
            signal.raise_signal(signal.SIGHUP)
        for _ in range(5):  # the signals come in meanwhile, and the last is behind what they asked for
            await access.read_keys_again()
    assert caplog.text.count("the keys were read again") == 5 + 2


def test_a_service_that_was_open_to_clients_is_closed_by_the_first_key_for_them(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "keys"
    path.write_text(line("root", ROOT_KEY, "admin"))
    process = start(BACKBONE_KEYS_FILE=str(path))
    assert process.http.put("/version").status_code == 405
    path.write_text(line("root", ROOT_KEY, "admin") + line("alice", ALICE))
    process.signal(signal.SIGHUP)
    process.wait_for_line("the keys were read again: there are 2")
    assert process.http.put("/version").status_code == 401
    assert asked(process.http, ALICE) == 405


def test_a_file_that_everybody_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(line("alice", ALICE))
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING, "service.keys"):
        create_app(Settings(keys_file=path))
    assert ["chmod" in record.getMessage() for record in caplog.records] == [True]
