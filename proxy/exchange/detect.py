"""Where wire.sniff meets a stream: what a connection begins with, found by peeking, under one deadline.

Nothing is consumed. So TLS that is for us goes to OpenSSL from its first byte, TLS that is not goes on untouched, and whichever
engine speaks the protocol reads it from its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from trio.lowlevel import checkpoint_if_cancelled

from proxy.net.socket_stream import SocketStream
from proxy.wire.sniff import HELLO_LIMIT, UNDECIDED, UNLIKELY, ClientHello, Protocol, Undecided, client_hello, protocol, settle


@dataclass(frozen=True, slots=True)
class Opening:
    """What a connection begins with. `hello`: its ClientHello, if it begins with one. `how`: for the metrics."""

    protocol: Protocol
    how: str  # "http1", "http2", "tls", "opaque"; "silent": nothing came in time; "closed": it ended without a byte, as probes do
    hello: ClientHello | None = None
    open: bool = False  # what comes later may still show that it is HTTP (flows/late_detection.py)


def _judge(data: bytes) -> Opening | Undecided:
    hello = client_hello(data)
    if isinstance(hello, ClientHello):
        return Opening(Protocol.OPAQUE, "tls", hello)
    if hello is UNDECIDED:
        return UNDECIDED
    verdict = protocol(data)
    if verdict is UNLIKELY:
        return Opening(Protocol.OPAQUE, "opaque", open=True)
    return UNDECIDED if isinstance(verdict, Undecided) else _opening(verdict)


def _opening(verdict: Protocol) -> Opening:
    return Opening(verdict, {Protocol.HTTP1: "http1", Protocol.HTTP2: "http2", Protocol.OPAQUE: "opaque"}[verdict])


async def detect(stream: SocketStream, silence: float, patience: float) -> Opening:
    """What `stream` begins with. A client that says nothing for `silence` seconds speaks a protocol in which the server is first:
    opaque. One that has begun has `patience` seconds to go on, so that a first message in several packets is not taken for something else.

    Raises ConnectionLost.
    """
    await checkpoint_if_cancelled()
    # Mostly all of it is here already, and needs no deadline.
    data = stream.glance(HELLO_LIMIT)
    if data and isinstance(verdict := _judge(data), Opening):
        return verdict
    data = b""
    with trio.move_on_after(silence) as scope:
        while True:
            seen = await stream.peek(HELLO_LIMIT, len(data) + 1)
            if len(seen) == len(data):  # the client ended its side; there will be no more to go by
                return _opening(settle(data)) if data else Opening(Protocol.OPAQUE, "closed")
            if not data:
                scope.deadline = trio.current_time() + patience
            data = seen
            if isinstance(verdict := _judge(data), Opening):
                return verdict
            if len(data) >= HELLO_LIMIT:
                return _opening(settle(data))
    if not data:
        return Opening(Protocol.OPAQUE, "silent", open=True)
    last = settle(data)
    return Opening(last, "opaque", open=True) if last is Protocol.OPAQUE else _opening(last)
