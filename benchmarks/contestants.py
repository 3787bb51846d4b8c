"""Who is measured: this service and what one would use instead, each as it is and with OpenVINO."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks.jobs import Job, peer_form_message, peer_raw_message
from benchmarks.peer_environment import PYTHON, install
from benchmarks.processes import ROOT, Launch

SERVICE = "this service"
PEER_ENGINES = {"": "torch", " + OpenVINO by hand": "openvino"}


@dataclass(frozen=True)
class Contestant:
    """A server, how it is started for a job, and how a request to it is written."""

    name: str
    peer: str
    engine: str
    launch: Callable[[Job, int], Launch]
    message: Callable[[Job, bytes], bytes]

    @property
    def is_service(self) -> bool:
        """Whether this is the service itself."""
        return self.peer == SERVICE


@dataclass(frozen=True)
class Peer:
    """A framework that one would serve timm with; `package` is what is installed for it, if anything."""

    name: str
    module: str
    package: str | None
    command: Callable[[str, Job, str, int], list[str]]
    message: Callable[[Job, bytes], bytes]
    health_path: str
    environment: Callable[[Job, str], Mapping[str, str]] = field(default=lambda job, engine: {})  # noqa: ARG005

    def prepare(self) -> str:
        """The version, installed if need be.

        Raises:
            NotInstalled: it could not be.
        """
        return install(self.package) if self.package else version(self.module_package)

    @property
    def module_package(self) -> str:
        """What the version is told of."""
        return self.package or "fastapi"

    def contestant(self, suffix: str, engine: str) -> Contestant:
        """This peer on one engine."""

        def launch(job: Job, port: int) -> Launch:
            python = str(PYTHON) if self.package else sys.executable
            command = [python, "-m", *self.command(self.module, job, engine, port)]
            return Launch(command, self.health_path, self.environment(job, engine))

        return Contestant(self.name + suffix, self.name, engine, launch, self.message)


def _by_arguments(module: str, job: Job, engine: str, port: int) -> list[str]:
    return [module, job.name, engine, str(port)]


def _by_port_only(module: str, job: Job, engine: str, port: int) -> list[str]:  # noqa: ARG001  # one signature
    # Its default of 3 s would turn a slow first batch into an error.
    return [module, "--address", "127.0.0.1", "--port", str(port), "--timeout", "120000"]


def _in_environment(job: Job, engine: str) -> Mapping[str, str]:
    return {"BENCHMARK_JOB": job.name, "BENCHMARK_ENGINE": engine}


def _form(job: Job, image: bytes) -> bytes:  # noqa: ARG001  # one signature
    return peer_form_message("/features", image)


def _raw(job: Job, image: bytes) -> bytes:  # noqa: ARG001  # one signature
    return peer_raw_message("/inference", image)


PEERS = {
    "fastapi": Peer(
        "FastAPI + timm", "benchmarks.peers.fastapi_server", None, _by_arguments, _form, "/openapi.json"
    ),
    "litserve": Peer(
        "LitServe", "benchmarks.peers.litserve_server", "litserve", _by_arguments, _form, "/health"
    ),
    "mosec": Peer(
        "mosec", "benchmarks.peers.mosec_server", "mosec", _by_port_only, _raw, "/", _in_environment
    ),
}


def service_launch(folder: Path, port: int, **settings: str) -> Launch:
    """The service with settings of its own; its checkpoints lie in `folder`."""
    environment = {
        "BACKBONE_CONFIG_DIR": str(ROOT / "model_configs"),
        "BACKBONE_CHECKPOINT_DIR": str(folder / "checkpoints"),
        **{f"BACKBONE_{name.upper()}": value for name, value in settings.items()},
    }
    (folder / "checkpoints").mkdir(exist_ok=True)
    return Launch(
        [sys.executable, "-m", "service.cli", "serve", "--port", str(port)], "/healthz", environment
    )


def service_contestants(folder: Path, device: str = "cpu") -> list[Contestant]:
    """The service as it starts, and held to torch."""

    def contestant(name: str, engine: str) -> Contestant:
        def launch(job: Job, port: int) -> Launch:  # noqa: ARG001  # it serves every job
            return service_launch(folder, port, engine=engine, device=device)

        return Contestant(name, SERVICE, engine, launch, Job.service_message)

    return [contestant(SERVICE, "auto"), contestant(f"{SERVICE}, engine torch", "torch")]


def peer_contestants(names: Iterable[str]) -> list[Contestant]:
    """Each peer as documented, and once more with OpenVINO put in."""
    return [
        PEERS[name].contestant(suffix, engine) for name in names for suffix, engine in PEER_ENGINES.items()
    ]
