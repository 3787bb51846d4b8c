"""What the service logs: as an installed process, read from its standard error."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.logs import MAX_WAITING_LINES, JsonLine, LineWriter, TextLine
from tests.api.raw import RawClient
from tests.conftest import encoded, multipart
from tests.processes import COMMAND, Process, Start, environment

RESNET18 = {"type": "ResNet", "depth": 18}
DOTS = encoded(np.zeros((20, 30, 3), np.uint8))
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CRASHING = """
import uvicorn
from starlette.routing import Route
from service.api.app import create_app
from service.logs import set_up_logs
from service.settings import Settings

def crash(_request):
    raise RuntimeError("the wheel came off")

set_up_logs("json", "info")
app = create_app(Settings(device="cpu", engine="torch"))
app.router.routes.insert(0, Route("/version", crash))  # in the place of one that there is
uvicorn.run(app, port=0, log_config=None, access_log=False)
"""


def ended(process: Process) -> list[dict[str, Any]]:
    """Every line of the log of a process that is told to stop."""
    process.signal(signal.SIGTERM)
    process.wait()
    return [json.loads(line) for line in process.lines if line != "(end of the log)"]


def access(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["logger"] == "service.access"]


def test_every_line_is_json_with_time_level_logger_and_message(start: Start) -> None:
    process = start()
    process.http.get("/version")
    lines = ended(process)
    assert {line["logger"].partition(".")[0] for line in lines} == {"service", "uvicorn"}
    for line in lines:
        assert RFC3339.fullmatch(line["time"])
        assert line["level"] in ("info", "warning")
        assert line["message"]


def test_a_request_is_one_line_with_its_ids_and_sizes(start: Start) -> None:
    process = start()
    headers = {"X-Request-ID": "mine-1", "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    reply = process.http.post("/features", **multipart(RESNET18, DOTS), headers=headers)
    [line] = access(ended(process))
    assert RFC3339.fullmatch(line.pop("time"))
    assert line.pop("duration_ms") > 0
    assert line.pop("span_id") not in ("00f067aa0ba902b7", "")
    assert re.fullmatch(r"POST /features 200 \d+\.\dms", line.pop("message"))
    assert line == {
        "level": "info",
        "logger": "service.access",
        "request_id": "mine-1",
        "trace_id": TRACE_ID,
        "method": "POST",
        "route": "/features",
        "status": 200,
        "bytes_in": int(reply.request.headers["content-length"]),
        "bytes_out": len(reply.content),
        "model": reply.headers["x-model-id"],
    }


def test_nothing_that_a_client_sent_is_logged(start: Start) -> None:
    process = start(BACKBONE_API_KEYS="k-right", BACKBONE_LOG_LEVEL="debug")
    http = process.http
    secret = "zebra"
    right = {"Authorization": "Bearer k-right", "Cookie": f"s={secret}", "User-Agent": secret}
    http.get(f"/{secret}%0d%0aINFO forged", headers=right)
    http.get(f"/backbones/{secret}", params={"q": secret}, headers=right)
    http.get("/models", headers={"X-API-Key": f"k-{secret}"})
    http.post("/features", content=secret.encode(), headers={**right, "Content-Type": "application/json"})
    http.post("/features", **multipart({"type": "ResNet", "depth": secret}, DOTS), headers=right)
    http.post("/features", **multipart(RESNET18, secret.encode()), headers=right)
    http.request("PROPFIND", f"/{secret}", headers=right)
    lines = ended(process)
    assert [line["status"] for line in access(lines)] == [404, 404, 403, 400, 422, 415, 404]
    assert access(lines)[2]["problem"] == "forbidden"
    text = "".join(process.lines)
    assert secret not in text
    assert "k-right" not in text
    assert "forged" not in text


def test_a_tracestate_that_is_none_is_not_logged(start: Start) -> None:
    process = start(BACKBONE_TRACING="1", OTEL_TRACES_SAMPLER="always_off")
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "tracestate": "zebra"}
    assert process.http.get("/version", headers=headers).status_code == 200
    ended(process)
    assert "zebra" not in "".join(process.lines)


def test_what_is_no_request_is_one_line(start: Start) -> None:
    process = start()
    with RawClient(f"http://127.0.0.1:{process.port}") as client:
        client.send(b"zebra\r\n\r\n")
        client.reply().problem(400, "malformed-request")
    lines = ended(process)
    assert [line["problem"] for line in access(lines)] == ["malformed_request"]
    assert [line for line in lines if line["level"] != "info"] == []


def test_a_request_is_logged_by_the_name_of_its_key(start: Start, tmp_path: Path) -> None:
    key = "a-key-of-alice-and-of-nobody-else"
    (tmp_path / "keys").write_text(f"alice sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
    process = start(BACKBONE_KEYS_FILE=str(tmp_path / "keys"))
    process.http.get("/version", headers={"X-API-Key": key})
    process.http.get("/version")
    named, stranger = access(ended(process))
    assert named["client"] == "alice"
    assert "client" not in stranger
    assert key not in "".join(process.lines)


def test_probes_are_logged_at_debug_only(start: Start) -> None:
    for level, counted in (("info", 0), ("debug", 3)):
        process = start("--log-level", level)
        for probe in ("/healthz", "/readyz", "/metrics"):
            process.http.get(probe)
        assert len(access(ended(process))) == counted


def test_a_level_leaves_out_what_is_below() -> None:
    done = subprocess.run(
        [COMMAND, "serve", "--log-level", "warning", "--device", "cuda:99", "--port", "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == ["error"]


def test_a_crash_is_one_line_with_its_traceback_and_the_request(start: Start) -> None:
    process = start(program=CRASHING)
    reply = process.http.get("/version", headers={"X-Request-ID": "mine-2"})
    assert reply.status_code == 500
    crashes = [line for line in ended(process) if "wheel" in json.dumps(line)]
    assert len(crashes) == 1
    assert crashes[0]["level"] == "error"
    assert crashes[0]["request_id"] == "mine-2"
    assert crashes[0]["route"] == "/version"
    assert crashes[0]["exception"].startswith("Traceback")
    assert crashes[0]["exception"].endswith("RuntimeError: the wheel came off")


def test_a_terminal_gets_text() -> None:
    ours, theirs = pty.openpty()
    asked = environment(BACKBONE_TRACING="1", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    done = subprocess.run([COMMAND, "serve"], env=asked, stderr=theirs, timeout=60, check=False)
    os.close(theirs)
    text = os.read(ours, 4096).decode()
    os.close(ours)
    assert done.returncode == 2
    assert re.fullmatch(r"\S+Z ERROR service.server: cannot start: OTEL_EXPORTER_OTLP_PROTOCOL: .*\r\n", text)


# --- one line -----------------------------------------------------------------------------------

HOSTILE = "a\nb\r\x1b[2K\u2028c\x85\u202ed"


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("service.test", logging.WARNING, "", 0, message, None, info)


def test_text_cannot_be_forged() -> None:
    text = TextLine().format(record(HOSTILE, ValueError(HOSTILE)))
    first, *rest = text.split("\n")
    assert first.endswith(r"service.test: a\u000ab\u000d\u001b[2K\u2028c\u0085\u202ed")
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert not re.search("[\r\x1b\x85\u2028\u202e]", text)


def test_json_is_one_line_that_holds_it_all() -> None:
    text = JsonLine().format(record(HOSTILE, ValueError(HOSTILE)))
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == HOSTILE
    assert HOSTILE in line["exception"]


@pytest.mark.parametrize("formatter", [JsonLine(), TextLine()])
def test_names_that_are_no_text_are_logged(formatter: logging.Formatter) -> None:
    assert r"caf\udce9" in formatter.format(record("caf\udce9")).replace("\\\\", "\\")


def test_a_line_is_bounded() -> None:
    huge = "x" * 1_000_000
    for formatter in (JsonLine(), TextLine()):
        assert len(formatter.format(record(huge, ValueError(huge)))) < 50_000


def test_who_stops_reading_the_log_stops_nobody_and_learns_what_was_lost() -> None:
    readable, writable = os.pipe()
    with os.fdopen(writable, "w") as sink, os.fdopen(readable) as source:
        writer = LineWriter(sink)
        writer.setFormatter(JsonLine())
        sent = 2 * MAX_WAITING_LINES
        for number in range(sent):
            writer.handle(record(str(number)))
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(iter(source.readline, "")))
        reader.start()
        writer.flush()
        writer.handle(record("later"))
        writer.flush()
        sink.close()
        reader.join(60)
    messages = [json.loads(line)["message"] for line in lines]
    [lost] = [
        int(found[1])
        for text in messages
        if (found := re.fullmatch(r"(\d+) lines of the log were lost", text))
    ]
    assert messages[-1] == "later"
    assert lost > 0
    assert len(messages) == sent - lost + 2


def test_a_thread_that_dies_is_a_line() -> None:
    program = """
import logging, threading
from service.logs import set_up_logs
set_up_logs("json", "info")
thread = threading.Thread(target=lambda: 1 / 0, name="loader")
thread.start()
thread.join()
raise RuntimeError("and so does the process")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["level"], first["message"]) == ("critical", "loader ended")
    assert first["exception"].endswith("ZeroDivisionError: division by zero")
    assert (second["level"], second["message"]) == ("critical", "the process ends")
    assert done.returncode == 1
