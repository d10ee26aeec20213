"""Queries that are answered, and queries that are forwarded, over real sockets.

Rules: a forwarded query arrives in its own bytes except for the id, and so does the answer. Only
the answer to the question, from the resolver that got it, is accepted. A resolver that is slow,
dead or faulty delays only its own queries, for a bounded time. A flood is bounded. No message stops
the listener."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import pytest
import trio

from proxy.config.schema_clusters import DnsConfig
from proxy.dns.server import DnsServer
from proxy.net.accept import Acceptor, BindFailed, bind, bind_datagrams
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.telemetry.metrics import Metrics
from tests.dns.stage import FOUR, SIX, made
from tests.kit.http import until

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
VERSIONS = pytest.mark.parametrize("version", [4, 6])
NOBODY = Address("127.0.0.1", 1)
PATIENCE = 15.0

Say = Callable[[bytes], Awaitable[None]]


def query(name: str = "www.example.com", kind: str = "A", **more: object) -> bytes:
    return dns.message.make_query(name, kind, **more).to_wire()  # type: ignore[arg-type]


def response(wire: bytes, *texts: str) -> bytes:
    message = dns.message.make_response(dns.message.from_wire(wire))
    message.answer += [
        dns.rrset.from_text(message.question[0].name, 60, "IN", message.question[0].rdtype, text)
        for text in texts
    ]
    return message.to_wire()


def framed(wire: bytes) -> bytes:
    return len(wire).to_bytes(2, "big") + wire


@dataclass
class Upstream:
    """A scripted resolver: `answer` gets each query and a function that sends to its client."""

    address: Address
    answer: Callable[[bytes, Say], Awaitable[None]]
    asked: list[bytes] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    connections: int = 0


@dataclass
class Setup:
    """The proxy's DNS server, its clients' sockets, and what it has counted."""

    resolver: DnsServer
    metrics: Metrics
    udp: Address
    tcp: Address
    nursery: trio.Nursery

    def count(self, family: str, **labels: str) -> float:
        found = 0.0
        for line in self.metrics.render().decode().splitlines():
            if line.startswith(f"isthmus_{family}") and all(
                f'{name}="{value}"' in line for name, value in labels.items()
            ):
                found += float(line.rpartition(" ")[2])
        return found

    async def until(self, count: int, family: str, **labels: str) -> None:
        await until(lambda: self.count(family, **labels) >= count, PATIENCE)

    def client(self) -> trio.socket.SocketType:
        return trio.socket.socket(
            socket.AF_INET6 if self.udp.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM
        )

    async def ask(self, wire: bytes) -> dns.message.Message:
        """Over UDP, as a client with a connected socket does it."""
        with self.client() as sock, trio.fail_after(PATIENCE):
            await sock.connect((self.udp.host, self.udp.port))
            await sock.send(wire)
            return dns.message.from_wire(await sock.recv(65535))


async def echo_answer(wire: bytes, say: Say) -> None:
    await say(response(wire, "192.0.2.7"))


def both(version: int) -> tuple[trio.socket.SocketType, trio.SocketListener]:
    """A UDP socket and a TCP listener on one port, as resolvers have them."""
    while True:
        datagrams = bind_datagrams(Address(LOOPBACK[version], 0))
        try:
            listener = bind(Address.of(datagrams.getsockname()))
        except BindFailed:  # another program has this TCP port: take another one
            datagrams.close()
            continue
        return trio.socket.from_stdlib_socket(datagrams), trio.SocketListener(
            trio.socket.from_stdlib_socket(listener)
        )


@asynccontextmanager
async def upstream(
    answer: Callable[[bytes, Say], Awaitable[None]] = echo_answer, version: int = 4
) -> AsyncIterator[Upstream]:
    udp, listener = both(version)
    found = Upstream(Address.of(udp.getsockname()), answer)

    async def datagrams() -> None:
        while True:
            wire, client = await udp.recvfrom(65535)
            found.asked.append(wire)
            found.ports.append(client[1])

            async def say(data: bytes, client: Any = client) -> None:
                await udp.sendto(data, client)

            nursery.start_soon(answer, wire, say)

    async def connection(stream: trio.SocketStream) -> None:
        found.connections += 1
        read = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for piece in stream:
                read += piece
                while len(read) >= 2 and len(read) >= 2 + int.from_bytes(read[:2], "big"):
                    size = int.from_bytes(read[:2], "big")
                    wire, read = read[2 : 2 + size], read[2 + size :]
                    found.asked.append(wire)

                    async def say(data: bytes) -> None:
                        if data:
                            await stream.send_all(framed(data))
                        else:
                            await stream.aclose()

                    await answer(wire, say)

    async def connections() -> None:
        await trio.serve_listeners(connection, [listener])

    with udp:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(datagrams)
            nursery.start_soon(connections)
            yield found
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(to: Address, version: int = 4, **settings: float) -> AsyncIterator[Setup]:
    config = DnsConfig(**{"timeout": 30.0, **settings})  # type: ignore[arg-type]
    metrics = Metrics()
    resolver = DnsServer(config, (to,), made(), Dialer(timeout=5.0), metrics)
    sock, listener = (
        bind_datagrams(Address(LOOPBACK[version], 0)),
        bind(Address(LOOPBACK[version], 0)),
    )
    errors: list[BaseException] = []
    acceptor = Acceptor(
        resolver.converse,
        limit=config.max_connections,
        on_error=lambda _, error: errors.append(error),
    )

    async def datagrams() -> None:
        await resolver.serve([(sock, to)])

    async def connections() -> None:
        await acceptor.serve([listener])

    async with trio.open_nursery() as nursery:  # the sockets are bound already, so nothing is lost
        nursery.start_soon(datagrams)
        nursery.start_soon(connections)
        yield Setup(
            resolver,
            metrics,
            Address.of(sock.getsockname()),
            Address.of(listener.getsockname()),
            nursery,
        )
        nursery.cancel_scope.cancel()
    assert not errors


@asynccontextmanager
async def connected(setup: Setup) -> AsyncIterator[trio.SocketStream]:
    stream = await trio.open_tcp_stream(setup.tcp.host, setup.tcp.port)
    async with stream:
        yield stream


async def frame(stream: trio.SocketStream) -> bytes | None:
    """The next message; None at the end."""
    with trio.fail_after(PATIENCE):
        read = b""
        while len(read) < 2 or len(read) < 2 + int.from_bytes(read[:2], "big"):
            want = (
                2 - len(read) if len(read) < 2 else 2 + int.from_bytes(read[:2], "big") - len(read)
            )
            piece = await stream.receive_some(want)
            if not piece:
                return None
            read += piece
        return read[2:]


# Over UDP...


@VERSIONS
async def test_names_of_other_clusters_are_answered_without_a_resolver(version: int) -> None:
    async with running(NOBODY, version) as setup:
        answer = await setup.ask(query("c.east.default.svc.cluster.local"))
        assert answer.answer[0][0].to_text() == FOUR
        answer = await setup.ask(query("c.east", "AAAA"))
        assert answer.answer[0][0].to_text() == SIX
        assert (await setup.ask(query("gone.east"))).rcode() == dns.rcode.NXDOMAIN
        assert setup.count("dns_queries_total", transport="udp", result="answered") == 2
        assert setup.count("dns_queries_total", transport="udp", result="nxdomain") == 1


@VERSIONS
async def test_all_else_is_passed_on_in_its_own_bytes_with_an_id_of_our_own_and_a_port_drawn_anew(
    version: int,
) -> None:
    odd = b"\0\0\x29\x04\xd0\0\0\x80\0\0\x0b\xfd\xe9\0\x07strange"  # an unknown option
    async with upstream(version=version) as there, running(there.address, version) as setup:
        wires = [query(f"n{number}.example.com") for number in range(20)]
        wires.append(wires[0][:10] + b"\0\1" + wires[0][12:] + odd)
        for wire in wires:
            assert (await setup.ask(wire)).id == int.from_bytes(wire[:2], "big")
        assert [wire[2:] for wire in there.asked] == [wire[2:] for wire in wires]
        assert sum(one[:2] == other[:2] for one, other in zip(there.asked, wires, strict=True)) <= 2
        assert len(set(there.ports)) > 10
        assert setup.count("dns_upstream_total", transport="udp", result="answered") == 21


async def test_the_answer_comes_back_in_its_own_bytes() -> None:
    tail = b"\xff" * 900 + b"whatever a resolver may say"

    async def strange(wire: bytes, say: Say) -> None:
        await say(response(wire, "192.0.2.1") + tail)

    async with upstream(strange) as there, running(there.address) as setup:
        with setup.client() as sock, trio.fail_after(PATIENCE):
            wire = query()
            await sock.sendto(wire, (setup.udp.host, setup.udp.port))
            answer = await sock.recv(65535)
        assert answer == response(wire, "192.0.2.1") + tail


async def test_a_truncated_answer_is_passed_on_and_the_whole_one_comes_over_tcp() -> None:
    async def cut(wire: bytes, say: Say) -> None:
        if not there.connections:
            message = dns.message.from_wire(response(wire))
            message.flags |= dns.flags.TC
            await say(message.to_wire())
        else:
            await say(response(wire, *(f"192.0.2.{number}" for number in range(200))))

    async with upstream(cut) as there, running(there.address) as setup:
        assert (await setup.ask(query())).flags & dns.flags.TC
        async with connected(setup) as stream:
            await stream.send_all(framed(query()))
            answer = await frame(stream)
            assert answer is not None
            assert len(dns.message.from_wire(answer).answer[0]) == 200


async def test_forged_answers_are_ignored_and_the_true_one_is_taken() -> None:
    async def surrounded(wire: bytes, say: Say) -> None:
        true = response(wire, "192.0.2.7")
        await say(bytes([true[0] ^ 1]) + true[1:])  # another id
        await say(response(query("www.example.org"), "192.0.2.66"))
        await say(
            wire[:2] + response(query("www.example.org"), "192.0.2.66")[2:]
        )  # another question
        await say(wire)  # a question
        await say(b"")
        await say(true[:11])
        with trio.socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as stranger:  # right except for its source
            await stranger.sendto(response(wire, "192.0.2.66"), ("127.0.0.1", there.ports[-1]))
        await say(true)

    async with upstream(surrounded) as there, running(there.address) as setup:
        answer = await setup.ask(query())
        assert answer.answer[0][0].to_text() == "192.0.2.7"
        assert setup.count("dns_ignored_datagrams_total") == 6


async def test_two_clients_that_ask_with_the_same_id_get_each_their_own_answer() -> None:
    gate = trio.Event()

    async def late(wire: bytes, say: Say) -> None:
        if b"slow" in wire:
            await gate.wait()
        await say(response(wire, "192.0.2.1" if b"slow" in wire else "192.0.2.2"))

    async with upstream(late) as there, running(there.address) as setup:
        found: dict[str, str] = {}

        async def one(name: str) -> None:
            found[name] = (await setup.ask(b"\1\1" + query(name)[2:])).answer[0][0].to_text()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "slow.example.com")
            await setup.until(1, "dns_queries_total", result="forwarded")
            await one("fast.example.com")
            gate.set()
        assert found == {"slow.example.com": "192.0.2.1", "fast.example.com": "192.0.2.2"}


async def silent(_: bytes, __: Say) -> None:
    await trio.sleep_forever()


async def test_a_query_that_waits_too_long_for_a_resolver_fails() -> None:
    async with upstream(silent) as there, running(there.address, timeout=0.1) as setup:
        answer = await setup.ask(query())
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert setup.count("dns_upstream_total", transport="udp", result="timeout") == 1
        assert setup.resolver.in_flight == 0


async def test_a_resolver_that_is_not_there_is_noticed_at_once() -> None:
    async with running(NOBODY) as setup:
        assert (await setup.ask(query(use_edns=0))).rcode() == dns.rcode.SERVFAIL
        assert setup.count("dns_upstream_total", transport="udp", result="unreachable") == 1


async def test_a_flood_of_queries_is_bounded_and_mesh_names_are_still_answered() -> None:
    async with upstream(silent) as there, running(there.address, max_in_flight=5) as setup:
        with setup.client() as sock:
            for number in range(50):
                await sock.sendto(query(f"n{number}.example.com"), (setup.udp.host, setup.udp.port))
            await setup.until(45, "dns_queries_total", transport="udp", result="overload")
            codes = [dns.message.from_wire(await sock.recv(65535)).rcode() for _ in range(45)]
        assert set(codes) == {dns.rcode.SERVFAIL}
        assert setup.resolver.in_flight == 5
        assert (await setup.ask(query("c.east"))).answer[0][0].to_text() == FOUR
        assert len(there.asked) == 5


async def test_garbage_is_survived() -> None:
    async with running(NOBODY) as setup:
        with setup.client() as sock:
            for wire in (
                b"",
                b"x",
                b"\0" * 11,
                b"\xff" * 600,
                query()[:20],
                b"\0\0\x80\0" + query()[4:],
                b"\0" * 65000,
            ):
                await sock.sendto(wire, (setup.udp.host, setup.udp.port))
        assert (await setup.ask(query("c.east"))).answer[0][0].to_text() == FOUR


# Over TCP...


async def test_pipelined_questions_are_answered_in_whatever_order_they_are_ready() -> None:
    async def late(wire: bytes, say: Say) -> None:
        if b"second" in wire:
            await say(response(wire, "192.0.2.2"))
            await say(response(there.asked[0], "192.0.2.1"))

    async with upstream(late) as there, running(there.address) as setup, connected(setup) as stream:
        wires = [query("first.example.com"), query("second.example.com"), query("c.east")]
        for byte in b"".join(map(framed, wires)):  # byte by byte
            await stream.send_all(bytes([byte]))
        await stream.send_eof()
        answers = {}
        while (wire := await frame(stream)) is not None:
            message = dns.message.from_wire(wire)
            answers[message.id] = message.answer[0][0].to_text()
        assert answers == dict(
            zip(
                (int.from_bytes(wire[:2], "big") for wire in wires),
                ("192.0.2.1", "192.0.2.2", FOUR),
                strict=True,
            )
        )
        assert there.connections == 1
        assert there.asked == wires[:2]


async def test_a_transfer_of_many_messages_comes_through() -> None:
    async def transfer(wire: bytes, say: Say) -> None:
        for number in range(5):
            await say(response(wire, f"192.0.2.{number}"))

    async with (
        upstream(transfer) as there,
        running(there.address) as setup,
        connected(setup) as stream,
    ):
        await stream.send_all(framed(query()))
        found = [await frame(stream) for _ in range(5)]
        assert [dns.message.from_wire(wire or b"").answer[0][0].to_text() for wire in found] == [
            f"192.0.2.{n}" for n in range(5)
        ]


async def test_a_resolver_that_closes_idle_connections_is_dialled_again() -> None:
    async def once(wire: bytes, say: Say) -> None:
        await say(response(wire, "192.0.2.1"))
        await say(b"")

    async with upstream(once) as there, running(there.address) as setup, connected(setup) as stream:
        for _ in range(3):
            await stream.send_all(framed(query()))
            assert await frame(stream)
            await trio.testing.wait_all_tasks_blocked(
                0.05
            )  # the end of the connection has been seen
        assert there.connections == 3


@pytest.mark.parametrize("answer", [silent, "close"])
async def test_a_resolver_that_owes_an_answer_is_not_waited_for_for_ever(answer: object) -> None:
    async def close(_: bytes, say: Say) -> None:
        await say(b"")

    script = close if answer == "close" else silent
    async with (
        upstream(script) as there,
        running(there.address, timeout=0.2) as setup,
        connected(setup) as stream,
    ):
        await stream.send_all(framed(query()))
        with suppress(trio.BrokenResourceError):
            assert await frame(stream) is None
        await setup.until(
            1,
            "dns_upstream_total",
            transport="tcp",
            result="cut" if answer == "close" else "timeout",
        )


async def test_a_resolver_that_refuses_connections_is_reported_and_the_connection_stays() -> None:
    async with running(NOBODY) as setup, connected(setup) as stream:
        await stream.send_all(framed(query()))
        answer = await frame(stream)
        assert answer is not None
        assert dns.message.from_wire(answer).rcode() == dns.rcode.SERVFAIL
        await stream.send_all(framed(query("c.east")))
        answer = await frame(stream)
        assert answer is not None
        assert dns.message.from_wire(answer).answer[0][0].to_text() == FOUR


async def test_a_silent_client_and_half_a_message_do_not_hold_a_connection() -> None:
    async with running(NOBODY, idle_timeout=0.2) as setup:
        async with connected(setup) as stream:
            assert await frame(stream) is None
        async with connected(setup) as stream:
            await stream.send_all(framed(query())[:7])
            assert await frame(stream) is None
        async with connected(setup) as stream:
            await stream.send_all(framed(query())[:7])
            await stream.send_eof()
            assert await frame(stream) is None


async def test_a_client_that_goes_takes_the_connection_to_its_resolver_with_it() -> None:
    gone = trio.Event()

    async def held(_: bytes, say: Say) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await say(b"x" * 60000)
        gone.set()

    async with upstream(held) as there, running(there.address) as setup:
        async with connected(setup) as stream:
            await stream.send_all(framed(query()))
            assert await frame(stream)
        with trio.fail_after(PATIENCE):
            await gone.wait()
        assert there.connections == 1
