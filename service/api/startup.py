"""The engine of an app while it is being made: the door opens first, and who comes early waits.

Importing torch and what stands on it takes seconds. It happens on a thread of its own, while probes are answered.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from service.errors import CannotStart, Draining, Starting, Unavailable
from service.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from service.runtime.engine import Engine

log = logging.getLogger("service.start")


class Startup:
    """Makes one engine; `engine` waits for it. Call `begin`, `finished` and `stop` inside a running event loop.

    Args:
        given: an engine made elsewhere, which is started but not stopped here.
    """

    def __init__(self, settings: Settings, metrics: Metrics, given: Engine | None = None) -> None:
        self.metrics = metrics
        self.now: Engine | None = None
        self.failure: BaseException | None = None
        self.draining = False
        self._settings = settings
        self._given = given
        self._made: Future[Engine] | None = None
        self._making: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the engine that was given, or begin to make one."""
        if self._given is not None:
            self._given.start()
            self.now = self._given
            return
        executor = ThreadPoolExecutor(1, "start")
        imported = executor.submit(_import_engine)  # cannot be cancelled; what waits behind it can
        self._made = executor.submit(_make_engine, imported, self._settings, self.metrics)
        executor.shutdown(wait=False)
        self._making = asyncio.create_task(self._take(self._made))

    async def _take(self, made: Future[Engine]) -> None:
        try:
            engine = await asyncio.wrap_future(made)
        except CannotStart as error:
            log.error("cannot start: %s", error)
            self.failure = error
        except Exception as error:
            log.exception("cannot start")
            self.failure = error
        else:
            engine.draining = self.draining
            engine.start()
            self.now = engine

    @property
    def refuses(self) -> bool:
        """Whether the service is on its way out and takes nothing new."""
        return self.draining if self.now is None else self.now.draining

    async def finished(self) -> None:
        """Wait until there is an engine, or will be none."""
        if self._making is not None:
            await asyncio.wait({self._making})

    async def engine(self) -> Engine:
        """The engine; a request that comes before it waits as long as a request may take.

        Raises:
            Starting: it is still being made.
            Draining: it will not be made any more.
            Unavailable: it cannot be made.
        """
        if self.now is None and self._making is not None:
            await asyncio.wait({self._making}, timeout=self._settings.request_timeout)
        if self.now is not None:
            return self.now
        if self.failure is not None:
            raise Unavailable("the service could not start; the reason is in its log")
        if self.draining:
            raise Draining("the service is shutting down")
        raise Starting("the service is still starting; ask again", retry_after_s=1)

    def fault(self) -> str | None:
        """Why the process should be restarted; None while it starts or works."""
        if self.failure is not None:
            return "the service could not start"
        return None if self.now is None else self.now.fault()

    def not_ready(self) -> str | None:
        """Why the service should not be sent requests; None when it should."""
        if self.now is not None:
            return self.now.not_ready()
        return self.fault() or ("draining" if self.draining else "starting")

    def drain(self) -> None:
        """Refuse new requests from now on; may be called by a signal handler."""
        self.draining = True
        if self.now is not None:
            self.now.draining = True

    def give_up(self) -> None:
        """Answer those who wait for an engine that is still being imported; without that, nothing."""
        self.draining = True
        if self._made is not None:
            self._made.cancel()

    async def stop(self) -> None:
        """Stop the engine, if it is the app's own; it is not waited for while its libraries are imported."""
        self.give_up()
        await self.finished()
        if self.now is not None and self._given is None:
            await self.now.stop()


def _import_engine() -> type[Engine]:
    """Import everything that is slow to import."""
    from service.runtime.torch_libraries import load_torch_libraries

    load_torch_libraries()
    from service.runtime.engine import Engine

    return Engine


def _make_engine(imported: Future[type[Engine]], settings: Settings, metrics: Metrics) -> Engine:
    return imported.result()(settings, metrics)
