"""Inbound connections that are not HTTP: they are relayed to the application, byte for byte."""

from __future__ import annotations

from proxy.errors import RequestError
from proxy.exchange.exchange import ConnectionInfo
from proxy.exchange.prefixed_stream import PrefixedStream
from proxy.flows.confirmation import confirm, decline
from proxy.flows.late_detection import FOUND_OPAQUE
from proxy.flows.runtime import Runtime, closing
from proxy.flows.upstreams import Pools
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed
from proxy.net.relay import SILENT
from proxy.net.socket_stream import Stream
from proxy.telemetry.records import ConnectionAccount
from proxy.wire.sniff import Protocol


async def relay_to_application(
    rt: Runtime,
    stream: Stream,
    about: ConnectionInfo,
    account: ConnectionAccount,
    pools: Pools[Address],
) -> Stream | None:
    """Relay `stream` to the application. Raises RequestError on a port for HTTP only.

    An application may rely on a header that this proxy sets (the identity of the caller). So bytes
    that have not been inspected must not reach it. A peer selects the protocol by ALPN, and a
    client without TLS by its first bytes. Therefore, if the port is not declared opaque (`about` is
    unsure), this function inspects the bytes, those of a tunnel too. If they are HTTP, it relays
    nothing, and returns the stream to serve, from its first byte. It keeps the connection to the
    application for the first request if no byte has passed on it. Some applications open a
    connection to another service for each that they accept, and a second connection would double
    these."""
    if about.destination.port in rt.config.inbound.http_ports:
        raise RequestError(
            f"port {about.destination.port} accepts only HTTP (inbound.http_ports), and this"
            " connection is not HTTP"
        )
    owner = closing(await dial_application(rt, stream, about))
    async with owner as application:
        await confirm(stream)
        with account.upstream(application) as opened:
            found = (
                await rt.detect_late(stream, application, rt.config.inbound.detect_timeout)
                if about.unsure
                else FOUND_OPAQUE
            )
            if found.protocol is Protocol.OPAQUE:
                account.relayed(
                    SILENT if found.silent else await rt.relay(stream, application, about)
                )
                return None
            about.protocol, about.unnamed = found.protocol, True
            if (
                found.protocol is Protocol.HTTP1 and found.untouched and not about.depth
            ):  # the pool keeps connections of depth 1 only
                pools.adopt(about.destination, application, opened.handed_over())
                owner.release()
            elif found.passed:  # a FIN would mean that the data was complete
                application.reset()
            return PrefixedStream(stream, found.client_bytes)


async def dial_application(rt: Runtime, stream: Stream, about: ConnectionInfo) -> Stream:
    """Connect to the application. If that fails, report it to the peer of `stream`, and raise the
    dialler's error."""
    failure: ConnectFailed | None = None
    try:
        return await rt.dialer.dial(about.destination, about.depth + 1)
    except ConnectFailed as error:
        failure = error
    await decline(stream, failure)
    raise failure
