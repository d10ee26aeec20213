"""Outbound connections that are not HTTP: they are relayed to an endpoint, byte for byte."""

from __future__ import annotations

from proxy.directory import Endpoint, Target
from proxy.errors import LoopDetected
from proxy.exchange.exchange import ConnectionInfo
from proxy.exchange.prefixed_stream import PrefixedStream
from proxy.exchange.tunnel import open_tunnel
from proxy.flows.late_detection import FOUND_OPAQUE
from proxy.flows.loop_guard import SelfCall
from proxy.flows.runtime import Runtime, closing
from proxy.identity.tls_contexts import ALPN_HTTP1
from proxy.net.relay import SILENT
from proxy.net.socket_stream import Stream
from proxy.telemetry.records import ConnectionAccount
from proxy.wire.sniff import Protocol
from tracing.propagation import header


async def relay_to_endpoint(
    rt: Runtime, target: Target, client: Stream, about: ConnectionInfo, account: ConnectionAccount
) -> Stream | None:
    """Relay `client` to an endpoint. If `about` is unsure and the client turns out to speak HTTP,
    relay nothing, and return the stream to serve, from its first byte."""
    calls: list[SelfCall] = []  # this connection, if it is a call of the pod to itself

    async def connect(target: Target, endpoint: Endpoint) -> Stream:
        about.chosen = target.service
        if not rt.loops.calls_itself(endpoint.address.host):
            return await connect_to_port(rt, target, endpoint, about)
        calls.append(rt.loops.call_self(endpoint.address.port))
        try:
            return await connect_to_port(rt, target, endpoint, about)
        except BaseException:
            calls.pop().end()
            raise

    try:
        async with (
            rt.dispatcher.connection(lambda: rt.router.choose(target), connect) as stream,
            closing(stream) as upstream,
        ):
            with account.upstream(upstream):
                on_bytes = calls[0].end_at_bytes if calls else None
                found = (
                    await rt.detect_late(client, upstream, rt.config.outbound.detect_timeout)
                    if about.unsure
                    else FOUND_OPAQUE
                )
                if found.protocol is not Protocol.OPAQUE:
                    if found.passed:  # a FIN would mean that the data was complete
                        upstream.reset()
                    about.protocol = found.protocol
                    return PrefixedStream(client, found.client_bytes)
                account.relayed(
                    SILENT if found.silent else await rt.relay(client, upstream, about, on_bytes)
                )
        return None
    except LoopDetected:
        rt.loops.stop(about)
        raise
    finally:
        for call in calls:
            call.end()


async def connect_to_port(
    rt: Runtime, target: Target, endpoint: Endpoint, about: ConnectionInfo
) -> Stream:
    """Connect to the target's port at an endpoint, through a tunnel if the endpoint is a
    gateway."""
    remote = target.remote
    if remote is None:
        return await rt.connect_opaque(endpoint, about.depth + 1)
    trace = [header(about.trace.trace_id, about.trace.span_id)] if about.trace is not None else []
    stream = await rt.connect(endpoint, ALPN_HTTP1, about.depth + 1)
    try:
        fields = [*trace, *rt.loops.fields(b"CONNECT", remote.tunnel)]
        return await open_tunnel(
            stream, remote.tunnel, fields, rt.settings.limits, rt.config.clusters.tunnel_timeout
        )
    except BaseException:
        stream.close()
        raise
