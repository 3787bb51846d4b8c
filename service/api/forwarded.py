"""What a gateway says of a request that it passes on: who asks, by which scheme, below which path.

It is believed from the proxies that the operator names. Whatever anybody else sends in those headers is not read.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.settings import PATH_PREFIX

FOR, PROTO, PREFIX = b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-prefix"
MAX_CHAIN_BYTES = 2048
SCHEMES = (b"http", b"https")
WELL_FORMED_PREFIX = re.compile(PATH_PREFIX.encode() + b"/?")


class ForwardedMiddleware:
    """Pure ASGI, outermost: sets `client`, `scheme` and `prefix` of the scope.

    Args:
        proxies: addresses and networks whose headers are believed.
        root_path: the prefix where a believed proxy names none; `/` is none.
    """

    def __init__(self, app: ASGIApp, *, proxies: Sequence[str], root_path: str) -> None:
        self._app = app
        # Which address of a chain counts is read by uvicorn's code; unlike its middleware we also take a prefix,
        # and no client that is not an address.
        self._proxies = ProxyHeadersMiddleware(app, list(proxies)).trusted_hosts  # type: ignore[arg-type]  # not called
        self._root_path = root_path.rstrip("/")
        # Clients come again, and reading an address takes longer than all else here.
        self._client = lru_cache(maxsize=1024)(self._read_client)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["prefix"] = self._root_path
            peer = scope.get("client")
            if peer is not None and peer[0] in self._proxies:
                self._believe(scope)
        await self._app(scope, receive, send)

    def _believe(self, scope: Scope) -> None:
        """Take over what is well-formed; the rest stays as it is without a proxy."""
        said = [(name, value) for name, value in scope["headers"] if name in (FOR, PROTO, PREFIX)]
        chain = b",".join(value for name, value in said if name == FOR)
        if len(chain) <= MAX_CHAIN_BYTES and (client := self._client(chain)):
            scope["client"] = client
        for name, value in said:
            if name == PROTO and value in SCHEMES:
                scope["scheme"] = value.decode()
            elif name == PREFIX and WELL_FORMED_PREFIX.fullmatch(value):
                scope["prefix"] = value.decode().rstrip("/")

    def _read_client(self, chain: bytes) -> tuple[str, int] | None:
        """The address nearest to us that is none of the proxies; None where no address stands there."""
        host, port = self._proxies.get_trusted_client_address(chain.decode("latin-1"))
        try:
            return str(ipaddress.ip_address(host)), port
        except ValueError:
            return None


class PrefixMiddleware:
    """Pure ASGI, innermost: from here on paths begin with the prefix, which is ASGI's `root_path`.

    The layers further out compare paths as the routes have them, whatever a gateway puts in front.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if prefix := scope.get("prefix"):
            scope["root_path"] = prefix + scope.get("root_path", "")
            scope["path"] = prefix + scope["path"]
            scope["raw_path"] = prefix.encode() + scope["raw_path"]
        await self._app(scope, receive, send)


def address(request: Request, path: str) -> str:
    """Where a client finds a path of ours: below the prefix of the gateway it came through."""
    return f"{request.scope.get('root_path', '')}{path}"
