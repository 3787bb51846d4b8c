"""Which addresses the service connects to on a client's word: public ones, and those an operator lists.

`ipaddress.is_global` alone will not do: it says yes to multicast, to site-local addresses and to the IPv6 forms that
lead to an IPv4 address, and its answers changed between patch releases of Python. The networks that are refused are
therefore written out, from the registries of special-purpose addresses (IANA; RFC 6890), and both must agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

from service.errors import CannotStart

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# All that is routed in public is in here: RFC 4291, section 2.4, and IANA's IPv6 Global Unicast Address Space.
GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
# An IPv6-only network reaches IPv4 hosts through these; the last 32 bits are the host (RFC 6052, section 2.1).
NAT64: Final = IPv6Network("64:ff9b::/96")
NOT_PUBLIC: Final[tuple[Network, ...]] = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
# Where clouds tell a machine its own credentials. Some lie in public networks, or in ones an operator may well list.
METADATA: Final[frozenset[Address]] = frozenset(
    ip_address(address)
    for address in (
        "169.254.169.254",  # AWS, Azure, Google, OpenStack and most others
        "fd00:ec2::254",  # AWS
        "169.254.170.2",  # AWS, of a container
        "169.254.170.23",  # AWS, of a pod
        "fd00:ec2::23",  # AWS, of a pod
        "fd20:ce::254",  # Google
        "168.63.129.16",  # Azure's own host
        "192.0.0.192",  # Oracle
        "100.100.100.200",  # Alibaba
    )
)


def is_public(address: Address) -> bool:
    """Whether an address, which carries no other, is one that the whole internet reaches."""
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not special and not any(address in network for network in NOT_PUBLIC)


@dataclass(frozen=True)
class AddressRule:
    """Public addresses, and those in `listed` networks. Addresses of `METADATA` must be listed one by one."""

    listed: tuple[Network, ...] = ()

    @classmethod
    def of(cls, networks: Iterable[str]) -> AddressRule:
        """The rule of the setting `BACKBONE_IMAGE_NETWORKS`.

        Raises:
            CannotStart: one of them is no network.
        """
        return cls(tuple(_network(text) for text in networks))

    def allows(self, address: Address) -> bool:
        """Whether the service may connect to an address. One that carries an IPv4 address is judged by that."""
        if isinstance(address, IPv6Address):
            if address.ipv4_mapped is not None:
                return self.allows(address.ipv4_mapped)
            if address in NAT64:
                return self._lists(address) and self.allows(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address in METADATA:
            return ip_network(address) in self.listed
        return is_public(address) or self._lists(address)

    def _lists(self, address: Address) -> bool:
        return any(address in network for network in self.listed)


def _network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise CannotStart(
            f"BACKBONE_IMAGE_NETWORKS: {text!r} is no network; write 10.1.0.0/16, with no bits behind the prefix"
        ) from error
