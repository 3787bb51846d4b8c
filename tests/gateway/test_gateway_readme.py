"""The README's lines for a gateway, run as pasted; only the ports are others."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from tests.conftest import ROOT, RunningService
from tests.gateway.nginx import DEPLOY, find_nginx


def block() -> str:
    """The commands of the section."""
    section = (ROOT / "README.md").read_text().partition("## Behind a gateway\n")[2].partition("\n## ")[0]
    [commands] = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(commands)


def test_the_lines_work_as_pasted(service: RunningService, tmp_path: Path, photo: bytes) -> None:
    command = find_nginx()
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "photo.jpg").write_bytes(photo)
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as dead:
        port, dead_port = (str(sock.getsockname()[1]) for sock in (free, dead))
    listen = tmp_path / "deploy/gateway/listen.conf"
    listen.write_text(listen.read_text().replace("8080", port))
    ports = {"8001": service.url.rpartition(":")[2], "8002": dead_port, "8080": port}
    script = re.sub("|".join(ports), lambda match: ports[match[0]], block())
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:{Path(command).parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The reply and nginx's log come in either order.
    assert '"levels":[{' in done.stdout
    assert '"status":"200"' in done.stdout
