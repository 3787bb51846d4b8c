"""What each client may take in a minute, and what it has left; `RateLimit` headers that say so.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10 (structured fields, RFC 9651).
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Mapping

from service.api.keys import Holder
from service.errors import QuotaExceeded, TooLarge

WINDOW_S = 60
MAX_STRANGERS = 10_000
SWEEP_S = 1.0
# What sums of times of day may be off by: a unit that is there to this much is there.
ROUNDING_S = 1e-6
# An IPv6 network of this many bits is what one customer gets at least: its addresses are one client.
IPV6_CLIENT_BITS = 64
# How a policy is called in the headers, and its unit where that is not a request.
_POLICIES = {
    "requests": ("requests", ""),
    "megapixels": ("megapixels", ';qu="megapixels"'),
    "new_models": ("new-models", ';qu="new-models"'),
}

Quotas = Mapping[str, int]
Clock = Callable[[], float]


class Bucket:
    """A quota that is refilled evenly: `per_minute` units at most, all of them there at first.

    Its whole state is the time at which it is full again, so that a full one is worth nothing and can be forgotten.
    """

    __slots__ = ("full_at_s", "per_minute")

    def __init__(self, per_minute: int, full_at_s: float = 0.0) -> None:
        self.per_minute = per_minute
        self.full_at_s = full_at_s

    def left(self, now_s: float) -> float:
        """Units that may be taken now."""
        return max(0.0, self.per_minute * (1 - max(0.0, self.full_at_s - now_s) / WINDOW_S))

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much may be taken; 0 where it may be now."""
        wait_s = self._full_after(amount, now_s) - now_s - WINDOW_S
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Count what was taken."""
        self.full_at_s = self._full_after(amount, now_s)

    def _full_after(self, amount: float, now_s: float) -> float:
        return max(self.full_at_s, now_s) + amount * WINDOW_S / self.per_minute


class Account:
    """What one client has left of its quotas; units of what there is no quota of are free."""

    __slots__ = ("_buckets", "_clock", "policy")

    def __init__(self, quotas: Quotas, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self.policy = b""
        self.change(quotas)

    def change(self, quotas: Quotas) -> None:
        """Take on other quotas; what was taken already stays taken."""
        spent = {name: bucket.full_at_s for name, bucket in self._buckets.items()}
        self._buckets = {
            name: Bucket(number, spent.get(name, 0.0)) for name, number in quotas.items() if number
        }
        self.policy = ", ".join(
            '"{0}";q={2};w={3}{1}'.format(*_POLICIES[name], bucket.per_minute, WINDOW_S)
            for name, bucket in self._buckets.items()
        ).encode()

    def has(self, quota: str) -> bool:
        """Whether units of this are counted."""
        return quota in self._buckets

    def take(self, quota: str, amount: float = 1) -> None:
        """Count units of a quota.

        Raises:
            QuotaExceeded: so much is not left; says when it will be.
            TooLarge: it is more than the quota of a whole minute, and never will be.
        """
        bucket = self._buckets.get(quota)
        if bucket is None or not amount:
            return
        now_s = self._clock()
        name = quota.replace("_", " ")
        if amount > bucket.per_minute:
            raise TooLarge(
                f"the request takes {amount:.6g} {name}; the quota of this client is {bucket.per_minute} a minute"
            )
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s > 0:
            asked = (
                "" if amount == 1 else f"; this request takes {amount:.6g}, {bucket.left(now_s):.6g} are left"
            )
            raise QuotaExceeded(f"more than {bucket.per_minute} {name} a minute{asked}", retry_after_s=wait_s)
        bucket.take(amount, now_s)

    def left(self) -> bytes:
        """The `RateLimit` header: units left, and seconds until there is another one where one is missing."""
        now_s = self._clock()
        return ", ".join(_left(name, bucket, now_s) for name, bucket in self._buckets.items()).encode()

    def is_full(self, now_s: float) -> bool:
        """Whether nothing would be lost by forgetting it."""
        return all(bucket.full_at_s <= now_s for bucket in self._buckets.values())


def _left(name: str, bucket: Bucket, now_s: float) -> str:
    policy = _POLICIES[name][0]
    left = math.floor(bucket.left(now_s) + ROUNDING_S)
    if left >= bucket.per_minute:
        return f'"{policy}";r={left}'
    return f'"{policy}";r={left};t={max(1, math.ceil(bucket.wait_s(left + 1, now_s) - ROUNDING_S))}'


class Accounts:
    """The accounts of all clients: of keys by name, of anybody else by address.

    Of strangers at most `max_strangers` are known. An account goes when it is full again, which changes nothing, and
    never before: whoever has many addresses cannot push out what one of them has spent. Those who come when no place
    is free share one account.
    """

    def __init__(
        self, quotas: Quotas, *, max_strangers: int = MAX_STRANGERS, clock: Clock = time.monotonic
    ) -> None:
        self._quotas = dict(quotas)
        self._clock = clock
        self._max_strangers = max_strangers
        self._named: dict[str, Account] = {}
        self._strangers: dict[str, Account] = {}
        self._late_strangers = Account(quotas, clock)
        self._next_sweep_s = 0.0

    def know(self, holders: Iterable[Holder]) -> None:
        """Make accounts for the holders of keys; those that were known keep what they have spent."""
        known, self._named = self._named, {}
        for name, holder in {holder.name: holder for holder in holders}.items():
            account = self._named[name] = known.get(name) or Account({}, self._clock)
            # Who may load and unload models is trusted with the rest, unless the operator says otherwise.
            account.change({**({} if holder.is_operator else self._quotas), **holder.quotas})

    def of_holder(self, holder: Holder) -> Account:
        """The account of a key's holder."""
        return self._named[holder.name]

    def of_address(self, address: str) -> Account:
        """The account of a client without a key; all share one where there are no quotas to count."""
        if not self._late_strangers.policy:
            return self._late_strangers
        client = client_of(address)
        account = self._strangers.get(client)
        if account is None:
            if len(self._strangers) >= self._max_strangers and not self._found_place():
                return self._late_strangers
            account = self._strangers[client] = Account(self._quotas, self._clock)
        return account

    def _found_place(self) -> bool:
        """Forget who has everything left; not for every request, for that takes a while."""
        now_s = self._clock()
        if now_s < self._next_sweep_s:
            return False
        self._next_sweep_s = now_s + SWEEP_S
        self._strangers = {name: known for name, known in self._strangers.items() if not known.is_full(now_s)}
        return len(self._strangers) < self._max_strangers


def client_of(address: str) -> str:
    """Who an address stands for: itself, or its network where it is IPv6 and a client has many."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, IPV6_CLIENT_BITS), strict=False))
