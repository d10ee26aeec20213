"""The interception rules in a real kernel: what is redirected, what is not, and that nothing stays
behind.

Rules: a listener on a proxy's port stands for the proxy and asks the kernel for the original
destination; a listener on any other port stands for an application.  Each thing that must stay
untouched is shown by a connection that reaches the application, next to one that is redirected, so
that a ruleset which does nothing cannot pass.  Each trick that must not reach the application is
shown to reach it as soon as the guard is taken out of the rules.
"""

import ipaddress
import itertools
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator

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

pytestmark = pytest.mark.lab

VERSIONS = pytest.mark.parametrize("version", [4, 6])
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
ACCEPTED: list[trio.SocketStream] = []
SYN, RST, ACK = 0x02, 0x04, 0x10
MD5 = (
    b"\x13\x12" + bytes(16) + b"\x01\x01"
)  # a signature (RFC 2385) that nobody expects: such a segment is not answered, not even by a reset
SOURCE_PORTS = itertools.count(20000)  # below those that the kernel chooses


@pytest.fixture
async def close_accepted() -> AsyncIterator[None]:
    """Asked for by the fixture `a`, which every test has: pytest-trio runs what somebody asks for,
    and passes over autouse."""
    yield
    for stream in ACCEPTED:
        stream.socket.close()
    ACCEPTED.clear()


def original_destination(stream: trio.SocketStream) -> tuple[str, int]:
    sock = stream.socket
    if sock.family == socket.AF_INET6:
        raw = sock.getsockopt(socket.IPPROTO_IPV6, 80, 28)
        return str(ipaddress.ip_address(raw[8:24])), struct.unpack_from("!H", raw, 2)[0]
    raw = sock.getsockopt(socket.SOL_IP, 80, 16)
    return str(ipaddress.ip_address(raw[4:8])), struct.unpack_from("!H", raw, 2)[0]


def install(pod: Pod) -> None:
    """What the command does, without starting an interpreter for it; tests of the command and of
    its flags start it."""
    pod.inside(lambda: nftables.apply(exemption()))


async def accept(listener: trio.SocketListener) -> trio.SocketStream:
    with trio.fail_after(30):
        stream = await listener.accept()
    ACCEPTED.append(stream)
    return stream


async def dial_as(pod: Pod, user: User, host: str, port: int) -> bool:
    """Connect from a process of this user; whether it worked."""
    code = (
        "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)"
    )
    return (await pod.run([sys.executable, "-c", code, host, str(port)], user=user)).ok


@pytest.fixture
def a(west: Cluster, close_accepted: None) -> Pod:
    return west.pod("a")


@pytest.fixture
def b(west: Cluster) -> Pod:
    return west.pod("b")


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
    assert not await dial_as(a, APP, b.address(version), 80)  # nobody listens on 4140 in a: refused
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


def segment(
    source: tuple[str, int], target: tuple[str, int], flags: int, options: bytes = b""
) -> bytes:
    """A TCP segment without data, with its checksum."""
    offset = (5 + len(options) // 4) << 4
    head = (
        struct.pack("!HHIIBBHHH", source[1], target[1], 1000, 2000, offset, flags, 1024, 0, 0)
        + options
    )
    addresses = ipaddress.ip_address(source[0]).packed + ipaddress.ip_address(target[0]).packed
    pseudo = addresses + struct.pack("!II", len(head), socket.IPPROTO_TCP)
    total = sum(struct.unpack(f"!{len(pseudo + head) // 2}H", pseudo + head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return head[:16] + struct.pack("!H", checksum) + head[18:]


def send_raw(pod: Pod, target: str, packet: bytes, protocol: int = socket.IPPROTO_TCP) -> None:
    """Send a segment, or with IPPROTO_RAW a whole IPv6 packet."""
    family = socket.AF_INET6 if ipaddress.ip_address(target).version == 6 else socket.AF_INET
    with network.open_socket(pod.netns, family, socket.SOCK_RAW, protocol) as raw:
        raw.sendto(packet, (target, 0))


def send_stray_ack(pod: Pod, port: int, target: tuple[str, int]) -> None:
    """After it, connection tracking at the target believes in a connection that was never opened
    and is not redirected."""
    version = ipaddress.ip_address(target[0]).version
    send_raw(pod, target[0], segment((pod.address(version), port), target, ACK, MD5))


def answer(
    pod: Pod,
    packets: list[bytes],
    source: tuple[str, int],
    target: tuple[str, int],
    protocol: int = socket.IPPROTO_TCP,
) -> int | None:
    """Send packets and say with which flags the target answers; None when it is silent for two
    seconds."""
    version = ipaddress.ip_address(target[0]).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with network.open_socket(pod.netns, family, socket.SOCK_RAW, socket.IPPROTO_TCP) as replies:
        for packet in packets:
            send_raw(pod, target[0], packet, protocol)
        deadline = time.monotonic() + 2
        while True:  # what has come while we were not scheduled counts
            replies.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                reply = replies.recv(2000)
            except TimeoutError:
                return None
            reply = reply if version == 6 else reply[(reply[0] & 15) * 4 :]
            if struct.unpack_from("!HH", reply) == (target[1], source[1]):
                return reply[13] & (SYN | RST | ACK)


async def dial_from(pod: Pod, port: int, target: tuple[str, int]) -> trio.SocketStream:
    """Connect from a chosen source port.  Raises OSError."""
    version = ipaddress.ip_address(target[0]).version
    sock = pod.socket(version)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    await sock.bind((pod.address(version), port))
    with trio.fail_after(30):
        await sock.connect(target)
    return trio.SocketStream(sock)


def nft(pod: Pod, script: str) -> None:
    pod.inside(lambda: nftables.run_nft(script))


@VERSIONS
async def test_a_stray_ack_before_the_syn_opens_no_way_past_the_inbound_proxy(
    a: Pod, b: Pod, version: int
) -> None:
    install(b)
    application, proxy = await b.listen(80, version), await b.listen(4143, version)
    target = (b.address(version), 80)
    port = next(SOURCE_PORTS)
    send_stray_ack(a, port, target)
    with pytest.raises(ConnectionRefusedError):
        await dial_from(a, port, target)
    await dial_from(a, next(SOURCE_PORTS), target)
    assert original_destination(await accept(proxy)) == target

    nft(b, "flush chain inet isthmus guard_input")
    port = next(SOURCE_PORTS)
    send_stray_ack(a, port, target)
    await dial_from(a, port, target)
    await accept(application)


@VERSIONS
async def test_a_stray_ack_from_outside_opens_no_way_past_the_outbound_proxy(
    a: Pod, b: Pod, version: int
) -> None:
    """The application of `a` and its friend at `b` act in concert; the application needs no
    privileges for it."""
    install(a)
    friend, proxy = await b.listen(443, version), await a.listen(4140, version)
    target = (b.address(version), 443)

    async def leave_past_the_proxy() -> None:
        port = next(SOURCE_PORTS)
        waiting = a.socket(version)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await waiting.bind((a.address(version), port))
        waiting.listen()
        send_raw(b, a.address(version), segment(target, (a.address(version), port), ACK, MD5))
        waiting.close()
        await dial_from(a, port, target)

    with pytest.raises(ConnectionRefusedError):
        await leave_past_the_proxy()
    await dial_from(a, next(SOURCE_PORTS), target)
    assert original_destination(await accept(proxy)) == target

    nft(a, "flush chain inet isthmus guard_output")
    await leave_past_the_proxy()
    await accept(friend)


@VERSIONS
async def test_what_connection_tracking_never_sees_is_refused_in_both_directions(
    a: Pod, b: Pod, version: int
) -> None:
    untracked = (
        "table inet theirs {{ chain untracked {{ type filter hook {} priority -300; notrack; }}; }}"
    )
    for pod, hook, guard in ((b, "prerouting", "guard_input"), (a, "output", "guard_output")):
        listener = await b.listen(80, version)
        install(pod)
        nft(pod, untracked.format(hook))
        with pytest.raises(ConnectionRefusedError):
            await a.connect(b.address(version), 80)
        nft(pod, f"flush chain inet isthmus {guard}")
        await a.connect(b.address(version), 80)
        await accept(listener)
        nft(pod, "delete table inet theirs")
        pod.inside(nftables.remove)
        await listener.aclose()


def disguises(
    source: tuple[str, int], target: tuple[str, int]
) -> dict[str, tuple[list[bytes], int]]:
    """First SYNs that the kernel accepts, in various forms, as packets and the protocol of the raw
    socket that sends them."""
    plain = segment(source, target, SYN)
    found = {
        "plain": [plain],
        "urgent, pushed, congestion": [segment(source, target, SYN | 0x08 | 0x20 | 0x40 | 0x80)],
    }
    if ipaddress.ip_address(target[0]).version == 4:
        return {name: (packets, socket.IPPROTO_TCP) for name, packets in found.items()}
    addresses = ipaddress.ip_address(source[0]).packed + ipaddress.ip_address(target[0]).packed

    def packet(first: int, rest: bytes) -> bytes:
        return struct.pack("!IHBB", 6 << 28, len(rest), first, 64) + addresses + rest

    def fragment(following: int, offset: int, more: bool, rest: bytes) -> bytes:
        return struct.pack("!BBHI", following, 0, offset | more, source[1]) + rest

    tcp, options, fragmented = socket.IPPROTO_TCP, 60, 44
    padding = bytes([1, 4, 0, 0, 0, 0])  # PadN: a header of eight bytes that says nothing
    found = {name: [packet(tcp, one) for one in packets] for name, packets in found.items()}
    found["hop-by-hop options"] = [packet(0, bytes([tcp, 0]) + padding + plain)]
    found["destination options, twice"] = [
        packet(options, bytes([options, 0]) + padding + bytes([tcp, 0]) + padding + plain)
    ]
    found["a fragment that is all"] = [packet(fragmented, fragment(tcp, 0, False, plain))]
    longer = segment(source, target, SYN, b"\x01" * 12)
    # Less than the whole TCP header in the first fragment is dropped by newer kernels themselves
    # (RFC 7112).
    found["two fragments"] = [
        packet(fragmented, fragment(tcp, 0, True, longer[:24])),
        packet(fragmented, fragment(tcp, 24, False, longer[24:])),
    ]
    return {name: (packets, socket.IPPROTO_RAW) for name, packets in found.items()}


@VERSIONS
async def test_while_no_proxy_runs_no_form_of_syn_reaches_the_application(
    a: Pod, b: Pod, version: int
) -> None:
    target = (b.address(version), 80)
    await b.listen(80, version)

    def answers(stray_ack: bool) -> dict[str, int | None]:
        result = {}
        for name in disguises((a.address(version), 0), target):
            source = (a.address(version), next(SOURCE_PORTS))
            packets, protocol = disguises(source, target)[name]
            if stray_ack:
                send_stray_ack(a, source[1], target)
            result[name] = answer(a, packets, source, target, protocol)
        return result

    assert set(answers(stray_ack=False).values()) == {SYN | ACK}
    install(b)
    assert set(answers(stray_ack=False).values()) == {RST | ACK}
    assert set(answers(stray_ack=True).values()) == {RST | ACK}
    nft(b, "flush chain inet isthmus guard_input")
    assert SYN | ACK in answers(stray_ack=True).values()


async def test_a_neighbour_reaches_the_application_by_no_link_local_address_but_the_pod_reaches_others(
    a: Pod, b: Pod
) -> None:
    application, proxy = await b.listen(80, 6), await b.listen(4143, 6)
    address = b.inside(
        lambda: subprocess.run(
            ["ip", "-6", "-brief", "address", "show", "dev", "eth0", "scope", "link"],
            capture_output=True,
            text=True,
            check=True,
        )
    )
    target = (
        address.stdout.split()[2].partition("/")[0],
        80,
        0,
        a.inside(lambda: socket.if_nametoindex("eth0")),
    )

    async def dial() -> None:
        sock = a.socket(6)
        with trio.fail_after(30):
            await sock.connect(target)

    install(a)
    await dial()
    await accept(application)
    install(b)
    await dial()
    assert original_destination(await accept(proxy)) == target[:2]


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
