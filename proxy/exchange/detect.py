"""Protocol detection on a stream: peek at the first bytes of a connection, under one deadline, and
classify them with wire.sniff.

Nothing is consumed. So OpenSSL gets TLS that the proxy terminates from its first byte, other TLS is
relayed unchanged, and each protocol engine reads from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from trio.lowlevel import checkpoint_if_cancelled

from proxy.net.socket_stream import SocketStream
from proxy.wire.sniff import (
    HELLO_LIMIT,
    UNDECIDED,
    UNLIKELY,
    ClientHello,
    Protocol,
    Undecided,
    client_hello,
    protocol,
    settle,
)


@dataclass(frozen=True, slots=True)
class Opening:
    """The start of a connection. `hello`: its ClientHello, if it starts with one. `how`: for the
    metrics."""

    protocol: Protocol
    # "http1", "http2", "tls", "opaque"; "silent": no byte in time; "closed": closed without a byte,
    # as probes do
    how: str
    hello: ClientHello | None = None
    open: bool = False  # later bytes may still show that it is HTTP (flows/late_detection.py)


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
    return Opening(
        verdict,
        {Protocol.HTTP1: "http1", Protocol.HTTP2: "http2", Protocol.OPAQUE: "opaque"}[verdict],
    )


async def detect(stream: SocketStream, silence: float, patience: float) -> Opening:
    """Detect the protocol of `stream`. If the client sends nothing for `silence` seconds, it speaks
    a protocol in which the server speaks first: opaque. After its first byte it has `patience`
    seconds more, so that a first message in several packets is not misclassified.

    Raises ConnectionLost.
    """
    await checkpoint_if_cancelled()
    # Usually all bytes have arrived, and no deadline is needed.
    data = stream.glance(HELLO_LIMIT)
    if data and isinstance(verdict := _judge(data), Opening):
        return verdict
    data = b""
    with trio.move_on_after(silence) as scope:
        while True:
            seen = await stream.peek(HELLO_LIMIT, len(data) + 1)
            # the client has ended its direction: no more bytes will follow
            if len(seen) == len(data):
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
