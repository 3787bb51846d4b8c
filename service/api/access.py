"""Who may ask: the one place that decides for every route whether a request may go on.

The layer stands before everything that reads or parses what a client sends. A path or a method that `DECISIONS` does
not have goes no further, so that a route without a decision is not served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial

from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_response, routing_problem
from service.api.keys import BadKeys, Holder, Keyring, keys_of_setting, read_keys_file
from service.api.quotas import Account, Accounts
from service.errors import Forbidden, QuotaExceeded, ServiceError, Unauthenticated
from service.metrics import Metrics
from service.settings import Settings, is_loopback

log = logging.getLogger("service.keys")


class Who(Enum):
    """Who a route is for."""

    ANYONE = "anyone"
    SCRAPERS = "anyone, or with BACKBONE_METRICS_NEED_KEY clients"
    CLIENTS = "clients"
    OPERATORS = "operators"


READ = {"GET": Who.ANYONE, "HEAD": Who.ANYONE}
# Each route of the app, as it is written there, with who may use each of its methods.
DECISIONS: Mapping[str, Mapping[str, Who]] = {
    "/features": {"POST": Who.CLIENTS},
    "/backbones": {"GET": Who.CLIENTS},
    "/backbones/inspect": {"POST": Who.CLIENTS},
    "/backbones/{type}": {"GET": Who.CLIENTS},
    "/configs": {"GET": Who.CLIENTS},
    "/configs/{name:path}": {"GET": Who.CLIENTS},
    "/models": {"GET": Who.CLIENTS, "POST": Who.OPERATORS},
    "/models/{id}": {"DELETE": Who.OPERATORS},
    "/version": {"GET": Who.CLIENTS},
    # Probes come from machines that hold no key, and say nothing of anybody.
    "/healthz": {"GET": Who.ANYONE},
    "/readyz": {"GET": Who.ANYONE},
    "/metrics": {"GET": Who.SCRAPERS},
    # A browser opens the page before it can send a key; it is the same at everybody's.
    "/docs": {"GET": Who.ANYONE},
    "/docs/assets/{path:path}": READ,
    "/openapi.json": READ,
}


@dataclass(frozen=True)
class Rule:
    """A route and who may use it; `path` is that of the route, for logs and metrics."""

    path: str
    who: Mapping[str, Who]
    pattern: re.Pattern[str]


_RULES = tuple(Rule(path, who, compile_path(path)[0]) for path, who in DECISIONS.items())
_EXACT = {rule.path: rule for rule in _RULES if "{" not in rule.path}
_PATTERNS = tuple(rule for rule in _RULES if "{" in rule.path)


def rule_for(path: str, method: str) -> Rule | None:
    """The rule of the route that serves a path and a method; None if none does."""
    exact = _EXACT.get(path)
    if exact is not None and method in exact.who:
        return exact
    return next((rule for rule in _PATTERNS if method in rule.who and rule.pattern.fullmatch(path)), None)


def note_route(scope: Scope) -> Rule | None:
    """The rule of the route that serves a request; what is refused before the app is counted and logged by it too."""
    rule = rule_for(route_path(scope), scope["method"])
    if rule is not None:
        scope["route"] = rule
    return rule


def methods_of(path: str) -> list[str]:
    """The methods that a path is served with."""
    return sorted({method for rule in _RULES if rule.pattern.fullmatch(path) for method in rule.who})


class Visitor:
    """Who sent a request, and what it takes of their quotas.

    Args:
        name: that of their key, None for who has none.
        account: finds their account. A stranger's may have been forgotten and opened again since the request began.
    """

    __slots__ = ("_account", "_has_new_model", "_metrics", "name")

    def __init__(self, name: str | None, account: Callable[[], Account], metrics: Metrics) -> None:
        self.name = name
        self._account = account
        self._metrics = metrics
        self._has_new_model = False

    def take_request(self) -> None:
        """Count the request.

        Raises:
            QuotaExceeded: this client asks too often.
        """
        self._take("requests", 1)

    def take_pixels(self, pixels: int) -> None:
        """Count what a request has to be computed.

        Raises:
            QuotaExceeded: the client sent too much in the last minute.
            TooLarge: that is more than a minute's quota.
        """
        self._take("megapixels", pixels / 1e6)

    def take_new_model(self) -> None:
        """Count that a request needs a model that is not there, once for all that it needs.

        Raises:
            QuotaExceeded: this client asked for too many.
        """
        if not self._has_new_model:
            self._take("new_models", 1)
            self._has_new_model = True

    @property
    def counts_pixels(self) -> bool:
        """Whether there is a quota of megapixels."""
        return self._account().has("megapixels")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What a reply says of the quotas; nothing where there are none."""
        account = self._account()
        if not account.policy:
            return []
        return [(b"ratelimit-policy", account.policy), (b"ratelimit", account.left())]

    def _take(self, quota: str, amount: float) -> None:
        try:
            self._account().take(quota, amount)
        except QuotaExceeded:
            self._metrics.access_refused.labels(quota).inc()
            raise


class Access:
    """The keys and quotas of an app.

    Raises:
        CannotStart: a key of the settings or of the keys file cannot be used.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._readings: set[asyncio.Task[None]] = set()
        self._one_reading = asyncio.Lock()
        self._accounts = Accounts(settings.quotas)
        self._clients_need_key = not settings.may_be_anonymous
        self._use(holders := self._read_keys())
        # Without any key only who is at this machine can be asking: a developer.
        self._is_for_one = not holders and is_loopback(settings.host) and not settings.allow_anonymous

    # --- keys -----------------------------------------------------------------------------------

    def _read_keys(self) -> dict[bytes, Holder]:
        holders: dict[bytes, Holder] = {}
        for field, is_operator in (("api_keys", False), ("admin_keys", True)):
            try:
                holders.update(keys_of_setting(getattr(self._settings, field), is_operator=is_operator))
            except BadKeys as error:
                raise BadKeys(f"BACKBONE_{field.upper()}: {error}") from error
        if self._settings.keys_file is not None:
            try:
                of_file = read_keys_file(self._settings.keys_file)
                if holders.keys() & of_file.keys():
                    raise BadKeys("a key of it is one of the settings' too")
            except BadKeys as error:
                raise BadKeys(f"BACKBONE_KEYS_FILE: {error}") from error
            holders.update(of_file)
        return holders

    def _use(self, holders: dict[bytes, Holder]) -> None:
        """Go by these keys from now on. Once clients need a key they always do, whatever becomes of a file."""
        are_clients = bool(self._settings.api_keys) or not all(
            holder.is_operator for holder in holders.values()
        )
        if self._clients_need_key and not are_clients:
            raise BadKeys("BACKBONE_KEYS_FILE: has no key for clients")
        self._clients_need_key = are_clients
        self._has_operators = any(holder.is_operator for holder in holders.values())
        self._accounts.know(holders.values())
        self._keyring = Keyring(holders)

    @contextlib.contextmanager
    def reading_keys_on_hangup(self) -> Iterator[None]:
        """Meanwhile SIGHUP reads the keys file again, if there is one. In a running loop of the main thread."""
        if self._settings.keys_file is None:
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._begin_reading)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _begin_reading(self) -> None:
        if len(self._readings) > 1:
            return  # one of them has not begun, and will find the file as it is now
        task = asyncio.ensure_future(self.read_keys_again())
        self._readings.add(task)
        task.add_done_callback(self._readings.discard)

    async def read_keys_again(self) -> None:
        """Take the keys of the file as they are now; keys that cannot be used change nothing, and are logged."""
        async with self._one_reading:
            try:
                holders = await asyncio.to_thread(self._read_keys)
                self._use(holders)
            except BadKeys as error:
                log.error("the keys stay as they were: %s", error)
                return
            log.info("the keys were read again: there are %d", len(holders))

    # --- decisions ------------------------------------------------------------------------------

    def is_for_anyone(self, who: Who) -> bool:
        """Whether it does not even matter who asks."""
        return who is Who.ANYONE or (who is Who.SCRAPERS and not self._settings.metrics_need_key)

    def asks_for_key(self, who: Who) -> bool:
        """Whether nobody gets anywhere without a key."""
        if who is Who.OPERATORS:
            return self._clients_need_key or self._has_operators
        return self._clients_need_key or who is Who.SCRAPERS

    def admit(self, scope: Scope, who: Who) -> Visitor | None:
        """Who sent a request, if they may; None where it does not matter.

        Raises:
            Unauthenticated: no key was sent where one is needed, or several.
            Forbidden: the key is not one of ours, or not an operator's.
        """
        if self.is_for_anyone(who):
            return None
        holder = self._holder(scope, needs_key=self.asks_for_key(who))
        if who is Who.OPERATORS and not self._is_for_one:
            self._check_operator(holder)
        if holder is None:
            address = scope["client"][0] if scope.get("client") else ""
            return Visitor(None, partial(self._accounts.of_address, address), self._metrics)
        account = self._accounts.of_holder(holder)
        return Visitor(holder.name, lambda: account, self._metrics)

    def _holder(self, scope: Scope, *, needs_key: bool) -> Holder | None:
        """Whose key was sent. Where none is needed, one that is nobody's is as good as none."""
        sent = _sent_keys(scope)
        if not needs_key:
            return self._keyring.holder(sent[0]) if len(sent) == 1 else None
        if not sent:
            raise self._refused("no_key", Unauthenticated("send a key: Authorization: Bearer KEY"))
        if len(sent) > 1:
            raise self._refused("several_keys", Unauthenticated("several keys were sent; send one"))
        holder = self._keyring.holder(sent[0])
        if holder is None:
            raise self._refused("unknown_key", Forbidden("this is not a key of this service"))
        return holder

    def _check_operator(self, holder: Holder | None) -> None:
        if holder is not None and holder.is_operator:
            return
        detail = "this is for operators: send one of their keys"
        if not self._has_operators:
            detail = "this is for operators, and there are none: BACKBONE_ADMIN_KEYS has no key"
        raise self._refused("no_operator", Forbidden(detail))

    def _refused(self, reason: str, error: ServiceError) -> ServiceError:
        self._metrics.access_refused.labels(reason).inc()
        return error


def _sent_keys(scope: Scope) -> list[bytes]:
    """The different keys of a request's headers."""
    keys = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(key.strip())
        elif name == b"x-api-key":
            keys.append(value.strip())
    return [key for key in dict.fromkeys(keys) if key]


class AccessMiddleware:
    """Pure ASGI. Only requests that may go on reach the app, with `visitor` and `client_name` in their scope."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # a websocket, of which there are none
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        rule = note_route(scope)
        try:
            # What there is and what not is told to clients only.
            visitor = self._access.admit(scope, Who.CLIENTS if rule is None else rule.who[scope["method"]])
            if visitor is not None:
                scope["visitor"], scope["client_name"] = visitor, visitor.name
                send = _Announced(visitor, send)
                visitor.take_request()
        except ServiceError as error:
            await problem_response(error, scope["request_id"])(scope, receive, send)
            return
        if rule is None:
            await _no_route(scope, methods_of(route_path(scope)))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Announced:
    """`send` of one reply, which says what is left of its client's quotas when it begins."""

    def __init__(self, visitor: Visitor, send: Send) -> None:
        self._visitor = visitor
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *self._visitor.headers()]
        await self._send(message)


def route_path(scope: Scope) -> str:
    """The path below the prefix that a gateway serves the app at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _no_route(scope: Scope, methods: list[str]) -> Response:
    """404, or 405 where another method is served."""
    problem = (405, {"Allow": ", ".join(methods)}) if methods else (404, None)
    return routing_problem(problem[0], scope["method"], scope["path"], scope["request_id"], problem[1])
