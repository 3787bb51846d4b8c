"""The URLs that images may come from, by their form alone: nothing is looked up here.

A URL is parsed once, by HTTPX, and what is checked is what is connected to: there is no second parser to disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import httpx

from service.errors import CannotStart

MAX_URL_CHARS: Final = 2048
PORTS: Final = {"https": 443, "http": 80}
NAME: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
# Resolvers take `127.1`, `0x7f.1` and `2130706433` for addresses too (inet_aton), and so does every browser.
ENDS_AS_A_NUMBER: Final = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)$")
FORM: Final = "is no URL of an image; one is written https://host/path"


class RefusedUrlError(ValueError):
    """A URL that is not fetched; the text says why and repeats nothing of it."""


@dataclass(frozen=True)
class ImageUrl:
    """A URL as it is fetched. `host` is lower case and ASCII without a trailing dot, an IPv6 address has no brackets.

    Attributes:
        target: path and query, percent-encoded; a fragment never leaves the client.
    """

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, text: str) -> ImageUrl:
        """The parts of a URL.

        Raises:
            RefusedUrlError: it is none, or has a name and a password in it.
        """
        if len(text) > MAX_URL_CHARS:
            raise RefusedUrlError(f"has more than {MAX_URL_CHARS} characters")
        try:
            url = httpx.URL(text)
            host = canonical_host(url.raw_host.decode("ascii"))
        except (httpx.InvalidURL, ValueError) as error:
            raise RefusedUrlError(FORM) from error
        if url.userinfo:
            raise RefusedUrlError("must not have a name and a password in it")
        port = url.port or PORTS.get(url.scheme)
        if url.scheme not in PORTS or port is None or not 0 < port < 2**16:
            raise RefusedUrlError(FORM)
        return cls(url.scheme, host, port, url.raw_path.decode("ascii"))

    def led_to(self, location: str) -> ImageUrl:
        """Where a redirect of this URL leads.

        Raises:
            RefusedUrlError: as for `of`.
        """
        try:
            return ImageUrl.of(
                str(httpx.URL(f"{self.scheme}://{self.authority}{self.target}").join(location))
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise RefusedUrlError(FORM) from error

    @property
    def authority(self) -> str:
        """Host and port as the `Host` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def canonical_host(host: str) -> str:
    """A name or an address in the one spelling that is compared and connected to.

    Raises:
        ValueError: neither a name nor an address in full, such as `0x7f.1`, `ex%61mple.com` or `fe80::1%eth0`.
    """
    if ":" in host:
        if "%" in host:
            raise ValueError("an address with a zone")
        return str(IPv6Address(host))
    name = host.removesuffix(".")
    if ENDS_AS_A_NUMBER.search(name):
        return str(IPv4Address(name))
    if not NAME.fullmatch(name):
        raise ValueError("no host name")
    return name


def is_address(host: str) -> bool:
    """Whether a host in its one spelling is an address and no name."""
    return ":" in host or ENDS_AS_A_NUMBER.search(host) is not None


@dataclass(frozen=True)
class AllowedHost:
    """One word of the setting: `name`, `*.name` (names below it), `*` (every name) or an address; scheme and port."""

    scheme: str
    pattern: str
    port: int

    @classmethod
    def of(cls, word: str) -> AllowedHost:
        """`[http://]host[:port]`.

        Raises:
            CannotStart: it is none.
        """
        address = word if "://" in word else f"https://{word}"
        wildcard, rest = _wildcard(address)
        try:
            url = ImageUrl.of(rest)
        except RefusedUrlError as error:
            raise _no_host(word) from error
        if url.target != "/" or (wildcard and is_address(url.host)):
            raise _no_host(word)
        pattern = "*" if wildcard == "*" else f"{wildcard}{url.host}"
        return cls(url.scheme, pattern, url.port)

    def allows(self, url: ImageUrl) -> bool:
        """Whether a URL is at this host."""
        if (url.scheme, url.port) != (self.scheme, self.port):
            return False
        if not self.pattern.startswith("*"):
            return url.host == self.pattern
        return not is_address(url.host) and url.host.endswith(self.pattern[1:])


def _wildcard(address: str) -> tuple[str, str]:
    """The beginning `*.` or the whole `*` of a host, and the address as if that were not there."""
    scheme, _, rest = address.partition("://")
    if rest == "*" or rest.startswith("*:"):
        return "*", f"{scheme}://any{rest[1:]}"
    if rest.startswith("*."):
        return "*.", f"{scheme}://{rest[2:]}"
    return "", address


def _no_host(word: str) -> CannotStart:
    return CannotStart(
        f"BACKBONE_IMAGE_HOSTS: {word!r} is no host; write images.example.com, *.example.com, *, or "
        "http://host:port for one without TLS"
    )


@dataclass(frozen=True)
class AllowedHosts:
    """The setting `BACKBONE_IMAGE_HOSTS`."""

    hosts: tuple[AllowedHost, ...]

    @classmethod
    def of(cls, words: Iterable[str]) -> AllowedHosts:
        """The hosts that an operator lists.

        Raises:
            CannotStart: a word is no host.
        """
        return cls(tuple(AllowedHost.of(word) for word in words))

    def checked(self, url: ImageUrl) -> ImageUrl:
        """The URL itself.

        Raises:
            RefusedUrlError: no listed host has its scheme, host and port.
        """
        if not any(host.allows(url) for host in self.hosts):
            raise RefusedUrlError("is not at a host that this server fetches images from")
        return url
