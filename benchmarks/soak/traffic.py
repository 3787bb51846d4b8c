"""Senders of one soak: honest clients that pace themselves, a greedy one, hostile ones."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.soak.exchange import CUT_OFF, Answer, Connection, Tally, connected, timed
from benchmarks.soak.hostile import ABANDONED, HOSTILE, with_key

MAX_OUTSTANDING = 400
ABANDON_AFTER_S = 0.2


@dataclass
class Traffic:
    """What is sent to the service at `port`, and what came of it by kind of sender, until `ends`."""

    port: int
    ends: float
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    @property
    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self.ends

    async def paced(self, name: str, message: Callable[[], bytes], every_s: float) -> None:
        """One client that asks, waits for its answer, and asks again so many seconds after it asked last."""
        async with connected(self.port) as connection:
            while self.goes_on:
                started = time.monotonic()
                with timed(self.tallies[name]) as answers:
                    answers.append(await connection.ask(message()))
                await asyncio.sleep(max(0.0, started + every_s - time.monotonic()))

    async def busy(self, name: str, message: Callable[[], bytes]) -> None:
        """One client that asks again as soon as it has its answer."""
        await self.paced(name, message, 0.0)

    async def greedy(self, name: str, message: Callable[[], bytes], per_second: float) -> None:
        """Requests that come at a rate, whatever is answered; up to `MAX_OUTSTANDING` wait at a time."""
        idle: list[Connection] = []
        running: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            if not self.goes_on:
                break
            if len(running) < MAX_OUTSTANDING:
                task = asyncio.create_task(self._one(name, message(), idle))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(random.expovariate(per_second) if number else 0)
        await asyncio.gather(*running)
        for connection in idle:
            connection.close()

    async def _one(self, name: str, message: bytes, idle: list[Connection]) -> None:
        connection = idle.pop() if idle else Connection(self.port)
        with timed(self.tallies[name]) as answers:
            answers.append(await connection.ask(message))
        idle.append(connection)

    async def hostile(self, key: str, every_s: float) -> None:
        """One hostile client after the other, each with a connection of its own."""
        while self.goes_on:
            name, make = random.choice([*HOSTILE.items(), *ABANDONED.items()])
            message = make() if name == "wrong key" else with_key(make(), key)
            await (
                self._abandon(message) if name in ABANDONED else self._ask_once(f"hostile: {name}", message)
            )
            await asyncio.sleep(every_s)

    async def _ask_once(self, name: str, message: bytes) -> None:
        async with connected(self.port) as connection:
            with timed(self.tallies[name]) as answers:
                answers.append(await connection.ask(message))

    async def _abandon(self, message: bytes) -> None:
        async with connected(self.port) as connection:
            asking = asyncio.create_task(connection.ask(message))
            await asyncio.wait({asking}, timeout=ABANDON_AFTER_S * random.random())
            asking.cancel()

    async def dribble(self, message: bytes) -> None:
        """A client that sends its request byte by byte."""
        while self.goes_on:
            with timed(self.tallies["hostile: a byte at a time"]) as answers:
                answers.append(await self._dribbled(message))

    async def _dribbled(self, message: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head, _, body = message.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            for index in range(len(body)):
                writer.write(body[index : index + 1])
                answered = asyncio.ensure_future(reader.readline())
                done, _ = await asyncio.wait({answered}, timeout=1.0)
                if done or not self.goes_on:
                    line = answered.result() if done else b""
                    answered.cancel()
                    return Answer(int(line.split()[1])) if line else CUT_OFF
                answered.cancel()
        except OSError:
            pass
        finally:
            writer.transport.abort()
        return CUT_OFF
