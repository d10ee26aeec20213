"""Separate clusters, joined only by their gateways.

Rules: real packets; both IP versions. Each path that must be closed is tried with a route that an
attacker might add. Each fault is shown by what both sides see of it, during it and after it."""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from lab import network
from lab.capture import Capture
from lab.cluster import Lab
from lab.network import Subnets
from lab.pod import Pod
from lab.process import LabError
from lab.wide_area import RANGE4, RANGE6, Fault

pytestmark = pytest.mark.lab
versions = pytest.mark.parametrize("version", [4, 6])

GATE = 4143


class Clusters:
    """West's gateway is behind NAT, east's has its own address in the wide area. Each cluster has
    another pod."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.west, self.east = lab.cluster("west"), lab.cluster("east")
        area = lab.wide_area()
        self.west_border, self.east_border = area.border(self.west), area.border(self.east)
        self.west_gateway, self.east_gateway = self.west.pod("gateway"), self.east.pod("gateway")
        self.web, self.shop = self.west.pod("web"), self.east.pod("shop")
        self.west_border.publish(GATE, self.west_gateway)
        self.leg = area.attach(self.east_gateway)


@pytest.fixture
async def clusters(lab: Lab) -> Clusters:
    return Clusters(lab)


async def talk(
    pod: Pod, address: str, listener: trio.SocketListener, port: int = GATE
) -> tuple[str, str]:
    """A byte there and back: returns the addresses of the client and of the server, as the server
    sees them."""
    with trio.fail_after(30):
        stream = await pod.connect(address, port)
        accepted = await listener.accept()
        await stream.send_all(b"?")
        assert await accepted.receive_some() == b"?"
        await accepted.send_all(b"!")
        assert await stream.receive_some() == b"!"
        ends = accepted.socket.getpeername()[0], accepted.socket.getsockname()[0]
        await accepted.aclose()
        await stream.aclose()
    return ends


async def refused(connect: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """The connection gets an error at once, and not a timeout."""
    with trio.fail_after(30), pytest.raises(OSError):
        await connect()


async def silent(connect: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """There is no response at all."""
    with trio.move_on_after(0.5) as scope:
        await connect()
    assert scope.cancelled_caught


@versions
async def test_a_pod_reaches_the_gateway_of_the_other_cluster_and_is_known_there_by_its_border(
    clusters: Clusters, version: int
) -> None:
    listener = await clusters.east_gateway.listen(GATE, version)
    client, server = await talk(clusters.web, clusters.leg.address(version), listener)
    assert client == clusters.west_border.leg.address(version)
    assert server == clusters.leg.address(version)


@versions
async def test_a_gateway_behind_nat_has_another_address_outside_than_its_own(
    clusters: Clusters, version: int
) -> None:
    listener = await clusters.west_gateway.listen(GATE, version)
    outside = clusters.west_border.leg.address(version)
    client, server = await talk(clusters.shop, outside, listener)
    assert server == clusters.west_gateway.address(version) != outside
    assert client == clusters.east_border.leg.address(version)


@versions
async def test_pods_of_another_cluster_cannot_be_reached(clusters: Clusters, version: int) -> None:
    await clusters.shop.listen(80, version)
    await refused(lambda: clusters.web.connect(clusters.shop.address(version), 80))


@versions
async def test_pods_of_another_cluster_are_unreachable_even_with_routes_on_the_path(
    clusters: Clusters, version: int
) -> None:
    await clusters.shop.listen(80, version)
    target, area = clusters.shop.address(version), clusters.lab.wide_area()
    async with Capture(clusters.shop) as received:
        for way in (
            clusters.east_border.leg,
            clusters.leg,
        ):  # over the border of their cluster, and over its gateway
            network.batch(f"route replace {target} via {way.address(version)}", netns=area.netns)
            network.batch(
                f"route replace {target} via {clusters.west_border.leg.near(version)}",
                netns=clusters.west.netns,
            )
            with trio.move_on_after(0.5), contextlib.suppress(OSError):
                await clusters.web.connect(target, 80)
                pytest.fail(f"reached over {way.name}")
    assert not received.flows(80)


@versions
async def test_a_border_admits_only_published_ports(clusters: Clusters, version: int) -> None:
    outside = clusters.west_border.leg.address(version)
    await clusters.west_gateway.listen(80, version)
    await refused(lambda: clusters.shop.connect(outside, 80))
    clusters.west_border.publish(8080, clusters.west_gateway, 80)
    await clusters.shop.connect(outside, 8080)
    clusters.west_border.withdraw(8080)
    await refused(lambda: clusters.shop.connect(outside, 8080))


async def test_a_published_port_can_move_to_another_gateway(clusters: Clusters) -> None:
    first, second = (
        await clusters.west_gateway.listen(GATE),
        await clusters.west.pod("second").listen(GATE),
    )
    outside = clusters.west_border.leg.ipv4
    _, server = await talk(clusters.shop, outside, first)
    clusters.west_border.publish(GATE, clusters.west.pods["second"])
    _, other = await talk(clusters.shop, outside, second)
    assert (server, other) == (clusters.west_gateway.ipv4, clusters.west.pods["second"].ipv4)


async def test_a_border_leads_to_pods_of_its_own_cluster_only(clusters: Clusters) -> None:
    with pytest.raises(
        LabError, match="border of cluster west cannot lead to pod shop of cluster east"
    ):
        clusters.west_border.publish(GATE, clusters.shop)


async def test_three_clusters_reach_each_others_gateways_in_every_direction(
    clusters: Clusters,
) -> None:
    south = clusters.lab.cluster("south")
    border, gateway, pod = (
        clusters.lab.wide_area().border(south),
        south.pod("gateway"),
        south.pod("web"),
    )
    border.publish(GATE, gateway)
    ways = {
        "west": (clusters.west_border.leg, clusters.west_gateway, clusters.web),
        "east": (clusters.leg, clusters.east_gateway, clusters.shop),
        "south": (border.leg, gateway, pod),
    }
    for name, (leg, server, _) in ways.items():
        listener = await server.listen(GATE)
        for other, (_, _, client) in ways.items():
            if other != name:
                await talk(client, leg.ipv4, listener)


async def unreached(connect: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """The connection fails. Whether a router on the path reports it depends on the IP version."""
    with trio.move_on_after(0.5), contextlib.suppress(OSError):
        await connect()
        pytest.fail("connected")


SEEN = {Fault.SILENCE: silent, Fault.REFUSAL: refused, Fault.UNPLUGGED: unreached}


@versions
@pytest.mark.parametrize("fault", Fault)
async def test_a_fault_of_the_wide_area_ends_with_its_block(
    clusters: Clusters, fault: Fault, version: int
) -> None:
    listener = await clusters.east_gateway.listen(GATE, version)
    address = clusters.leg.address(version)
    await talk(clusters.web, address, listener)
    with clusters.leg.fault(fault):
        await SEEN[fault](lambda: clusters.web.connect(address, GATE))
    await talk(clusters.web, address, listener)


@pytest.mark.parametrize("fault", Fault)
async def test_a_fault_stops_transfers_in_progress_and_does_not_affect_the_cluster(
    clusters: Clusters, fault: Fault
) -> None:
    listener = await clusters.east_gateway.listen(GATE)
    stream = await clusters.web.connect(clusters.leg.ipv4, GATE)
    accepted = await listener.accept()
    with clusters.leg.fault(fault):
        await stream.send_all(b"lost on its way")
        with trio.move_on_after(0.5) as nothing:
            await accepted.receive_some()
        assert nothing.cancelled_caught
        # Inside the clusters everything is as before.
        await talk(clusters.shop, clusters.east_gateway.ipv4, listener)
    with trio.fail_after(60):
        assert await accepted.receive_some() == b"lost on its way"
    await accepted.aclose()


async def test_a_cluster_whose_border_is_silent_still_is_a_cluster(clusters: Clusters) -> None:
    listener = await clusters.west_gateway.listen(GATE)
    with clusters.west_border.leg.fault(Fault.SILENCE):
        await talk(clusters.web, clusters.west_gateway.ipv4, listener)
        await silent(lambda: clusters.shop.connect(clusters.west_border.leg.ipv4, GATE))
        await silent(lambda: clusters.web.connect(clusters.leg.ipv4, GATE))


def test_the_ranges_of_the_wide_area_are_those_of_no_cluster() -> None:
    for number in range(1, 101):
        plan = Subnets.numbered(number)
        assert not any(net.overlaps(RANGE4) for net in (plan.pods4, plan.services4))
        assert not any(net.overlaps(RANGE6) for net in (plan.pods6, plan.services6))
    assert not Subnets.numbered(1).pods4.overlaps(Subnets.numbered(2).pods4)


async def test_the_wide_area_goes_with_its_laboratory() -> None:
    def namespaces() -> set[Path]:
        return set(Path("/run/netns").glob("*"))

    before = namespaces()
    async with Lab() as lab:
        Clusters(lab)
        assert len(namespaces() - before) == 7
    assert namespaces() == before
