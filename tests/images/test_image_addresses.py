"""Which addresses may be connected to: the table of what libraries get wrong, and one address of every network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import CannotStart
from service.images.addresses import METADATA, AddressRule

PUBLIC = AddressRule()
BAD = {
    "this network": ["0.0.0.0", "0.1.2.3"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "unspecified": ["::"],
    "private": ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255"],
    "link-local": ["169.254.0.1", "169.254.169.254", "fe80::1", "febf::1"],
    "protocol assignments": ["192.0.0.1", "192.0.0.8", "192.0.0.9", "192.0.0.170", "2001::1", "2001:1ff::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1", "3fff:fff::1"],
    "benchmarking": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "6to4 relays": ["192.88.99.1"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1", "ff00::"],
    "reserved": ["240.0.0.1", "255.255.255.255", "4000::1", "8000::1", "e000::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0.0.0.0"],
    "compatible": ["::127.0.0.1", "::10.0.0.1", "::8.8.8.8", "::2"],
    "translated": ["::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::7f00:1", "64:ff9b:1:ffff::1"],
    "6to4": ["2002:7f00:1::", "2002:a9fe:a9fe::", "2002:808:808::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001::"],
    "ORCHID": ["2001:10::1", "2001:1f:ffff::1", "2001:20::1", "2001:2f:ffff::1"],
    "unique local": ["fc00::1", "fd00::1", "fdff:ffff::1", "fd00:ec2::254", "fd20:ce::254"],
    "site-local": ["fec0::1", "feff::1"],
    "discard": ["100::1", "100:0:0:1::1"],
    "segment routing": ["5f00::1", "5fff::1"],
    "metadata in a public network": ["168.63.129.16", "::ffff:168.63.129.16"],
}  # fmt: skip
GOOD = [
    "1.1.1.1", "8.8.8.8", "93.184.215.14", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1",
    "126.255.255.255", "128.0.0.1", "169.253.255.255", "172.15.255.255", "172.32.0.1", "192.0.1.1", "192.167.255.255",
    "192.169.0.1", "198.17.255.255", "198.20.0.1", "223.255.255.255", "168.63.129.17", "::ffff:8.8.8.8",
    "2001:4860:4860::8888", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2001:200::1", "2003::1", "3ffe::1",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_an_address_that_is_not_public_is_refused(kind: str) -> None:
    assert [text for text in BAD[kind] if PUBLIC.allows(ip_address(text))] == []


def test_public_addresses_are_allowed_up_to_the_edges_of_the_others() -> None:
    assert [text for text in GOOD if not PUBLIC.allows(ip_address(text))] == []


@given(st.ip_addresses(v=6))
def test_no_address_outside_global_unicast_is_allowed(address: IPv6Address) -> None:
    if address.ipv4_mapped is None and int(address) >> 125 != 0b001:
        assert not PUBLIC.allows(address)


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_by_the_one_it_carries(address: IPv4Address) -> None:
    mapped = IPv6Address(f"::ffff:{address}")
    assert PUBLIC.allows(mapped) == PUBLIC.allows(address)


def test_listed_networks_are_allowed_and_no_more() -> None:
    rule = AddressRule.of(["10.1.0.0/16", "127.0.0.1", "fd12::/16"])
    assert all(
        rule.allows(ip_address(text)) for text in ("10.1.2.3", "127.0.0.1", "fd12::1", "::ffff:10.1.2.3")
    )
    assert not any(rule.allows(ip_address(text)) for text in ("10.2.0.1", "127.0.0.2", "fd13::1", "::1"))


@pytest.mark.parametrize("address", sorted(METADATA, key=str), ids=str)
def test_metadata_services_must_be_listed_one_by_one(address: IPv4Address | IPv6Address) -> None:
    assert not AddressRule.of(["0.0.0.0/0", "::/0"]).allows(address)
    assert AddressRule.of([str(address)]).allows(address)


def test_nat64_that_is_listed_leads_to_public_hosts_only() -> None:
    rule = AddressRule.of(["64:ff9b::/96"])
    assert rule.allows(ip_address("64:ff9b::808:808"))
    for text in ("64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808"):
        assert not rule.allows(ip_address(text))


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "intranet", "10.*", "fe80::/10%eth0"])
def test_what_is_no_network_keeps_the_service_from_starting(text: str) -> None:
    with pytest.raises(CannotStart, match="BACKBONE_IMAGE_NETWORKS"):
        AddressRule.of([text])
