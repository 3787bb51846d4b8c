"""Names of the hub (`hf-hub:ORGANISATION/NAME[@REVISION][/FILE]`) lead to files here, checked ones.

The hub's files are fetched by our own downloader and not by `huggingface_hub`, which accepts a flipped bit,
retries for most of a minute when there is no network, and has no bound on the whole of a download. Layout of
the URLs and the headers `ETag`, `X-Linked-ETag`, `X-Linked-Size`: the hub's own. No token is sent: what a
client names is fetched as the public sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson

from service.checkpoints.download import Head, Limits, Source, allowed_redirects, fetch, head_of
from service.checkpoints.names import HubName, RefusedNameError
from service.checkpoints.transfers import Transfer
from service.errors import RemoteFailed

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
USUAL_FILES: Final = ("model.safetensors", "pytorch_model.bin")
CONFIG_FILE: Final = "config.json"
MAX_CONFIG_BYTES: Final = 1_000_000


@dataclass(frozen=True)
class Hub:
    """The hub as the operator reaches it: `endpoint` is its base URL or a mirror's."""

    endpoint: str
    hosts: frozenset[str]
    limits: Limits

    def fetch(self, name: HubName, file: str, target: Path, transfer: Transfer) -> None:
        """Download one file of a repository to `target`; `transfer` is told how far it is.

        Raises:
            RefusedNameError: no such repository, revision or file.
            RemoteFailed, RemoteTimeout, Unavailable: see `download.fetch`.
        """
        source = self._source(name, file)
        fetch(source, target, self._limits(file), self._head(source, file), transfer)

    def usual_file(self, name: HubName) -> str:
        """The first of `USUAL_FILES` that the repository has."""
        for file in USUAL_FILES:
            if self._has(name, file):
                return file
        usual = " or ".join(USUAL_FILES)
        raise RefusedNameError(f"{name.name}: no such public repository on the hub, or none with {usual}")

    def _has(self, name: HubName, file: str) -> bool:
        try:
            head_of(self._source(name, file), self.limits)
        except RefusedNameError:
            return False
        return True

    def _head(self, source: Source, file: str) -> Head:
        head = head_of(source, self.limits)
        limit = self._limits(file).max_bytes
        if head.size is not None and head.size > limit:
            raise RefusedNameError(f"{source.name}: is over the limit of {limit} bytes")
        return head

    def _limits(self, file: str) -> Limits:
        if file != CONFIG_FILE:
            return self.limits
        return replace(self.limits, max_bytes=min(MAX_CONFIG_BYTES, self.limits.max_bytes))

    def _source(self, name: HubName, file: str) -> Source:
        base = self.endpoint.rstrip("/")
        url = f"{base}/{name.organisation}/{name.repository}/resolve/{name.revision}/{file}"
        return Source(name.name, url, allowed_redirects(self.hosts, url))


def hub_folder(directory: Path, name: HubName) -> Path:
    """Where a repository's files are kept; the parts hold no `--`, so two names have two folders."""
    return directory / "hub" / f"{name.organisation}--{name.repository}" / name.revision


def read_config(path: Path, name: HubName) -> dict[str, Any]:
    """A repository's `config.json` as data.

    Raises:
        RemoteFailed: it is not a JSON object.
    """
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise RemoteFailed(f"{name.name}: its {CONFIG_FILE} is not JSON") from error
    if not isinstance(config, dict):
        raise RemoteFailed(f"{name.name}: its {CONFIG_FILE} is not a JSON object")
    return config
