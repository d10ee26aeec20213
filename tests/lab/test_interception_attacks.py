"""Attacks on the interception rules in a real kernel, with crafted packets.

Each attack that must not reach the application does reach it when the guard is removed from the
rules."""

import ipaddress
import itertools
import socket
import struct
import subprocess
import time

import pytest
import trio

from lab import network
from lab.pod import Pod
from proxy.intercept import nftables
from tests.lab.intercepted import VERSIONS, accept, install, original_destination

pytestmark = pytest.mark.lab

SYN, RST, ACK = 0x02, 0x04, 0x10
# A signature (RFC 2385) without a key at the receiver: such a segment is not answered, not even by a
# reset.
MD5 = b"\x13\x12" + bytes(16) + b"\x01\x01"
SOURCE_PORTS = itertools.count(20000)  # below those that the kernel chooses


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
    """After it, connection tracking at the target has a connection that was never opened and is not
    redirected."""
    version = ipaddress.ip_address(target[0]).version
    send_raw(pod, target[0], segment((pod.address(version), port), target, ACK, MD5))


def answer(
    pod: Pod,
    packets: list[bytes],
    source: tuple[str, int],
    target: tuple[str, int],
    protocol: int = socket.IPPROTO_TCP,
) -> int | None:
    """Send packets; returns the flags of the target's response, or None when there is none for two
    seconds."""
    version = ipaddress.ip_address(target[0]).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with network.open_socket(pod.netns, family, socket.SOCK_RAW, socket.IPPROTO_TCP) as replies:
        for packet in packets:
            send_raw(pod, target[0], packet, protocol)
        deadline = time.monotonic() + 2
        while True:  # a response that came while this task was not scheduled counts
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
    """The application of `a` and its accomplice at `b` cooperate. The application needs no
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
    padding = bytes([1, 4, 0, 0, 0, 0])  # PadN: a header of eight bytes without content
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
