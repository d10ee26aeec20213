"""Which service a request is for: the address decides, and the authority only where it may."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory import Endpoint, Target
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from tests.routing.router_world import World, text


@pytest.mark.parametrize(
    ("address", "authority", "service"),
    [
        ("10.96.0.1:80", b"new", "default/c"),  # the address is known, so it decides
        ("10.1.0.9:80", b"c", "default/new"),
        ("192.0.2.1:80", b"c", "default/c"),
        ("192.0.2.1:8080", b"C.default.svc.cluster.local:80", "default/c"),
        ("192.0.2.1:80", b"c.east", "east/default/c"),
        ("192.0.2.1:80", b"c:81", None),
        ("192.0.2.1:80", b"example.com", None),
        ("192.0.2.1:80", None, None),
        ("[::ffff:192.0.2.1]:80", b"c", "default/c"),
        ("10.96.0.1:81", b"nobody", None),
        # Outside of the networks in the configuration, an authority chooses nothing.
        ("198.51.100.1:80", b"c", None),
        ("198.51.100.1:80", b"c.default.svc.cluster.local:80", None),
        ("198.51.100.1:80", b"c.east", None),
        ("10.96.0.1:81", b"c:80", None),
        ("[2001:db8::1]:80", b"c", None),
        ("127.0.0.1:80", b"c", None),
    ],
)
def test_the_address_decides_and_the_authority_only_where_the_operator_lets_it(
    address: str, authority: bytes | None, service: str | None
) -> None:
    target = World(text()).to(address, authority)
    assert target.service == service
    if service is None:
        assert target == Target(None, (Endpoint(Address.parse(address)),))


def test_the_authority_is_not_even_looked_at_where_it_may_not_choose() -> None:
    def ask() -> bytes | None:
        raise AssertionError("the authority is not asked for")

    router = World(text()).router
    assert router.find_target(Address("10.96.0.1", 80), ask).service == "default/c"
    assert router.find_target(Address("198.51.100.1", 80), ask).service is None
    router.networks = ()
    assert router.find_target(Address("192.0.2.1", 80), ask).service is None


@given(
    st.ip_addresses().map(str),
    st.sampled_from([80, 81, 4143, 8080]),
    st.sampled_from([b"c", b"new", b"c.east", b"c-east", b"c:80"]),
)
def test_an_address_outside_of_the_mesh_is_itself_whatever_the_authority(
    host: str, port: int, authority: bytes
) -> None:
    original = Address(host, port)
    router = World(text()).router
    router.networks = ()
    if router.find_address(original) is None:
        assert router.find_target(original, lambda: authority) == Target(
            None, (Endpoint(original),)
        )


class Gates:
    """203.0.113.7, port 4143, is the gateway of east, and 203.0.113.8 that of north; all of them
    can be used."""

    def cluster(self, address: Address) -> str | None:
        return {Address("203.0.113.7", 4143): "east", Address("203.0.113.8", 4143): "north"}.get(
            address
        )

    def through(self, target: Target) -> Target:
        return target

    def why(self, cluster: str) -> str:
        return f"no gateway of {cluster}"

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None: ...


@pytest.mark.parametrize(
    ("address", "authority", "service"),
    [
        ("203.0.113.7:4143", b"c.east", "east/default/c"),
        ("203.0.113.7:4143", b"c-east.default.svc.cluster.local:80", "east/default/c"),
        ("203.0.113.7:4143", b"c.north", None),  # at a gateway, the services of its own cluster
        ("203.0.113.7:4143", b"c", None),
        ("203.0.113.7:4143", b"new.default.svc.cluster.local", None),
        ("203.0.113.7:80", b"c.east", None),  # another port of the gateway's host
        ("203.0.113.8:4143", b"c.north", "north/default/c"),
    ],
)
def test_at_a_gateway_the_authority_chooses_among_the_services_of_its_cluster(
    address: str, authority: bytes, service: str | None
) -> None:
    world = World(text())
    world.router.remote_gateways = Gates()
    assert world.to(address, authority).service == service


DUAL = """
services:
  - name: c
    ports: [{port: 80}]
    endpoints: [{address: 10.1.0.1}, {address: "fd00::1"}, {address: 10.1.0.2}]
    split: [{service: c, weight: 1}]
  - {name: d, ports: [{port: 80}], endpoints: [{address: 10.1.0.3}, {address: "fd00::3"}]}
  - {name: six, ports: [{port: 80}], endpoints: [{address: "fd00::6"}]}
"""


@pytest.mark.parametrize(
    ("address", "authority", "hosts"),
    [
        ("192.0.2.1:80", b"d", {"10.1.0.3"}),
        ("[2001:db8::1]:80", b"d", {"fd00::3"}),
        ("192.0.2.1:80", b"c", {"10.1.0.1", "10.1.0.2"}),
        ("[2001:db8::1]:80", b"c", {"fd00::1"}),
        ("192.0.2.1:80", b"six", {"fd00::6"}),
    ],
)
def test_a_name_leads_to_endpoints_of_the_family_that_was_dialled(
    address: str, authority: bytes, hosts: set[str]
) -> None:
    world = World(DUAL)
    world.router.networks = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")]
    target = world.to(address, authority)
    assert {endpoint.address.host for endpoint in target.endpoints} == hosts
    assert world.to(address, authority) is target, (
        "a target's endpoint set belongs to the target object"
    )


class OneAddress:
    """Virtual addresses: 240.0.0.1 is c of east, 240.0.0.2 was something that is gone."""

    def lookup(self, host: str) -> tuple[str, str, str] | None:
        return {
            "240.0.0.1": ("east", "default", "c"),
            "240.0.0.2": ("east", "default", "gone"),
        }.get(host)

    def covers(self, host: str) -> bool:
        return host.startswith("240.")

    def held(self, host: str) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize(
    ("address", "service", "gateways"),
    [
        ("240.0.0.1:80", "east/default/c", 1),
        ("240.0.0.1:81", "east/default/c", 0),
        ("240.0.0.2:80", "east/default/gone", 0),
        ("240.0.0.3:80", None, 0),
    ],
)
def test_a_virtual_address_is_its_service_or_none_but_never_itself(
    address: str, service: str | None, gateways: int
) -> None:
    world = World(text())
    world.router.virtual = OneAddress()
    target = world.to(address, b"new")
    assert (target.service, len(target.endpoints)) == (service, gateways)
