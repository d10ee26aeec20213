"""Connections that the proxy relays before it is certain that they are not HTTP.

A silent client may wait for the server to speak. A client whose first bytes match no request line
speaks another protocol. The proxy connects both to the server. But an HTTP client may be silent for
a while too, and some servers ignore bytes before a request line. If the proxy relayed such a client
without inspection, the client could send the server anything, for example fields that only a proxy
may set. So in both cases this module inspects the client's bytes until there is a verdict
(wire/sniff.py):

    the server speaks first     not HTTP: relay
    the client sends HTTP       serve it as HTTP, from its first byte; close the connection to the
                                server, or use it for HTTP if no byte has passed on it
    the client sends other      relay

This delays only bytes that may be the start of a request, and those by at most `patience`
seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf

import trio

from proxy.net.exceptions import NetError
from proxy.net.socket_stream import RECEIVE_SIZE, Stream
from proxy.wire.sniff import (
    LINE_LIMIT,
    LONGEST_LINE,
    UNDECIDED,
    Protocol,
    condensed,
    protocol,
    settle,
)


@dataclass(frozen=True, slots=True)
class Found:
    """The verdict. `client_bytes`: all bytes from the client if it is HTTP, of which the server has
    received `passed` bytes. For other protocols all bytes have been forwarded. For a malformed and
    very long request line, `client_bytes` is the beginning and a line feed, which is enough to
    reject it. `silent`: neither side sent anything for too long. `untouched`: no byte was sent to
    the server, and neither a byte nor an EOF was read from it."""

    protocol: Protocol
    client_bytes: bytes = b""
    passed: int = 0
    silent: bool = False
    untouched: bool = False


FOUND_OPAQUE = Found(Protocol.OPAQUE)


async def detect_late(client: Stream, server: Stream, *, patience: float, idle: float) -> Found:
    """Forward bytes between `client` and `server` until the client's protocol is known. Times in
    seconds. Raises NetError if a connection is lost. The caller keeps ownership of both streams.
    They are reset if this function raises or the idle time ends."""
    watch = _Watch(client, server, patience)
    clean = False
    try:
        with trio.move_on_after(idle) as scope:
            await watch.run()
        if watch.failure is not None:
            raise watch.failure
        clean = not scope.cancelled_caught
        untouched = not (watch.passed or watch.server_active)
        return Found(
            watch.verdict or Protocol.OPAQUE,
            watch.client_bytes,
            watch.passed,
            silent=scope.cancelled_caught,
            untouched=untouched,
        )
    finally:
        if not clean:
            client.reset()
            server.reset()


class _Watch:
    """Two tasks, one per side. Only waits for data to read are ever cancelled, so no byte is
    lost."""

    def __init__(self, client: Stream, server: Stream, patience: float) -> None:
        self._client = client
        self._server = server
        self._patience = patience
        self.passed = 0  # bytes of `client_bytes` that the server has
        self._asking, self._hearing = trio.CancelScope(), trio.CancelScope()
        self.client_bytes = b""
        self._came = 0  # bytes from the client
        self.server_active = False  # data or EOF from the server
        self.verdict: Protocol | None = None
        self.failure: NetError | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for side in (self._listen, self._ask):
                nursery.start_soon(self._guarded, side, nursery)

    async def _guarded(self, side: Callable[[], Awaitable[None]], nursery: trio.Nursery) -> None:
        try:
            await side()
        except NetError as error:
            self.failure = self.failure or error
            nursery.cancel_scope.cancel()

    def _decide(self, verdict: Protocol) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._asking.cancel()
            self._hearing.cancel()

    async def _listen(self) -> None:
        """Read the server's first bytes, or its EOF."""
        data = b""
        with self._hearing:
            data = await self._server.receive_some(RECEIVE_SIZE)
            self.server_active = True
        if self.verdict is None or self.verdict is Protocol.OPAQUE:
            self._decide(Protocol.OPAQUE)
            if data:
                await self._client.send_all(data)

    async def _ask(self) -> None:
        """Read from the client until its protocol is clear."""
        until, waits = inf, True
        while self.verdict is None:
            data = None
            with self._asking, trio.move_on_at(until):
                data = await self._client.receive_some(RECEIVE_SIZE)
            self._asking = trio.CancelScope()
            if data:
                self.client_bytes += data
                self._came += len(data)
                found = protocol(self.client_bytes)
                if isinstance(found, Protocol):
                    self._decide(found)
                elif self._came >= LONGEST_LINE:
                    self._decide(Protocol.OPAQUE)
                elif found is UNDECIDED and waits:
                    until = min(until, trio.current_time() + self._patience)
                    continue
            elif data is not None:
                self._decide(settle(self.client_bytes))
            if self.verdict is None:  # HTTP is unlikely, or the wait was long enough
                waits, until = waits and data is not None, inf
                await self._pass_on()
                if (
                    len(self.client_bytes) > LINE_LIMIT
                ):  # do not keep it: many clients may start like this
                    self.client_bytes = condensed(self.client_bytes)
                    self.passed = len(self.client_bytes)
        if self.verdict is Protocol.OPAQUE:
            await self._pass_on()
        elif self._came > len(self.client_bytes):
            self.client_bytes = self.client_bytes[:LINE_LIMIT] + b"\r\n"

    async def _pass_on(self) -> None:
        data, self.passed = self.client_bytes[self.passed :], len(self.client_bytes)
        if data:
            await self._server.send_all(data)
