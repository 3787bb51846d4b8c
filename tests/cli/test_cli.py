"""The installed command, run as a process of its own."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
from importlib.metadata import version
from typing import Any

import pytest

from service.cli import flag_of, shown_default
from service.settings import Settings
from tests.processes import COMMAND, ROOT, Start, environment

RESNET18 = {"type": "ResNet", "depth": 18}


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class HalfSent:
    """A request whose head has arrived and whose body is half there: in flight for as long as a test needs."""

    def __init__(self, port: int, config: dict[str, Any]) -> None:
        self._body = json.dumps({"backbone": config}).encode()
        head = (
            "POST /backbones/inspect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Expect: 100-continue\r\nContent-Length: {len(self._body)}\r\n\r\n"
        )
        self._socket = socket.create_connection(("127.0.0.1", port), 60)
        self._socket.sendall(head.encode())
        # The service asks for the body when its handler reads it: from here on the request is in flight.
        assert self._socket.recv(1024).startswith(b"HTTP/1.1 100")

    def finish(self) -> http.client.HTTPResponse:
        """Send the rest; the reply."""
        self._socket.sendall(self._body)
        reply = http.client.HTTPResponse(self._socket)
        reply.begin()
        return reply

    def close(self) -> None:
        self._socket.close()


# --- help, version, faults ----------------------------------------------------------------------


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert {"serve", "inspect"} <= set(done.stdout.split())


def test_help_of_serve_lists_every_setting_with_its_default() -> None:
    text = "".join(run("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert f"{flag_of(name)}{name.upper()}" in text or f"{flag_of(name)},--no-" in text
        assert f"(default:{shown_default(name)})" in text


def test_version_is_that_of_the_distribution() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.split() == ["backbone-service", version("backbone-service")]


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["--device", "gpu"], {}, ["--device (BACKBONE_DEVICE)", "cuda:N", "'gpu'"]),
        ([], {"BACKBONE_MODEL_BUDGET": "lots"}, ["--model-budget (BACKBONE_MODEL_BUDGET)", "70%", "'lots'"]),
        (["--engine", "abacus"], {}, ["--engine (BACKBONE_ENGINE)", "torch"]),
        (["--port", "99999"], {}, ["--port (BACKBONE_PORT)", "65535"]),
        (["--host", "0.0.0.0"], {}, ["0.0.0.0", "BACKBONE_API_KEYS", "BACKBONE_ALLOW_ANONYMOUS"]),
        (["--config-dir", "nowhere"], {}, ["--config-dir (BACKBONE_CONFIG_DIR)", "'nowhere'"]),
        ([], {"BACKBONE_CHECKPOINT_DIR": COMMAND}, ["--checkpoint-dir (BACKBONE_CHECKPOINT_DIR)"]),
        (["--hub-endpoint", "x", "--queue-size", "0"], {}, ["--queue-size (BACKBONE_QUEUE_SIZE)"]),
        ([], {"BACKBONE_DRAIN_SECONDS": "inf"}, ["--drain-seconds", "less than or equal to 86400"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_setting_ends_the_start_with_one_line_that_names_it(
    arguments: list[str], settings: dict[str, str], said: list[str]
) -> None:
    done = run("serve", *arguments, **settings)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [words for words in said if words not in done.stderr] == []


def test_a_taken_port_ends_the_start_with_the_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr


# --- inspect ------------------------------------------------------------------------------------


def test_inspect_prints_what_a_config_would_build_as_json() -> None:
    neck = '{"type":"GlobalAveragePooling"}'
    done = run("inspect", '{"type":"ResNet","depth":50}', "--neck", neck, "--input-size", "480", "640")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["input_size"] == [480, 640]
    assert [level["shape"] for level in found["levels"]] == [[1, 2048]]


def test_inspect_knows_named_configs() -> None:
    done = run("inspect", "resnet50_c5", "--config-dir", str(ROOT / "model_configs"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["type"] == "mmpretrain.ResNet"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"type":"ResNet","depth":51}', "#/backbone/depth"),
        ("resnet5O", "resnet50"),
        ('{"type":', "not JSON"),
    ],
)
def test_inspect_says_what_is_wrong_and_exits_with_one(config: str, said: str) -> None:
    done = run("inspect", config)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- serve --------------------------------------------------------------------------------------


def test_flags_go_before_the_environment(start: Start) -> None:
    process = start("--max-images", "3", BACKBONE_MAX_IMAGES="5", BACKBONE_MAX_PIXELS="1000")
    body = {"backbone": RESNET18, "images": [{"base64": "AAAA"}] * 4}
    assert "4 images exceed 3" in process.http.post("/features", json=body).json()["detail"]


def test_what_is_probably_not_meant_is_said_at_start(start: Start) -> None:
    process = start(BACKBONE_MODEL_BUGDET="1", BACKBONE_CHECKPOINT_DIR="not-yet")
    log = "".join(process.lines)
    assert "BACKBONE_MODEL_BUGDET is no setting" in log
    assert "'not-yet'" in log


def test_an_idle_service_exits_with_zero_on_ctrl_c(start: Start) -> None:
    process = start()
    assert process.http.get("/healthz").status_code == 200
    process.signal(signal.SIGINT)
    assert process.wait() == 0


def test_what_is_in_flight_at_sigterm_is_finished(start: Start) -> None:
    process = start("--drain-seconds", "60")
    assert process.http.get("/version").status_code == 200  # waits until it is up
    held = HalfSent(process.port, RESNET18)
    process.signal(signal.SIGTERM)
    process.wait_for_line("draining")
    ready, alive = process.http.get("/readyz"), process.http.get("/healthz")
    refused = process.http.post("/backbones/inspect", json={"backbone": RESNET18})
    reply = held.finish()
    levels = json.loads(reply.read())["levels"]
    held.close()
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert alive.status_code == 200
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/draining")
    assert refused.headers["retry-after"] == "1"
    assert reply.status == 200
    assert levels[0]["channels"] == 512
    assert process.wait() == 0


def test_what_takes_longer_than_the_drain_is_cut_off(start: Start) -> None:
    process = start("--drain-seconds", "0.2")
    held = HalfSent(process.port, RESNET18)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    held.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(start: Start, number: int) -> None:
    process = start("--drain-seconds", "600")
    held = HalfSent(process.port, RESNET18)
    process.signal(signal.SIGTERM)
    process.wait_for_line("draining")
    process.signal(number)
    assert process.wait() == -number
    held.close()
