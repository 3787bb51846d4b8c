"""Log lines: JSON or text, each with the ids of the request it belongs to, and written by a thread of its own.

The formatter is ours because it is closed: of what a record carries, only the members of `FIELDS` are written, so
nothing that a library hangs onto a record gets out. orjson does the work.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TextIO

import orjson

from service.context import CURRENT

ACCESS = "service.access"
# What the access log says of a request; see docs/metrics.md. No key, address, path, query or payload.
FIELDS = (
    "method",
    "route",
    "status",
    "duration_ms",
    "bytes_in",
    "bytes_out",
    "client",
    "model",
    "problem",
)
# What uvicorn logs of what our own lines have said.
REPEATED = ("Exception in ASGI application", "Invalid HTTP request received")
MAX_MESSAGE_CHARS = 8_192
MAX_TRACEBACK_CHARS = 32_768
MAX_WAITING_LINES = 10_000
MAX_LINES_AT_ONCE = 1_000
GATHER_S = 0.01  # to be woken for each line would cost more than the line
FLUSH_S = 2.0
# What ends a line, moves a cursor or hides text: C0, DEL, C1, the separators and marks of direction of Unicode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
log = logging.getLogger("service.crash")


def set_up_logs(form: str, level: str) -> None:
    """Send this process' log to standard error.

    Args:
        form: `json`, `text`, or `auto`: text on a terminal, else JSON.
        level: the least level of the service's and the server's own lines. Of libraries only warnings are taken:
            what they say below that has addresses with their queries.
    """
    is_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    handler = LineWriter(sys.stderr)
    handler.setFormatter(JsonLine() if is_json else TextLine())
    least = getattr(logging, level.upper())
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    for ours in ("service", "uvicorn"):
        logging.getLogger(ours).setLevel(least)
    logging.getLogger("uvicorn.error").addFilter(_is_no_repetition)
    for quoting in (
        "python_multipart",
        "opentelemetry.trace.span",
    ):  # they warn of, and with, what a client sent
        logging.getLogger(quoting).setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_crash
    threading.excepthook = _log_thread_crash


def _is_no_repetition(record: logging.LogRecord) -> bool:
    """A crash of a request has been logged by its middleware with the request's ids; what is no request, as refused."""
    return not str(record.msg).startswith(REPEATED)


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, Exception):  # a keyboard interrupt is no crash
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("the process ends", exc_info=(kind, error, trace))


def _log_thread_crash(crash: threading.ExceptHookArgs) -> None:
    name = "a thread" if crash.thread is None else crash.thread.name
    if crash.exc_value is not None:
        log.critical("%s ended", name, exc_info=crash.exc_value)


# --- one line -----------------------------------------------------------------------------------


class JsonLine(logging.Formatter):
    """A record as one line of JSON; a traceback is one of its members."""

    def format(self, record: logging.LogRecord) -> str:
        """`time` (RFC 3339, UTC), `level`, `logger`, `message`, ids, what of `FIELDS` there is, `exception`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _whole(record.getMessage()[:MAX_MESSAGE_CHARS]),
        }
        request = CURRENT.get()
        if request is not None:
            line["request_id"] = request.request_id
            line["trace_id"], line["span_id"] = request.trace.trace_id, request.trace.span_id
        held = record.__dict__
        line |= {name: held[name] for name in FIELDS if held.get(name) is not None}
        if record.exc_info:
            line["exception"] = _whole(self.formatException(record.exc_info)[-MAX_TRACEBACK_CHARS:])
        return orjson.dumps(line, default=str, option=orjson.OPT_UTC_Z).decode()


class TextLine(logging.Formatter):
    """A record for people: one line, and the lines of a traceback, indented so that none passes for a record."""

    def format(self, record: logging.LogRecord) -> str:
        """`TIME LEVEL LOGGER: MESSAGE [REQUEST ID]`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = _visible(record.getMessage()[:MAX_MESSAGE_CHARS])
        request = CURRENT.get()
        of_request = "" if request is None else f" [{request.request_id}]"
        line = f"{moment[:-6]}Z {record.levelname} {record.name}: {message}{of_request}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info)[-MAX_TRACEBACK_CHARS:]
        return "\n    ".join([line, *map(_visible, trace.split("\n"))])


def _whole(text: str) -> str:
    """Text that UTF-8 can hold; half a surrogate pair comes from a file's name that is none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _visible(text: str) -> str:
    """Text without what a terminal or a reader of lines would act upon."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# --- and its way out ----------------------------------------------------------------------------


class LineWriter(logging.Handler):
    """Hands lines to a thread. Who reads the log may stall; the event loop does not, and memory stays bounded.

    When `MAX_WAITING_LINES` wait, lines are lost, and a line says how many.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._lost = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format here, where the request is known, and leave the rest to the thread."""
        if self._waiting.qsize() >= MAX_WAITING_LINES:
            self._lost += 1
            return
        try:
            self._waiting.put(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of the standard library: a bad record stops nobody
            self.handleError(record)

    def flush(self) -> None:
        """Wait until what was logged so far is written, for as long as one waits for a reader that stalls."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(FLUSH_S)

    def _write_all(self) -> None:
        while True:
            self._write(self._taken())

    def _taken(self) -> list[str | threading.Event]:
        """All that waits, at least one."""
        taken = [self._waiting.get()]
        time.sleep(GATHER_S)
        try:
            while len(taken) < MAX_LINES_AT_ONCE:
                taken.append(self._waiting.get_nowait())
        except Empty:
            pass
        return taken

    def _write(self, taken: list[str | threading.Event]) -> None:
        lines = [item for item in taken if isinstance(item, str)]
        if self._lost:
            lost, self._lost = self._lost, 0
            record = logging.LogRecord(
                __name__, logging.WARNING, "", 0, f"{lost} lines of the log were lost", None, None
            )
            lines.append(self.format(record))
        try:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more, and there is no other place to say so
            self._lost += len(lines)
        for item in taken:
            if isinstance(item, threading.Event):
                item.set()
