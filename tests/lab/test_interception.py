"""The interception rules in a real kernel: what is redirected, what is not, and that no rule is
left over.

Rules: a listener on a proxy's port replaces the proxy and asks the kernel for the original
destination. A listener on any other port replaces an application. Each exception is shown by a
connection that reaches the application, next to one that is redirected, so that a ruleset without
effect cannot pass. Attacks are in test_interception_attacks.py."""

import socket
import subprocess
import sys

import pytest
import trio

from lab import network
from lab.cluster import Cluster
from lab.pod import (
    APP,
    OPERATOR,
    PACKAGES,
    PROXY_MARK,
    SIDECAR,
    Pod,
    User,
    exemption,
    exemption_flags,
)
from lab.sandbox import rootless
from proxy.intercept import nftables
from tests.lab.intercepted import LOOPBACK, VERSIONS, accept, dial_as, install, original_destination

pytestmark = pytest.mark.lab


@VERSIONS
async def test_what_the_pod_sends_reaches_the_outbound_port_with_its_destination(
    west: Cluster, a: Pod, version: int
) -> None:
    install(a)
    listener = await a.listen(4140, version)
    target = west.service_addresses("shop")[version == 6]
    client = await a.connect(target, 8080)
    accepted = await accept(listener)
    assert original_destination(accepted) == (target, 8080)
    assert accepted.socket.getsockname()[0] == LOOPBACK[version]
    await client.send_all(b"hello")
    assert await accepted.receive_some() == b"hello"


@VERSIONS
async def test_what_arrives_from_outside_reaches_the_inbound_port_with_its_destination(
    a: Pod, b: Pod, version: int
) -> None:
    install(b)
    listener = await b.listen(4143, version)
    client = await a.connect(b.address(version), 80)
    accepted = await accept(listener)
    assert original_destination(accepted) == (b.address(version), 80)
    assert accepted.socket.getpeername()[0] == a.address(version)
    await accepted.send_all(b"hello")
    assert await client.receive_some() == b"hello"


@VERSIONS
async def test_a_connection_to_the_inbound_port_itself_arrives_with_the_proxy_as_its_destination(
    a: Pod, b: Pod, version: int
) -> None:
    install(b)
    listener = await b.listen(4143, version)
    await a.connect(b.address(version), 4143)
    accepted = await accept(listener)
    assert (
        original_destination(accepted)
        == accepted.socket.getsockname()[:2]
        == (b.address(version), 4143)
    )


@VERSIONS
async def test_a_connection_from_outside_to_the_outbound_port_never_reaches_it(
    a: Pod, b: Pod, version: int
) -> None:
    install(b)
    inbound, outbound = await b.listen(4143, version), await b.listen(4140, version)
    await a.connect(b.address(version), 4140)
    assert original_destination(await accept(inbound)) == (b.address(version), 4140)
    with trio.move_on_after(0.05):
        await outbound.accept()
        pytest.fail("the outbound port could be reached from outside")


@VERSIONS
@pytest.mark.skipif(
    rootless(), reason="one user id only: the mark stands for it, see the next test"
)
async def test_the_sidecars_user_is_exempt_and_others_are_not(a: Pod, b: Pod, version: int) -> None:
    await a.intercept("--uid", "2102")
    await b.listen(80, version)
    assert await dial_as(a, SIDECAR, b.address(version), 80)
    # Nothing listens on 4140 in a: refused
    assert not await dial_as(a, APP, b.address(version), 80)
    assert not await dial_as(a, OPERATOR, b.address(version), 80)


@VERSIONS
async def test_marked_packets_are_exempt_and_others_are_not(a: Pod, b: Pod, version: int) -> None:
    await a.intercept("--no-uid", "--mark", hex(PROXY_MARK))
    await b.listen(80, version)
    await a.connect(b.address(version), 80, mark=PROXY_MARK)
    for mark in (None, PROXY_MARK + 1):
        with pytest.raises(OSError):
            await a.connect(b.address(version), 80, mark=mark)


@VERSIONS
async def test_loopback_and_the_pods_own_address_are_untouched(a: Pod, version: int) -> None:
    install(a)
    listener = await a.listen(80, version)
    for host in (LOOPBACK[version], a.address(version)):
        await a.connect(host, 80)
        assert (await accept(listener)).socket.getsockname()[:2] == (host, 80)


@VERSIONS
async def test_the_admin_port_is_reached_directly_from_outside(
    a: Pod, b: Pod, version: int
) -> None:
    install(b)
    listener = await b.listen(4191, version)
    await a.connect(b.address(version), 4191)
    await accept(listener)


@VERSIONS
async def test_skipped_outbound_ports_and_subnets_are_reached_directly(
    west: Cluster, a: Pod, b: Pod, version: int
) -> None:
    other = west.pod("other")
    await a.intercept(
        *exemption_flags(),
        "--skip-outbound-ports",
        "5000,6000-6010",
        "--skip-outbound-subnets",
        other.address(version),
    )
    listeners = {port: await b.listen(port, version) for port in (5000, 6005, 6011)}
    skipped = await other.listen(80, version)
    for port in (5000, 6005):
        await a.connect(b.address(version), port)
        await accept(listeners[port])
    await a.connect(other.address(version), 80)
    await accept(skipped)
    with pytest.raises(OSError):
        await a.connect(b.address(version), 6011)


@VERSIONS
async def test_skipped_inbound_ports_and_subnets_reach_the_application_directly(
    west: Cluster, a: Pod, b: Pod, version: int
) -> None:
    prober = west.pod("prober")
    await b.intercept(
        *exemption_flags(),
        "--skip-inbound-ports",
        "22",
        "--skip-inbound-subnets",
        prober.address(version),
    )
    direct, application = await b.listen(22, version), await b.listen(80, version)
    await a.connect(b.address(version), 22)
    await accept(direct)
    await prober.connect(b.address(version), 80)
    await accept(application)
    with pytest.raises(OSError):
        await a.connect(b.address(version), 80)


@VERSIONS
async def test_redirect_lists_leave_all_other_ports_alone(a: Pod, b: Pod, version: int) -> None:
    await b.intercept(*exemption_flags(), "--redirect-inbound-ports", "80")
    listener = await b.listen(81, version)
    await a.connect(b.address(version), 81)
    await accept(listener)
    with pytest.raises(OSError):
        await a.connect(b.address(version), 80)


async def test_udp_is_never_touched(a: Pod, b: Pod) -> None:
    for pod in (a, b):
        install(pod)
    receiver, sender = b.socket(kind=socket.SOCK_DGRAM), a.socket(kind=socket.SOCK_DGRAM)
    await receiver.bind(("0.0.0.0", 53))
    await sender.sendto(b"question", (b.ipv4, 53))
    with trio.fail_after(30):
        assert (await receiver.recvfrom(100))[0] == b"question"


@VERSIONS
async def test_connections_that_are_open_when_the_rules_come_or_go_stay_open(
    a: Pod, b: Pod, version: int
) -> None:
    listener = await b.listen(80, version)
    client = await a.connect(b.address(version), 80)
    server = await accept(listener)

    async def still_talks(word: bytes) -> None:
        with trio.fail_after(30):
            await client.send_all(word)
            assert await server.receive_some() == word
            await server.send_all(word)
            assert await client.receive_some() == word

    await still_talks(b"before")
    for change in (
        lambda: nftables.apply(exemption()),
        lambda: nftables.apply(exemption()),
        nftables.remove,
    ):
        for pod in (a, b):
            pod.inside(change)
        await still_talks(b"still here")


async def test_a_redirected_connection_survives_new_rules(west: Cluster, a: Pod) -> None:
    install(a)
    listener = await a.listen(4140, 4)
    client = await a.connect(west.service_addresses("shop")[0], 80)
    server = await accept(listener)
    await a.intercept(*exemption_flags(), "--skip-outbound-ports", "80")
    with trio.fail_after(30):
        await client.send_all(b"still here")
        assert await server.receive_some() == b"still here"


def rules(pod: Pod) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", pod.netns, "nft", "list", "ruleset"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


async def test_applying_twice_is_applying_once_and_removing_leaves_nothing(a: Pod) -> None:
    assert rules(a) == ""
    await a.intercept(*exemption_flags(), "--skip-outbound-ports", "25")
    once = rules(a)
    assert "table inet isthmus" in once
    await a.intercept(*exemption_flags(), "--skip-outbound-ports", "25")
    assert rules(a) == once
    for _ in range(2):
        await a.intercept("--remove")
        assert rules(a) == ""


async def test_refused_settings_leave_the_old_rules_in_place(a: Pod) -> None:
    install(a)
    before = rules(a)
    done = await a.intercept("--skip-outbound-ports", "0", check=False)
    assert done.returncode == 64
    assert rules(a) == before


async def test_other_tables_of_the_pod_are_left_alone(a: Pod) -> None:
    network.in_namespace(
        a.netns, lambda: subprocess.run(["nft", "add", "table", "inet", "theirs"], check=True)
    )
    install(a)
    await a.intercept("--remove")
    assert "table inet theirs" in rules(a)


async def test_without_the_capability_one_line_says_so(a: Pod) -> None:
    command = [sys.executable, "-m", "proxy.cli", "intercept"]
    user = User(uid=1000, never_root=True)
    done = await a.run(command, user=user, env=PACKAGES)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert text.count("\n") == 1
    assert "NET_ADMIN" in text
