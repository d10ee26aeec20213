"""Loops that addresses show: (own or loopback address) x (own listener port), in every spelling,
and nothing else."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopguard import OwnListeners, loopback

OWN = OwnListeners(frozenset({4140, 4143}), frozenset({"10.1.0.5", "fd00:1::5"}))

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
PORTS = st.integers(1, 65535)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.10",
        "::1",
        "0.0.0.0",
        "::",
        "10.1.0.5",
        "fd00:1::5",
        "fd00:0001:0:0::5",
        "::ffff:10.1.0.5",
        "::ffff:127.0.0.1",
    ],
)
@pytest.mark.parametrize("port", [4140, 4143])
def test_own_listener_is_a_loop_in_every_spelling(host: str, port: int) -> None:
    accepted, dialled = OWN.check_accept(host, port), OWN.check_dial(host, port)
    assert accepted is not None
    assert accepted.kind == "own_listener"
    assert str(port) in accepted.words
    assert dialled is not None
    assert dialled.kind == "own_target"


@pytest.mark.parametrize("host", ["10.1.0.6", "fd00:1::6", "192.0.2.1", "::ffff:10.1.0.6"])
def test_another_pods_listener_is_not_ours_to_refuse(host: str) -> None:
    assert OWN.check_accept(host, 4143) is None
    assert OWN.check_dial(host, 4143) is None


def test_own_address_on_the_applications_port_is_legitimate() -> None:
    assert OWN.check_dial("10.1.0.5", 8080) is None
    assert OWN.check_accept("127.0.0.1", 8080) is None


def test_an_address_that_the_connection_came_in_by_is_ours_whatever_the_list_says() -> None:
    assert OWN.check_accept("192.0.2.7", 4143, ours=True) is not None
    assert OWN.check_accept("192.0.2.7", 8080, ours=True) is None


def test_messages_have_an_ipv6_address_in_brackets() -> None:
    loop = OWN.check_dial("fd00:1::5", 4143)
    assert loop is not None
    assert "[fd00:1::5]:4143" in loop.words


@given(host=ADDRESSES, port=PORTS)
def test_verdict_is_exactly_the_product_of_own_addresses_and_own_ports(
    host: str, port: int
) -> None:
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    plain = mapped or address
    own = plain.is_loopback or plain.is_unspecified or str(plain) in OWN.addresses
    assert (OWN.check_dial(host, port) is not None) == (own and port in OWN.ports)
    assert OWN.own(host) == own


@given(port=PORTS)
def test_a_mapped_address_gets_the_verdict_of_the_plain_one(port: int) -> None:
    for host in ("10.1.0.5", "10.1.0.6", "127.0.0.1"):
        assert (OWN.check_accept(host, port) is None) == (
            OWN.check_accept(f"::ffff:{host}", port) is None
        )


@given(host=ADDRESSES)
def test_loopback_holds_for_both_families(host: str) -> None:
    plain = ipaddress.ip_address(host)
    if not (isinstance(plain, ipaddress.IPv6Address) and plain.ipv4_mapped):
        assert loopback(host) == (plain.is_loopback or plain.is_unspecified)
