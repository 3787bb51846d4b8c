"""Who may ask: keys of clients and of operators, and a quota for each."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.requests import Request

from service.errors import Forbidden, QuotaExceeded, Unauthenticated
from service.settings import Settings

MAX_CLIENTS = 10_000


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass
class _Bucket:
    tokens: float
    updated: float


class Quota:
    """A token bucket a client: `per_minute` requests, refilled evenly; 0 is no quota."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, client: str) -> None:
        """Count one request.

        Raises:
            QuotaExceeded: nothing is left; says when there will be.
        """
        if not self._per_minute:
            return
        now, rate = time.monotonic(), self._per_minute / 60
        bucket = self._buckets.pop(client, None) or _Bucket(float(self._per_minute), now)
        tokens = min(self._per_minute, bucket.tokens + (now - bucket.updated) * rate)
        self._buckets[client] = _Bucket(tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            detail = f"more than {self._per_minute} requests a minute"
            raise QuotaExceeded(detail, retry_after_s=(1 - tokens) / rate)


class Access:
    """The one place that decides whether a request may go on."""

    def __init__(self, settings: Settings) -> None:
        self._api = [_digest(key) for key in settings.api_keys]
        self._admin = [_digest(key) for key in settings.admin_keys]
        self._quota = Quota(settings.requests_per_minute)

    async def client(self, request: Request) -> None:
        """Let clients and operators in.

        Raises:
            Unauthenticated: keys are set and none was sent.
            Forbidden: the key is not one of them.
            QuotaExceeded: this client asks too often.
        """
        key = _key_of(request)
        if self._api:
            self._check(key, [*self._api, *self._admin])
        self._quota.take(_client_of(request, key))

    async def operator(self, request: Request) -> None:
        """Let operators in: holders of an admin key, or, where no admin key is set, any client.

        Raises:
            Unauthenticated, Forbidden, QuotaExceeded: as for `client`.
        """
        key = _key_of(request)
        if self._admin:
            self._check(key, self._admin)
            self._quota.take(_client_of(request, key))
        else:
            await self.client(request)

    @staticmethod
    def _check(key: str | None, allowed: Iterable[bytes]) -> None:
        if key is None:
            raise Unauthenticated("send a key: Authorization: Bearer KEY")
        given = _digest(key)
        # Every comparison is made, so that the time taken does not tell which key was close.
        if not any([hmac.compare_digest(given, known) for known in allowed]):  # noqa: C419 - no short cut
            raise Forbidden("this key may not do that")


def _key_of(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return request.headers.get("x-api-key")


def _client_of(request: Request, key: str | None) -> str:
    if key is not None:
        return _digest(key).hex()
    return request.client.host if request.client else "unknown"
