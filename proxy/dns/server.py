"""The DNS server: it answers or forwards the queries of the pod's programs.

    a datagram, or a frame of a TCP connection -> which name?
        a service of another cluster   answered here, from the current directory
        any other name                 forwarded unchanged to the resolver that was asked; the
                                       response returns unchanged

Over UDP, each forwarded query has its own socket: the kernel selects its port, and accepts
datagrams from that resolver only. The proxy selects a random id. A response must come from that
address to that port, with that id, and must repeat the question. So an attacker has to guess about
thirty bits. The proxy ignores and counts all other datagrams. Over TCP, each client connection has
its own connection to the resolver. Queries and responses pass in any order, and no other client
shares the connection.

A slow or dead resolver delays only the queries that wait for it: `max_in_flight` small tasks over
UDP, `max_connections` over TCP. A query that has waited for `timeout`, or exceeds the limit, gets
SERVFAIL (over TCP the connection ends). Then the C library asks the next server, or gives up. An
error in one datagram does not affect the others."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import dns.rcode
import trio

from proxy.config.schema_clusters import DnsConfig
from proxy.dns.answers import Answers, Forward, Reply, answers_to, failure
from proxy.errors import LoopDetected
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.datagrams import Sender, ask, receive, send
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed, NetError
from proxy.net.socket_stream import Stream
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus.dns")
_TROUBLES = RateLimit(1)


@dataclass(slots=True)
class DnsServer:
    """Answers and forwards queries. `answers` is replaced with each new directory. `upstreams`: the
    pod's resolvers, at least one."""

    config: DnsConfig
    upstreams: Sequence[Address]
    answers: Answers
    dialer: Dialer
    metrics: Metrics
    in_flight: int = field(default=0, init=False)

    # Datagrams.

    async def serve(self, listen_addresses: Sequence[tuple[socket.socket, Address]]) -> None:
        """Serve the datagrams of these sockets until cancelled. Each socket has its resolver. Owns
        and closes the sockets."""
        try:
            async with trio.open_nursery() as nursery:
                for sock, upstream in listen_addresses:
                    nursery.start_soon(receive, sock, partial(self._take, nursery, sock, upstream))
        finally:
            for sock, _ in listen_addresses:
                sock.close()

    def _take(
        self,
        nursery: trio.Nursery,
        sock: socket.socket,
        upstream: Address,
        wire: bytes,
        client: Sender,
    ) -> None:
        """Handle one datagram: answer it at once, or start a task that forwards it."""
        try:
            judged = self.answers.answer(wire)
            if isinstance(judged, Forward) and self.in_flight >= self.config.max_in_flight:
                warn(
                    _log,
                    _TROUBLES,
                    "%d queries wait for resolvers: refusing more (dns.max_in_flight)",
                    self.in_flight,
                )
                judged = Reply(failure(wire, dns.rcode.SERVFAIL), "overload")
            if isinstance(judged, Forward):
                self.in_flight += 1
                nursery.start_soon(
                    self._pass_on, judged, upstream, wire, partial(send, sock, to=client)
                )
            elif judged is not None:
                send(sock, judged.wire, client)
            self.note("udp", judged)
        except Exception:
            self._failed()

    async def _pass_on(
        self, forward: Forward, upstream: Address, wire: bytes, say: partial[bool]
    ) -> None:
        try:
            say(await self._ask(forward, upstream, wire) or failure(wire, dns.rcode.SERVFAIL))
        except Exception:
            self._failed()
        finally:
            self.in_flight -= 1

    async def _ask(self, forward: Forward, upstream: Address, wire: bytes) -> bytes | None:
        """The resolver's response, with the id of the client's query. None: no response."""
        own_id = secrets.token_bytes(2)
        started = trio.current_time()

        def accept(answer: bytes) -> bool:
            fits = answer[:2] == own_id and answers_to(answer, forward)
            if not fits:
                self.metrics.dns_ignored.at().inc()
            return fits

        with trio.move_on_after(self.config.timeout):
            try:
                with self.dialer.dial_datagrams(upstream) as sock:
                    answer = await ask(sock, upstream, own_id + wire[2:], accept)
            except (ConnectFailed, LoopDetected) as error:
                self.ended("udp", "unreachable", str(error))
                return None
            self.metrics.dns_latency.at().observe(trio.current_time() - started)
            self.ended("udp", "answered")
            return wire[:2] + answer[2:]
        self.ended("udp", "timeout", f"{upstream} did not answer within {self.config.timeout:g} s")
        return None

    # Connections.

    async def converse(self, connection: Connection) -> None:
        """The handler of the TCP listeners' connections."""
        conversation = _Conversation(
            self, connection.stream, connection.original or self.upstreams[0]
        )
        connection.slot.activity = conversation
        try:
            await conversation.run()
        except* NetError:
            pass  # one side is gone; the other side's connection ends

    # Metrics and logs.

    def note(self, transport: str, judged: Reply | Forward | None) -> None:
        """Count a query and its verdict."""
        result = (
            judged.result
            if isinstance(judged, Reply)
            else "dropped"
            if judged is None
            else "forwarded"
        )
        self.metrics.dns_queries.at(transport, result).inc()

    def ended(self, transport: str, result: str, trouble: str = "") -> None:
        """Count the result of a forwarded query, and log `trouble`."""
        self.metrics.dns_upstream.at(transport, result).inc()
        if trouble:
            warn(_log, _TROUBLES, "a DNS query was not answered: %s", trouble)

    def _failed(self) -> None:
        self.metrics.dns_queries.at("udp", "failed").inc()
        _log.exception("a DNS query failed: internal error")


class _Conversation:
    """A client's connection, and the connection to its resolver, which opens on demand.

    One task reads each side. `life` limits the silence: the resolver's while responses are pending,
    otherwise the client's."""

    def __init__(self, resolver: DnsServer, client: Stream, upstream: Address) -> None:
        self._resolver = resolver
        self._client = client
        self._address = upstream
        self._upstream: Stream | None = None
        self._outstanding: set[bytes] = set()  # ids of pending queries
        self._writing = trio.Lock()
        self._answered = trio.lowlevel.ParkingLot()
        self._life = trio.CancelScope()

    @property
    def waiting_since(self) -> float | None:
        """See net.connection_slots.Activity."""
        return (
            None if self._outstanding else self._life.deadline - self._resolver.config.idle_timeout
        )

    async def run(self) -> None:
        """Run until the client has all its responses and has closed its side, or until one side is
        silent for too long. Raises NetError."""
        try:
            with self._life:
                self._alive()
                async with trio.open_nursery() as nursery:
                    questions = _Frames(self._client)
                    while (wire := await questions.next()) is not None:
                        await self._take(wire, nursery)
                    while self._outstanding:
                        await self._answered.park()
                    nursery.cancel_scope.cancel()
            if self._life.cancelled_caught and self._outstanding:
                self._resolver.ended("tcp", "timeout", f"{self._address} is silent over TCP")
        finally:
            if self._upstream is not None:
                self._upstream.close()

    def _alive(self) -> None:
        config = self._resolver.config
        self._life.deadline = trio.current_time() + (
            config.timeout if self._outstanding else config.idle_timeout
        )

    async def _take(self, wire: bytes, nursery: trio.Nursery) -> None:
        judged = self._resolver.answers.answer(wire)
        if isinstance(judged, Forward):
            try:
                await self._pass_on(wire, nursery)
            except (ConnectFailed, LoopDetected) as error:
                self._resolver.ended("tcp", "unreachable", str(error))
                judged = Reply(failure(wire, dns.rcode.SERVFAIL), "unreachable")
        self._resolver.note("tcp", judged)
        if isinstance(judged, Reply):
            await self._say(judged.wire)
        if not self._outstanding:
            self._alive()

    async def _pass_on(self, wire: bytes, nursery: trio.Nursery) -> None:
        if self._upstream is None:
            self._upstream = await self._resolver.dialer.dial(self._address)
            nursery.start_soon(self._answers, self._upstream, nursery.cancel_scope)
        first = not self._outstanding
        self._outstanding.add(wire[:2])
        if first:
            self._alive()
        await self._upstream.send_all(_framed(wire))

    async def _answers(self, upstream: Stream, conversation: trio.CancelScope) -> None:
        """Forward the resolver's messages unchanged. Several messages may answer one query (zone
        transfer)."""
        frames = _Frames(upstream)
        while (answer := await frames.next()) is not None:
            if answer[:2] in self._outstanding:
                self._outstanding.remove(answer[:2])
                self._resolver.ended("tcp", "answered")
            self._alive()
            await self._say(answer)
            self._answered.unpark_all()
        # Resolvers close idle connections. If queries are pending, close the client's connection
        # too.
        upstream.close()
        self._upstream = None
        if self._outstanding:
            self._resolver.ended("tcp", "cut", f"{self._address} closed the connection")
            conversation.cancel()

    async def _say(self, wire: bytes) -> None:
        async with self._writing:
            await self._client.send_all(_framed(wire))


class _Frames:
    """The messages of a stream, each with a length prefix (RFC 1035 §4.2.2)."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._read = bytearray()

    async def next(self) -> bytes | None:
        """The next message. None: the stream has ended, possibly within a message. Raises
        NetError."""
        while True:
            end = 2 + int.from_bytes(self._read[:2], "big")
            if len(self._read) >= max(2, end):
                message = bytes(self._read[2:end])
                del self._read[:end]
                return message
            piece = await self._stream.receive_some()
            if not piece:
                return None
            self._read += piece


def _framed(wire: bytes) -> bytes:
    return len(wire).to_bytes(2, "big") + wire
