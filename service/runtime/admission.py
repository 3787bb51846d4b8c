"""One request at the gate: what it would give and take, and when it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from service.errors import ServiceError
from service.runtime.intake import Heads
from service.runtime.live_bytes import PassCost
from service.runtime.memory import Need, WorkMemory
from service.runtime.plan import SIZE_POINTER, LevelShape, Plan, Planner, pooled_shapes
from service.runtime.postprocess import refuse_pool
from service.runtime.query import FeatureQuery, Prepared
from service.runtime.shares import Share
from service.runtime.speed import Speed
from service.runtime.threads import on_thread

Shapes = Sequence[tuple[int, ...]]
# Given the shapes and names of the levels before anything is computed: the bytes of the reply that they make. Raises
# if they make none that may be sent.
WeighReply = Callable[[Shapes, Sequence[str]], int]


class Admission:
    """Knows what a request's levels will be, and takes the memory for them.

    Attributes:
        share: what the request has of the memory.
        levels: what they are at the size that the images' headers give.
        need: what the request takes.

    Args:
        threads: where the planner counts.
        weigh_reply: is asked before anything is decoded.
    """

    def __init__(
        self,
        prepared: Prepared,
        share: Share,
        memory: WorkMemory,
        speed: Speed,
        planner: Planner,
        threads: Executor,
        weigh_reply: WeighReply,
    ) -> None:
        self.share = share
        self.levels: tuple[LevelShape, ...] = ()
        self.need = Need(0, 0, 1)
        self._prepared = prepared
        self._memory = memory
        self._speed = speed
        self._planner = planner
        self._threads = threads
        self._weigh_reply = weigh_reply
        self._waits = False

    @property
    def _plan(self) -> Plan:
        return self._prepared.plan

    def now(self, heads: Heads) -> bool:
        """Take what is needed if all is known of it, it is there, and it is not much. May run on a thread.

        Raises:
            TooLarge, NotAcceptable, InvalidConfig: what the request asks for is no reply that may be sent.
        """
        levels = self._planner.known_levels(self._plan, heads.size)
        cost = self._planner.known_cost(self._plan, heads.size)
        if levels is None or cost is None:
            return False
        self._note(heads, levels, cost)
        if self._memory.is_large(self.need, cost.bytes):
            return False
        return self.share.take_now(self.need.bytes)

    async def in_turn(self, heads: Heads) -> None:
        """Take what is needed, when there is enough.

        Raises:
            OutOfMemory: there is not, or too many wait for it.
            TooLarge, NotAcceptable, InvalidConfig: as `now`.
        """
        levels = await self._levels_at(heads.size)
        cost = self._planner.known_cost(self._plan, heads.size)
        if cost is None:
            pointer = size_pointer(self._prepared.query)
            cost = await on_thread(self._threads, self._planner.cost, self._plan, heads.size, pointer)
        self._note(heads, levels, cost)
        self._waits = True
        await self.share.take(self.need.bytes, burden=self._prepared.query.bytes)
        self._waits = False
        if self._memory.is_large(self.need, cost.bytes):
            self._memory.refuse_what_is_not_there(self.need, cost.bytes)

    async def levels_for(self, images: int, size: tuple[int, int]) -> tuple[LevelShape, ...]:
        """The levels at the [height, width] that the images turned out to have; checked again if it is another."""
        levels = await self._levels_at(size)
        if levels != self.levels:
            self._weigh(images, levels)
        return levels

    def late(self) -> ServiceError | None:
        """What the request is told when its deadline passes while it waits for memory; None when it does not."""
        return self._memory.late() if self._waits else None

    def _note(self, heads: Heads, levels: tuple[LevelShape, ...], cost: PassCost) -> None:
        self._speed.refuse_slow(heads.images * cost.operations, self._prepared.query.precision)
        reply_bytes = self._weigh(heads.images, levels)
        self.levels = levels
        self.need = self._memory.need(heads, levels, cost.bytes, reply_bytes)
        self._memory.refuse_oversized(self.need, cost.bytes)

    def _weigh(self, images: int, levels: Sequence[LevelShape]) -> int:
        query, plan = self._prepared.query, self._plan
        refuse_pool(query.pool, [level.fact for level in levels], plan.description.prefix_tokens)
        shapes = pooled_shapes(levels, images, query.pool)
        return self._weigh_reply(shapes, [level.fact.name for level in levels])

    async def _levels_at(self, size: tuple[int, int]) -> tuple[LevelShape, ...]:
        """What the levels will be. What cannot run is refused here, before a model is loaded for it."""
        plan, query = self._plan, self._prepared.query
        known = self._planner.known_levels(plan, size)
        if known is not None:
            return known
        made_for = plan.input_size
        # A small image may be too small for some of the levels only, and would fail its neighbours in the batch.
        is_small = size[0] < made_for[0] or size[1] < made_for[1]
        if is_small or query.tensor is not None or self._prepared.spec.mode != "native":
            return await on_thread(self._threads, self._planner.levels_at, plan, size, size_pointer(query))
        return await on_thread(self._threads, self._planner.levels_near, plan, size)


def size_pointer(query: FeatureQuery) -> str:
    """Where a request says how large its images are."""
    return SIZE_POINTER if query.tensor is None else "#/tensor"
