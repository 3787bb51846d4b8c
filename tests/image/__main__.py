"""`make image-test`: build the image, start it behind the gateway by `docker-compose.yml`, and try what is promised.

It needs podman with runc, and either the registries that the images are in or images that are here already:

    BASE_IMAGE       a base that is here, in place of the Dockerfile's; the gateway is then built on it too
    SITE_PACKAGES    an installed environment for the base's Python, mounted instead of installed (VARIANT=mounted)
    CONTAINERS_CONF  podman's own variable, for machines on which its defaults do not work

One line a claim; the first that fails ends it with status 1 and the logs. Containers and volumes are removed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from PIL import Image

from tests.processes import ROOT

PROJECT = "backbone-image-test"
IMAGE = "localhost/backbone-service:image-test"
GATEWAY_IMAGE = "localhost/gateway:image-test"
DEPENDENCIES = "/opt/dependencies"
URL = "http://127.0.0.1:8080"
REPLICAS = [f"{PROJECT}_backbone_{number}" for number in (1, 2)]
GATEWAY = f"{PROJECT}_gateway_1"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
GRACE_S = int(COMPOSE["backbone"]["stop_grace_period"].removesuffix("s"))
CLIENTS = 4
ANSWERS = 40  # before a replica is told to stop, and after it has
LONGEST_LOAD_S = 300  # as the machine may be small and busy; nothing here is about speed
LONGEST_START_S = 60
PODMAN_COMPOSE = Path(sys.executable).parent / "podman-compose"
OUTSIDE = [("1.1.1.1", 443), ("169.254.169.254", 80), ("download.pytorch.org", 443)]
REACH = """
import socket, sys
for address in {outside}:
    try:
        socket.create_connection(address, 3)
    except OSError:
        continue
    sys.exit("reached %s:%d" % address)
"""


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command's end, its output kept.

    Raises:
        AssertionError: it failed and `check` is set.
    """
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{shlex.join(done.args)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def inside(*command: str, replica: str = REPLICAS[0]) -> subprocess.CompletedProcess[str]:
    """A command run in a replica, failed or not."""
    return run("podman", "exec", replica, *command, check=False)


def inspected(container: str, question: str) -> str:
    return run("podman", "inspect", "--format", question, container).stdout.strip()


# --- what is tried ------------------------------------------------------------------------------


def the_compose_files_fit_together() -> None:
    for name in ("cuda", "downloads"):
        done = run(PODMAN_COMPOSE, "-f", "docker-compose.yml", "-f", f"docker-compose.{name}.yml", "config")
        backbone = yaml.safe_load(done.stdout)["services"]["backbone"]
        added = yaml.safe_load((ROOT / f"docker-compose.{name}.yml").read_text())["services"]["backbone"]
        assert set(COMPOSE["backbone"]) | set(added) <= set(backbone), name
        assert backbone["read_only"], name


def the_image_is_built_with_its_health_check_and_labels() -> None:
    arguments = {"VARIANT": "mounted" if "SITE_PACKAGES" in os.environ else "cpu", "BUILD": "image-test"}
    _build(ROOT / "Dockerfile", ROOT, IMAGE, arguments)
    config = json.loads(inspected(IMAGE, "{{json .Config}}"))
    assert config["Labels"]["org.opencontainers.image.revision"] == "image-test"
    assert config["User"] == "10001:10001"
    assert inspected(IMAGE, "{{.HealthCheck}}") != "<nil>"
    if "BASE_IMAGE" in os.environ:
        folder = ROOT / "tests" / "image"
        _build(folder / "gateway.Dockerfile", folder, GATEWAY_IMAGE, {})


def _build(file: Path, context: Path, tag: str, arguments: dict[str, str]) -> None:
    if base := os.environ.get("BASE_IMAGE"):
        arguments = {**arguments, "BASE_IMAGE": base}
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    # Podman's own format drops the health check.
    run("podman", "build", "--format", "docker", *given, "--tag", tag, "--file", file, context)


def without_keys_it_does_not_start() -> None:
    done = run("podman", "run", "--rm", "--network", "none", *_mounted(), IMAGE, check=False)
    assert done.returncode == 2, done
    assert "without BACKBONE_API_KEYS" in done.stderr


def _mounted() -> list[str]:
    packages = os.environ.get("SITE_PACKAGES")
    return (
        ["--volume", f"{packages}:{DEPENDENCIES}:ro", "--env", f"PYTHONPATH={DEPENDENCIES}"]
        if packages
        else []
    )


def two_replicas_behind_the_gateway_become_healthy() -> None:
    deadline = time.monotonic() + LONGEST_START_S
    for replica in REPLICAS:
        while run("podman", "healthcheck", "run", replica, check=False).returncode:
            assert time.monotonic() < deadline, f"{replica} is not healthy after {LONGEST_START_S} s"
            time.sleep(0.5)


def the_readmes_curl_is_answered_through_the_gateway() -> None:
    readme = (ROOT / "README.md").read_text().partition("## In a container")[2]
    found = re.search(r"^curl .*$", readme, re.MULTILINE)
    assert found
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photo.jpg").write_bytes(photo())
        command = f"cd {folder} && {found[0].replace('curl ', 'curl --silent --fail-with-body ')}"
        levels = json.loads(run("bash", "-c", command).stdout)["levels"]
    assert [level["shape"] for level in levels] == [[1, 2048, 7, 7]]


def photo() -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (375, 500, 3), np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def the_server_is_process_one_and_not_root() -> None:
    assert "backbone-service" in inside("cat", "/proc/1/cmdline").stdout
    status = _status()
    assert set(status["Uid"].split()) == {"10001"}
    assert set(status["Gid"].split()) == {"10001"}


def _status() -> dict[str, str]:
    """What the kernel says of process 1."""
    return dict(line.split(":\t", 1) for line in inside("cat", "/proc/1/status").stdout.splitlines())


def it_has_no_capability_and_cannot_get_one() -> None:
    status = _status()
    kinds = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {kind: int(status[kind], 16) for kind in kinds} == dict.fromkeys(kinds, 0)
    assert status["NoNewPrivs"] == "1"


def it_writes_to_its_volumes_and_tmp_only() -> None:
    for folder in ("/", "/opt/backbone", "/etc/backbone/model_configs", "/var/lib/backbone"):
        refused = inside("touch", f"{folder}/file")
        assert refused.returncode, folder
        assert "Read-only file system" in refused.stderr
    for folder in ("/tmp", "/var/lib/backbone/checkpoints", "/var/cache/backbone"):
        assert inside("touch", f"{folder}/file").returncode == 0, folder


def nothing_in_it_installs_or_builds_software() -> None:
    assert inside("sh", "-c", "command -v pip pip3 gcc cc make curl").stdout == ""
    for module in ("pip", "ensurepip"):
        done = inside("python3", "-I", "-c", f"import {module}")
        assert "ModuleNotFoundError" in done.stderr, module


def it_is_not_published_and_reaches_nothing_outside() -> None:
    assert run("podman", "port", REPLICAS[0]).stdout == ""
    done = inside("python3", "-I", "-c", REACH.format(outside=OUTSIDE))
    assert done.returncode == 0, done.stderr


def a_replica_stops_under_load_and_no_request_fails() -> None:
    with load() as statuses:
        _wait_for(statuses, ANSWERS)
        before_s = time.monotonic()
        run("podman", "stop", "--time", str(GRACE_S), REPLICAS[0])
        took_s = time.monotonic() - before_s
        _wait_for(statuses, sum(statuses.values()) + ANSWERS)
    served = run("podman", "logs", REPLICAS[0])
    print(f"           {dict(statuses)}: {CLIENTS} clients, stopped in {took_s:.1f} of {GRACE_S} s")
    assert "/features" in served.stdout + served.stderr, "the replica that stopped had none of the load"
    assert set(statuses) == {200}
    assert inspected(REPLICAS[0], "{{.State.ExitCode}}") == "0"
    assert took_s < GRACE_S


@contextmanager
def load() -> Iterator[Counter[int]]:
    """Clients that send images until the end; how their requests went, by status. 0 is no answer."""
    statuses: Counter[int] = Counter()
    ended = threading.Event()
    clients = [threading.Thread(target=_send, args=(statuses, ended)) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        ended.set()
        for client in clients:
            client.join()


def _send(statuses: Counter[int], ended: threading.Event) -> None:
    query = {"backbone": '{"type":"timm.test_resnet"}', "preprocess": '{"mode":"crop","size":64}'}
    body, head = photo(), {"Content-Type": "image/jpeg"}
    with httpx.Client(base_url=URL, timeout=60, trust_env=False) as http:
        while not ended.is_set():
            try:
                statuses[http.post("/features", params=query, content=body, headers=head).status_code] += 1
            except httpx.HTTPError:
                statuses[0] += 1


def _wait_for(statuses: Counter[int], count: int) -> None:
    deadline = time.monotonic() + LONGEST_LOAD_S
    while sum(statuses.values()) < count:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.05)


CLAIMS: tuple[Callable[[], None], ...] = (
    two_replicas_behind_the_gateway_become_healthy,
    the_readmes_curl_is_answered_through_the_gateway,
    the_server_is_process_one_and_not_root,
    it_has_no_capability_and_cannot_get_one,
    it_writes_to_its_volumes_and_tmp_only,
    nothing_in_it_installs_or_builds_software,
    it_is_not_published_and_reaches_nothing_outside,
    a_replica_stops_under_load_and_no_request_fails,
)


# --- how ----------------------------------------------------------------------------------------


def override() -> dict[str, Any]:
    """What is different from `docker-compose.yml`: the image that was built, and what stands in for a registry's."""
    backbone: dict[str, Any] = {"image": IMAGE}
    if packages := os.environ.get("SITE_PACKAGES"):
        backbone |= {"environment": {"PYTHONPATH": DEPENDENCIES}}
        backbone |= {"volumes": [f"{packages}:{DEPENDENCIES}:ro"]}
    gateway = {"image": GATEWAY_IMAGE} if "BASE_IMAGE" in os.environ else {}
    return {"services": {"backbone": backbone, "gateway": gateway}}


@contextmanager
def composed() -> Iterator[None]:
    """The compose file's services, up with two replicas; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "override.yml"
        file.write_text(yaml.safe_dump(override()))
        compose = (PODMAN_COMPOSE, "-p", PROJECT, "-f", ROOT / "docker-compose.yml", "-f", file)
        try:
            run(*compose, "up", "--detach", "--no-build", "--scale", "backbone=2")
            yield
        finally:
            # `down` forgets the second replica.
            run("podman", "pod", "rm", "--force", "--ignore", "--time", "5", f"pod_{PROJECT}")
            run(*compose, "down", "--volumes", "--timeout", "5")


def tried(claim: Callable[[], None]) -> None:
    begun_s = time.monotonic()
    claim()
    print(f"ok {time.monotonic() - begun_s:5.1f} s  {claim.__name__.replace('_', ' ')}", flush=True)


def main() -> int:
    """Try every claim; the exit status."""
    try:
        tried(the_compose_files_fit_together)
        tried(the_image_is_built_with_its_health_check_and_labels)
        tried(without_keys_it_does_not_start)
        with composed():
            try:
                for claim in CLAIMS:
                    tried(claim)
            except AssertionError:
                for container in (*REPLICAS, GATEWAY):
                    logs = run("podman", "logs", "--tail", "20", container, check=False)
                    print(f"--- {container}\n{logs.stdout}{logs.stderr}", file=sys.stderr)
                raise
    except AssertionError as fault:
        print(f"failed: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
