"""What every test may use: a real server on a real socket, images, checkpoint files."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from service.api.app import create_app
from service.api.server import server_config
from service.settings import Settings
from tests.processes import ROOT, Process, Start


class RunningService:
    """The service on a free port of loopback, in a thread of its own; a client that talks to it."""

    def __init__(self, settings: Settings, engine: Any = None) -> None:
        self.app = create_app(settings, engine)
        self._server = uvicorn.Server(server_config(self.app, settings, "warning"))
        self._started = threading.Event()
        self._server.started_event = self._started  # type: ignore[attr-defined]  # ours, read below
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        startup = self._server.startup

        async def started(sockets: Any = None) -> None:
            await startup(sockets)
            await self.app.state.startup.finished()
            self._started.set()

        self._server.startup = started  # type: ignore[method-assign]  # to be told, not to poll
        try:
            self._server.run()
        finally:
            self._started.set()

    def __enter__(self) -> RunningService:
        self._thread.start()
        assert self._started.wait(60)
        assert self._server.started, "the server did not start"
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop as on a signal: requests in flight are answered first."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def engine(self) -> Any:
        """The engine inside, for what cannot be seen from outside."""
        return self.app.state.startup.now


Serve = Callable[..., RunningService]


def settings_for(folder: Path, **given: Any) -> Settings:
    """Settings that leave nothing of the machine in."""
    defaults = {
        "port": 0,
        "config_dir": ROOT / "model_configs",
        "checkpoint_dir": folder,
        "device": "cpu",
        "model_budget": "4000000000",
        "engine": "torch",  # what converts models in the background is tested by itself
        "engine_cache": folder / "engine_cache",
    }
    return Settings(**{**defaults, **given})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start services with settings of one's own; they stop with the test."""
    running: list[RunningService] = []

    def start(**given: Any) -> RunningService:
        service = RunningService(settings_for(tmp_path, **given))
        service.__enter__()
        running.append(service)
        return service

    yield start
    for service in running:
        service.__exit__(None, None, None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start services as processes of their own; they end with the test."""
    running: list[Process] = []

    def one(*arguments: str, program: str = "", under: Sequence[str] = (), **settings: str) -> Process:
        process = Process(tmp_path, *arguments, program=program, under=under, **settings)
        running.append(process)
        return process

    yield one
    for process in running:
        process.close()


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of the shared service."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def service(checkpoint_dir: Path) -> Iterator[RunningService]:
    """One service with default settings, shared by the tests that do not change it."""
    with RunningService(settings_for(checkpoint_dir)) as running:
        yield running


@pytest.fixture(scope="session")
def http(service: RunningService) -> httpx.Client:
    """A client of the shared service."""
    return service.http


def encoded(array: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """An image file of an array."""
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, form, **options)
    return sink.getvalue()


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A 500x375 JPEG that is no flat colour."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    return encoded(np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)), "JPEG", quality=90)


def npy(array: np.ndarray) -> bytes:
    """A `.npy` file of an array."""
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def multipart(
    config: Any, image: bytes | None = None, tensor: np.ndarray | None = None, **parts: Any
) -> dict[str, Any]:
    """Keyword arguments of `httpx.Client.post` for a multipart request."""
    import orjson

    def text(value: Any) -> str:
        return value if isinstance(value, str) else orjson.dumps(value).decode()

    files: list[tuple[str, Any]] = []
    if image is not None:
        files.append(("image", ("image", image, "application/octet-stream")))
    if tensor is not None:
        files.append(("tensor", ("tensor.npy", npy(tensor), "application/x-npy")))
    data = {"backbone": text(config), **{name: text(value) for name, value in parts.items()}}
    return {"data": data, "files": files or {"image": ("empty", b"")}}
