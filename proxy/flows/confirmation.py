"""Opaque connections between sidecars: the inbound side says first whether it has connected to its application.

Without that, the outbound side cannot tell an application that does not listen from one that accepts and closes: it has bytes under way
already, and may not send them to another endpoint. So where both sides know the ALPN name `ALPN_TCP_CONFIRMED`, the inbound side dials its
application behind the handshake, and sends one of

    one byte 0                                    it is connected; the application's bytes follow
    a reason of errors.py, and the end of TLS     it is not: nothing has been delivered

The outbound side sends nothing before. That costs one round trip for each connection, and nothing for a protocol in which the server speaks
first. To dial before the handshake would cost none, but would let peers without an identity connect to the application. The byte 0 is not
counted in `bytes_read` and `bytes_written`, which are the application's bytes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TypeGuard

import trio

from proxy.errors import UNDELIVERED, TunnelRefused, Undelivered, UpstreamTLSError, describe
from proxy.identity.tls_contexts import ALPN_TCP_CONFIRMED
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError, TLSFailed
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream

_CONNECTED = b"\0"
_LONGEST = 64  # bytes of a reason


def _agreed(stream: Stream) -> TypeGuard[TLSStream]:
    return isinstance(stream, TLSStream) and stream.info.alpn == ALPN_TCP_CONFIRMED


async def confirmed(stream: Stream, timeout: float) -> None:
    """Wait until the peer of `stream` has connected to its application, if it says so. `timeout` in seconds. Raises Undelivered,
    TunnelRefused, UpstreamTLSError; `stream` stays with its owner."""
    if not _agreed(stream):
        return
    said = b""
    with trio.move_on_after(timeout) as scope:
        try:
            said = await stream.receive_some(1)
            if said == _CONNECTED:
                stream.bytes_read -= len(said)
                return
            while len(said) < _LONGEST and (more := await stream.receive_some(_LONGEST)):
                said += more
        except TLSFailed as error:  # it refuses our certificate
            raise UpstreamTLSError(f"mutual TLS with {stream.peer}: {error}", error.kind) from error
        except ConnectionLost as error:
            raise TunnelRefused(f"the proxy at {stream.peer} ended the connection before it said that it is connected: {error}") from error
    reason = "connect_timeout" if scope.cancelled_caught else said.decode("latin-1")
    if reason in UNDELIVERED:
        raise Undelivered(f"the proxy at {stream.peer} could not connect to its application: {reason}", reason)
    raise TunnelRefused(f"the proxy at {stream.peer} ended the connection before it said that it is connected")


async def confirm(stream: Stream) -> None:
    """Tell the peer of `stream`, if it waits for that, that the application is connected. Raises ConnectionLost."""
    if _agreed(stream):
        await stream.send_all(_CONNECTED)
        stream.bytes_written -= len(_CONNECTED)


async def decline(stream: Stream, error: ConnectFailed) -> None:
    """Tell it that the application could not be connected to, because of `error`, and end TLS. A lost connection is no error."""
    if _agreed(stream):
        with suppress(NetError):
            await stream.send_all(describe(error).reason.encode("ascii"))
            await stream.aclose()
