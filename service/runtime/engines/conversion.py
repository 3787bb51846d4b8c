"""The converter process, started when there is a network to convert and ended when there is none left."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from service.runtime.engines.artefacts import Facts
from service.runtime.engines.orders import Order

COMMAND = (sys.executable, "-m", "service.runtime.engines.converter")
CONVERSION_TIMEOUT_S = 900.0
MAX_ANSWER_BYTES = 64 * 2**20
# torch keeps something of every network that it traced, 20 MB of a ResNet.
NETWORKS_PER_PROCESS = 32
# It has the lowest priority, and must not wait for cores that the service's threads hold.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ConversionFailed(Exception):
    """There was no answer: the converter was killed, out of memory, or too slow. It may succeed another time."""


class ConverterEnded(ConversionFailed):
    """The converter ended while it worked on a network: a network that OpenVINO cannot run may do that."""


class NoLongerWanted(Exception):
    """Nobody needs the network any more whose turn has come."""


class Converter:
    """Converts one network at a time, in the order of asking. Belongs to one event loop."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._asking = 0
        self._converted = 0

    async def convert(self, order: Order, is_wanted: Callable[[], bool] = lambda: True) -> Facts:
        """What the converter found out about a network.

        Args:
            is_wanted: asked when its turn has come.

        Raises:
            ConversionFailed: it gave no answer.
            NoLongerWanted: it was not wanted any more.
        """
        self._asking += 1
        try:
            async with self._turn:
                if not is_wanted():
                    raise NoLongerWanted
                if self._converted >= NETWORKS_PER_PROCESS:
                    await self._end()
                try:
                    return await self._ask(order)
                except ConverterEnded:
                    return await self._ask(replace(order, one_size=True))
        finally:
            self._asking -= 1
            if not self._asking:
                await self._end()

    async def _ask(self, order: Order) -> Facts:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order.to_line())
        try:
            async with asyncio.timeout(CONVERSION_TIMEOUT_S):
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError as error:
            self.kill()
            raise ConversionFailed(f"took longer than {CONVERSION_TIMEOUT_S:g} s") from error
        except ConnectionError as error:
            self.kill()
            raise ConverterEnded("the converter ended early") from error
        if not line.endswith(b"\n"):
            self.kill()
            raise ConverterEnded("the converter ended early")
        self._converted += 1
        facts = Facts.from_json(line)
        if facts.outcome == "failed":
            raise ConversionFailed(facts.reason)
        return facts

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_ANSWER_BYTES,
                env={**os.environ, **ENVIRONMENT},
            )
            self._converted = 0
        return self._process

    async def _end(self) -> None:
        """Close its input, which ends it; its memory is worth more than a quick next start."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            await process.wait()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
