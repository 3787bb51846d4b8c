"""The engine of an app while it is being made: the door opens first, and who comes early waits.

Importing torch and what stands on it takes seconds. It happens on a thread of its own, while probes are answered.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from service.api.draining import Drain, draining
from service.collector import importing, set_imports_aside
from service.errors import CannotStart, Starting, Unavailable
from service.metrics import Metrics
from service.runtime.threads import Deadline
from service.settings import Settings

if TYPE_CHECKING:
    from service.runtime.engine import Engine

log = logging.getLogger("service.start")


class Startup:
    """Makes one engine; `engine` waits for it. Call `begin`, `finished` and `stop` inside a running event loop.

    Args:
        given: an engine made elsewhere, which is started but not stopped here.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, drain: Drain, given: Engine | None = None
    ) -> None:
        self.metrics = metrics
        self.now: Engine | None = None
        self.failure: BaseException | None = None
        self._settings = settings
        self._drain = drain
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
            engine.start()
            self.now = engine

    async def finished(self) -> None:
        """Wait until there is an engine, or will be none."""
        if self._making is not None:
            await asyncio.wait({self._making})

    async def engine(self, deadline: Deadline) -> Engine:
        """The engine; a request that comes before it waits until its deadline.

        Raises:
            Starting: it is still being made.
            Draining: it will not be made any more.
            Unavailable: it cannot be made.
        """
        if self.now is None and self._making is not None:
            await asyncio.wait({self._making}, timeout=deadline.left_s)
        if self.now is not None:
            return self.now
        if self.failure is not None:
            raise Unavailable("the service could not start; the reason is in its log")
        if self._drain.refusing:
            raise draining()
        raise Starting("the service is still starting; ask again", retry_after_s=1)

    def fault(self) -> str | None:
        """Why the process should be restarted; None while it starts or works."""
        if self.failure is not None:
            return "the service could not start"
        return None if self.now is None else self.now.fault()

    def not_ready(self) -> str | None:
        """Why the service should not be sent requests; None when it should."""
        if self._drain.leaving:
            return "draining"
        return self.fault() or ("starting" if self.now is None else self.now.not_ready())

    def give_up(self) -> None:
        """Answer those who wait for an engine that is still being imported; without that, nothing."""
        self._drain.refuse()
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
    with importing():
        from service.runtime.torch_libraries import load_torch_libraries

        load_torch_libraries()
        from service.runtime.engine import Engine
    return Engine


def _make_engine(imported: Future[type[Engine]], settings: Settings, metrics: Metrics) -> Engine:
    engine = imported.result()(settings, metrics)
    from service.runtime.numbers import EngineNumbers  # with torch, which the engine has imported by now

    metrics.add(EngineNumbers(engine))
    set_imports_aside()
    return engine
