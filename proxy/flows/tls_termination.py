"""Mutual TLS with peers of the mesh: terminate it if the ClientHello asks for a workload."""

from __future__ import annotations

from proxy.exchange.detect import Opening
from proxy.exchange.exchange import ConnectionInfo
from proxy.flows.runtime import Runtime
from proxy.identity.identity import PeerRefused
from proxy.identity.tls_contexts import ALPN_HTTP1, ALPN_HTTP2
from proxy.net.exceptions import NetError, TLSFailed
from proxy.net.memory_budget import TLS_BYTES
from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import tls_server
from proxy.wire.sniff import Protocol

# The protocol inside TLS by ALPN name. The proxy relays every other protocol, and connections
# without ALPN, unchanged.
INNER = {ALPN_HTTP1: Protocol.HTTP1, ALPN_HTTP2: Protocol.HTTP2}


async def terminate(
    rt: Runtime, stream: SocketStream, opening: Opening, about: ConnectionInfo
) -> Stream:
    """Terminate mutual TLS if the ClientHello asks for a workload of the mesh, and record the
    peer's identity in `about`. Any other TLS belongs to the application: returns `stream`
    unchanged. Raises TLSFailed, ConnectionLost.

    A peer that asks for another workload of the trust domain reached the wrong proxy. The proxy
    presents its own certificate, so that the peer rejects it and can report the reason. If the
    proxy passed the handshake on to the application, it would fail without a reason."""
    identity = rt.identity
    if (
        identity is None
        or opening.hello is None
        or not (opening.hello.server_name or "").endswith(f".sa.{identity.id.trust_domain}")
    ):
        return stream
    if about.slot is not None:
        about.slot.speaks()
    trust = rt.expiries.trust
    try:
        tls = await tls_server(
            stream,
            identity.server_context,
            verify=identity.verify_chain,
            timeout=rt.config.tcp.handshake_timeout,
        )
    except PeerRefused as error:
        rt.recorder.tls_failed(about.direction, "certificate")
        raise TLSFailed("certificate", str(error)) from error
    except NetError as error:
        if about.slot is not None and about.slot.evicted:
            raise  # the peer's TLS is not the cause
        rt.recorder.tls_failed(
            about.direction, error.kind if isinstance(error, TLSFailed) else "lost"
        )
        raise
    rt.expiries.watch(tls, trust=trust)
    rt.recorder.tls_established(about.direction, tls.info)
    about.tls, about.identity = tls.info, tls.info.peer_identity
    about.share.admit()
    about.share.charge(TLS_BYTES)
    return tls
