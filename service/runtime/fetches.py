"""Checkpoints that requests wait for: one task a name, however many wait; what `GET /models` says of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from service.checkpoints.names import shown
from service.checkpoints.resolve import CheckpointFile, CheckpointStore
from service.checkpoints.transfers import Transfer
from service.config.spec import WeightsRef
from service.errors import DeadlineExceeded, ModelLoading, ServiceError
from service.runtime.threads import on_thread

RETRY_AFTER_S = 5


@dataclass(frozen=True)
class _Fetch:
    """A checkpoint that is being fetched, and the type that it was first asked for."""

    type: str
    task: asyncio.Task[CheckpointFile]


class Fetches:
    """Finds the files of checkpoints. Everything here runs on the event loop; the files are read elsewhere.

    Files that are here already are looked at on threads of their own, so that none waits behind a download.

    Args:
        store: where they are and come from.
        executor: where downloads run; its threads are how many run at a time.
    """

    def __init__(self, store: CheckpointStore, executor: Executor) -> None:
        self._store = store
        self._executor = executor
        self._files = ThreadPoolExecutor(2, "file")
        self._fetches: dict[tuple[str, str], _Fetch] = {}

    async def find(self, ref: WeightsRef, type_name: str) -> CheckpointFile:
        """The file of a checkpoint, fetched if need be; who gives up waiting does not end the download.

        Raises:
            CheckpointUnavailable, RemoteFailed, RemoteTimeout, Unavailable: as `CheckpointStore.resolve`.
        """
        key = ref.name, ref.pointer
        if key not in self._fetches:
            file = self._store.peek(ref) or await on_thread(self._files, self._store.at_hand, ref)
            if file is not None:
                return file
        if key not in self._fetches:  # nor has anybody asked meanwhile
            task = asyncio.create_task(on_thread(self._executor, self._store.resolve, ref))
            self._fetches[key] = _Fetch(type_name, task)
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(self._fetches[key].task)

    def _landed(self, key: tuple[str, str], task: asyncio.Task[CheckpointFile]) -> None:
        del self._fetches[key]
        if not task.cancelled():
            task.exception()  # is told to those who still wait, if any

    def too_late(self, ref: WeightsRef) -> ServiceError:
        """What a request is told whose deadline passed while it waited: a host that sends nothing is no progress."""
        transfer = self._transfers().get(ref.name)
        if transfer is None or not transfer.fetched:
            return DeadlineExceeded("the deadline passed before anything of the checkpoint came")
        of = "" if transfer.total is None else f" of {transfer.total:,}"
        detail = (
            f"{shown(ref.name)} is still being fetched, {transfer.received:,}{of} bytes so far; ask again"
        )
        return ModelLoading(detail, retry_after_s=RETRY_AFTER_S)

    def describe(self) -> list[dict[str, Any]]:
        """The checkpoints on their way, as `loading` of `GET /models` has them."""
        transfers = self._transfers()
        asked = {name: fetch.type for (name, _), fetch in self._fetches.items()}
        return [_described(name, type_name, transfers.get(name)) for name, type_name in asked.items()]

    def _transfers(self) -> dict[str, Transfer]:
        return {transfer.name: transfer for transfer in self._store.transfers}

    def stop(self) -> None:
        """End the downloads; who waits is told so."""
        self._store.stop()
        self._files.shutdown(wait=False, cancel_futures=True)


def _described(name: str, type_name: str, transfer: Transfer | None) -> dict[str, Any]:
    """`queued` before its turn, or while the same file comes under another name."""
    return {
        "id": None,
        "type": type_name,
        "state": "queued" if transfer is None else "downloading",
        "checkpoint": name,
        "received": 0 if transfer is None else transfer.received,
        "total": None if transfer is None else transfer.total,
        "started": None if transfer is None else transfer.started,
    }
