"""Opaque connections between sidecars: the inbound side confirms that its application has accepted.

Without this confirmation, the outbound side cannot distinguish an application that does not listen
from one that accepts and closes. It would already have sent bytes, and must not send them to
another endpoint. So if both sides know the ALPN name `ALPN_TCP_CONFIRMED`, the inbound side
connects to its application after the handshake, and sends one of these:

    one byte 0                                    connected; the application's bytes follow
    a reason of errors.py, and the end of TLS     not connected; no byte has been delivered

The outbound side sends nothing before that. This costs one round trip per connection, and nothing
for a protocol in which the server speaks first. To connect before the handshake would cost nothing,
but would let peers without an identity connect to the application. `bytes_read` and `bytes_written`
count the application's bytes only, so they exclude the byte 0."""

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


async def await_confirmation(stream: Stream, timeout: float) -> None:
    """Wait until the peer of `stream` has connected to its application, if ALPN agreed on a
    confirmation. `timeout` in seconds. Raises Undelivered, TunnelRefused, UpstreamTLSError. The
    caller keeps ownership of `stream`."""
    if not _agreed(stream):
        return
    answer = b""
    with trio.move_on_after(timeout) as scope:
        try:
            answer = await stream.receive_some(1)
            if answer == _CONNECTED:
                stream.bytes_read -= len(answer)
                return
            while len(answer) < _LONGEST and (more := await stream.receive_some(_LONGEST)):
                answer += more
        except TLSFailed as error:  # the peer rejects our certificate
            raise UpstreamTLSError(f"mutual TLS with {stream.peer}: {error}", error.kind) from error
        except ConnectionLost as error:
            raise TunnelRefused(
                f"the proxy at {stream.peer} ended the connection before it sent the confirmation:"
                f" {error}"
            ) from error
    reason = "connect_timeout" if scope.cancelled_caught else answer.decode("latin-1")
    if reason in UNDELIVERED:
        raise Undelivered(
            f"the proxy at {stream.peer} could not connect to its application: {reason}", reason
        )
    raise TunnelRefused(
        f"the proxy at {stream.peer} ended the connection before it sent the confirmation"
    )


async def confirm(stream: Stream) -> None:
    """Confirm to the peer of `stream` that the application is connected, if the peer waits for
    that. Raises ConnectionLost."""
    if _agreed(stream):
        await stream.send_all(_CONNECTED)
        stream.bytes_written -= len(_CONNECTED)


async def decline(stream: Stream, error: ConnectFailed) -> None:
    """Report to the peer of `stream` that the connection to the application failed with `error`,
    and end TLS. A lost connection is not an error."""
    if _agreed(stream):
        with suppress(NetError):
            await stream.send_all(describe(error).reason.encode("ascii"))
            await stream.aclose()
