"""Connections that are relayed byte for byte although it is not certain yet that they are not HTTP.

A client that says nothing may wait for the server to speak, and one whose first bytes fit no request line speaks another protocol. Both are
connected to the server. But an HTTP client may be silent for a while too, and some servers overlook what stands before a request line. If
such a client were relayed for good, it could send the server anything: fields that only a proxy may set, among others. So what the client
says is looked at until there is a verdict (wire/sniff.py), in both cases:

    the server speaks first     it is no HTTP: relay
    the client says HTTP        serve it as HTTP, from its first byte; the server's connection is closed, or used for it if it is as new
    the client says other       relay

Nothing is delayed by this but the beginning of what may well be a request, and that for `patience` seconds at most.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf

import trio

from proxy.net.exceptions import NetError
from proxy.net.socket_stream import RECEIVE_SIZE, Stream
from proxy.wire.sniff import LINE_LIMIT, LONGEST_LINE, UNDECIDED, Protocol, condensed, protocol, settle


@dataclass(frozen=True, slots=True)
class Found:
    """What it is. `said`: all that the client has said, if it is HTTP, of which the server has got `passed` bytes; otherwise everything has
    been passed on. Of a request line that is malformed and very long, `said` is the beginning, and a line feed: enough to refuse it.
    `silent`: neither side has said anything for too long. `untouched`: nothing has been sent to the server or read from it, not even its
    end."""

    protocol: Protocol
    said: bytes = b""
    passed: int = 0
    silent: bool = False
    untouched: bool = False


FOUND_OPAQUE = Found(Protocol.OPAQUE)


async def look(client: Stream, server: Stream, *, patience: float, idle: float) -> Found:
    """Join `client` and `server` until it is known what the client speaks. Times in seconds. Raises what is lost with it; both streams
    stay with their owners, and are reset in that case."""
    watch = _Watch(client, server, patience)
    clean = False
    try:
        with trio.move_on_after(idle) as scope:
            await watch.run()
        if watch.failure is not None:
            raise watch.failure
        clean = not scope.cancelled_caught
        untouched = not (watch.passed or watch.heard)
        return Found(watch.verdict or Protocol.OPAQUE, watch.said, watch.passed, silent=scope.cancelled_caught, untouched=untouched)
    finally:
        if not clean:
            client.reset()
            server.reset()


class _Watch:
    """Two tasks, one for each side. Only their waits for something to read are ever cancelled, so nothing is torn or lost."""

    def __init__(self, client: Stream, server: Stream, patience: float) -> None:
        self._client = client
        self._server = server
        self._patience = patience
        self.passed = 0  # bytes of `said` that the server has
        self._asking, self._hearing = trio.CancelScope(), trio.CancelScope()
        self.said = b""
        self._came = 0  # bytes from the client
        self.heard = False  # anything of the server, or its end
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
        """The server's first bytes, or its end."""
        data = b""
        with self._hearing:
            data = await self._server.receive_some(RECEIVE_SIZE)
            self.heard = True
        if self.verdict is None or self.verdict is Protocol.OPAQUE:
            self._decide(Protocol.OPAQUE)
            if data:
                await self._client.send_all(data)

    async def _ask(self) -> None:
        """What the client says, until it is clear."""
        until, waits = inf, True
        while self.verdict is None:
            data = None
            with self._asking, trio.move_on_at(until):
                data = await self._client.receive_some(RECEIVE_SIZE)
            self._asking = trio.CancelScope()
            if data:
                self.said += data
                self._came += len(data)
                found = protocol(self.said)
                if isinstance(found, Protocol):
                    self._decide(found)
                elif self._came >= LONGEST_LINE:
                    self._decide(Protocol.OPAQUE)
                elif found is UNDECIDED and waits:
                    until = min(until, trio.current_time() + self._patience)
                    continue
            elif data is not None:
                self._decide(settle(self.said))
            if self.verdict is None:  # it is unlikely, or has been waited for long enough
                waits, until = waits and data is not None, inf
                await self._pass_on()
                if len(self.said) > LINE_LIMIT:  # it is not kept: many clients may begin so
                    self.said = condensed(self.said)
                    self.passed = len(self.said)
        if self.verdict is Protocol.OPAQUE:
            await self._pass_on()
        elif self._came > len(self.said):
            self.said = self.said[:LINE_LIMIT] + b"\r\n"

    async def _pass_on(self) -> None:
        data, self.passed = self.said[self.passed :], len(self.said)
        if data:
            await self._server.send_all(data)
