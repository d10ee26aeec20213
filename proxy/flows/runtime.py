"""What every flow is given: one object instead of nine parameters, and the few steps that both directions share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType

import trio

from proxy.balancing.balancer import Balancer
from proxy.config.load import Config
from proxy.directory import Endpoint, Former
from proxy.directory.former_identities import FormerIdentities
from proxy.errors import UpstreamTLSError
from proxy.exchange.client import ClientSettings
from proxy.exchange.exchange import Exchange, Facts
from proxy.exchange.h1.pool import PoolSettings
from proxy.exchange.h1.server import Drain, ServerSettings
from proxy.exchange.h2.reset_pacing import ResetPace
from proxy.exchange.h2.settings import MuxSettings
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.fastpath.fast_path import FastPath
from proxy.flows.confirmation import confirmed
from proxy.flows.late_detection import Found, look
from proxy.flows.loop_guard import LoopGuard
from proxy.identity.identity import Identity, PeerRefused
from proxy.identity.tls_contexts import ALPN_TCP, ALPN_TCP_CONFIRMED, KeptSession
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectionLost, TLSFailed
from proxy.net.pacing import Pacer
from proxy.net.relay import Joint, Relayed, relay
from proxy.net.socket_stream import Stream
from proxy.net.tls.expiry import Expiries
from proxy.net.tls.handshake import TLSOffer, tls_client
from proxy.routing.dispatch import Dispatcher
from proxy.routing.router import Router, Source
from proxy.telemetry.records import Ledger
from proxy.telemetry.tracing_setup import Spans
from proxy.wire.h2.events import Http2Limits
from proxy.wire.messages import Limits

# Seconds that a client without an identity has to answer the PING that follows our GOAWAY.
_PLAIN_LAST_CALL = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The parts of the configuration in the words of the rooms that they are for."""

    server: ServerSettings
    plain_server: ServerSettings  # for peers from outside of the pod that have shown no identity
    client: ClientSettings
    pool: PoolSettings
    limits: Limits
    downstream: MuxSettings  # of HTTP/2 connections from clients
    plain_downstream: MuxSettings  # and from those peers
    upstream: MuxSettings  # and to servers

    @classmethod
    def of(cls, config: Config, pacer: Pacer) -> Settings:
        http, http2, pool = config.http, config.http2, config.pool
        limits = Limits(head=http.max_head_bytes, target=http.max_target_bytes, fields=http.max_headers)
        windows = Http2Limits(http2.max_streams, http.max_head_bytes, http2.stream_window, http2.connection_window)
        mux = MuxSettings(
            windows,
            streams=StreamLimit(config.memory.max_streams, pacer),
            budget=http2.frame_budget,
            mesh_budget=http2.mesh_frame_budget,
            resets=ResetPace(http2.reset_rate, 4 * http2.reset_rate),
            write_timeout=http.write_timeout,
            ping_interval=http2.ping_interval,
            ping_timeout=http2.ping_timeout,
        )
        server = ServerSettings(
            limits=limits,
            idle_timeout=http.idle_timeout,
            head_timeout=http.head_timeout,
            body_timeout=http.body_timeout,
            body_min_rate=http.body_min_rate,
            write_timeout=http.write_timeout,
            linger_timeout=http.linger_timeout,
            stream_timeout=http.response_body_timeout,
        )
        downstream = replace(mux, idle_timeout=http.idle_timeout, last_call=http2.ping_timeout)
        shortest = min(http.idle_timeout, http.plain_idle_timeout)
        return cls(
            server=server,
            plain_server=replace(server, idle_timeout=shortest),
            client=ClientSettings(response_timeout=http.response_timeout, stream_timeout=http.response_body_timeout),
            pool=PoolSettings(
                connections=pool.max_connections_per_endpoint,
                idle=pool.max_idle_per_endpoint,
                idle_timeout=pool.idle_timeout,
                max_age=pool.max_age,
                waiting=pool.max_waiting_per_endpoint,
                wait_timeout=pool.wait_timeout,
            ),
            limits=limits,
            downstream=downstream,
            plain_downstream=replace(downstream, idle_timeout=shortest, last_call=min(http2.ping_timeout, _PLAIN_LAST_CALL)),
            upstream=replace(mux, idle_timeout=http2.idle_timeout),
        )


@dataclass(slots=True)
class Runtime:
    """Built by app.py before anything is accepted; shared by the flows; owns nothing that has to be closed."""

    config: Config
    settings: Settings
    loops: LoopGuard
    identity: Identity | None
    directory: Source
    balancer: Balancer
    router: Router
    dispatcher: Dispatcher
    dialer: Dialer
    ledger: Ledger
    spans: Spans
    drain: Drain
    expiries: Expiries
    former: FormerIdentities | None = None
    fast_path: FastPath | None = None

    # Where a connection was going...

    def destination(self, connection: Connection, fixed: Address | None) -> Address:
        """Where `connection` was going before it was redirected. Without a redirection: to `fixed` if that is configured, otherwise
        it was made to our own listener, which the loop guard then says."""
        return connection.original or fixed or connection.local

    # Bytes...

    async def relay(
        self, client: Stream, server: Stream, about: Facts, on_bytes: Callable[[int, int], None] | None = None
    ) -> Relayed:
        """net.relay, on the fast path as far as that goes; `about` the client's connection."""

        async def carry(joint: Joint) -> None:
            joint.share = about.share
            if self.fast_path is not None:
                await self.fast_path.join(joint)

        return await relay(client, server, idle=self.config.tcp.idle_timeout, on_bytes=on_bytes, carry=carry)

    async def look(self, client: Stream, server: Stream, patience: float) -> Found:
        """What a client speaks whose first bytes have not shown it (late_detection.py); what is not HTTP has been passed on."""
        return await look(client, server, patience=patience, idle=self.config.tcp.idle_timeout)

    # Reaching an endpoint...

    async def connect_opaque(self, endpoint: Endpoint, depth: int = 1) -> Stream:
        """A connection for bytes to the application of `endpoint`, as with `connect`. Raises Undelivered and TunnelRefused, too."""
        stream = await self.connect(endpoint, ALPN_TCP, depth)
        try:
            await confirmed(stream, self.config.tcp.connect_timeout)
        except BaseException:
            stream.close()
            raise
        return stream

    async def connect(self, endpoint: Endpoint, alpn: bytes, depth: int = 1) -> Stream:
        """A connection to `endpoint`: mutual TLS if it has an identity, clear text if it has none. The caller owns it.

        Its identity decides, and nothing else: if TLS fails, the connection fails. An endpoint with our own identity at our own
        address is this pod's application: that connection neither leaves the pod nor passes its inbound proxy, so it is clear text.
        `depth`: of the connection among our own. Raises ConnectFailed, LoopDetected, UpstreamTLSError.
        """
        identity, expected = self.identity, endpoint.identity
        if expected is None:
            self.check_clear_text(endpoint.address)
        stream = await self.dialer.dial(endpoint.address, depth)
        if expected is None or (identity is not None and expected == identity.id and self.loops.own(endpoint.address.host)):
            return stream
        if identity is None:
            stream.close()
            raise UpstreamTLSError(f"{endpoint.address} has the identity {expected}, and this proxy has none to meet it with", "protocol")
        context, sessions = identity.client_context, identity.sessions
        host = endpoint.address.host
        own_end = identity.chain_end
        kept = KeptSession(sessions, expected, host)
        offers = (ALPN_TCP_CONFIRMED, ALPN_TCP) if alpn == ALPN_TCP else (alpn,)
        offer = TLSOffer(expected.sni, offers)
        if identity.resumes:
            offer = TLSOffer(expected.sni, offers, sessions.get(expected, host, time.time()), kept)
        followed = self.loops.follow(stream, endpoint.address)
        try:
            tls = await tls_client(
                stream,
                context,
                offer,
                verify=lambda chain: identity.verify_chain(chain, expected),
                timeout=self.config.tcp.handshake_timeout,
            )
        except (TLSFailed, PeerRefused, ConnectionLost) as error:
            kind = error.kind if isinstance(error, TLSFailed) else "certificate" if isinstance(error, PeerRefused) else "lost"
            self.ledger.tls_failed("outbound", kind)
            followed.check()
            raise UpstreamTLSError(f"mutual TLS with {endpoint.address} as {expected}: {error}", kind) from error
        followed.end()
        kept.end = tls.info.peer_not_after
        self.expiries.watch(tls, own_end)
        self.ledger.tls_established("outbound", tls.info)
        if self.router.remote_gateways is not None:
            self.router.remote_gateways.connected(endpoint, tls)
        return tls

    def check_clear_text(self, address: Address) -> None:
        """Raises UpstreamTLSError if `address` had an identity lately, so that nothing may be sent there in clear text. A connection that
        is kept open needs this before each use."""
        former = self._was(address)
        if former is not None:
            of = f" for {', '.join(sorted(former.services))}" if former.services else ""
            words = f"{address} had the identity {former.identity}{of} and has none in the directory now"
            raise UpstreamTLSError(f"{words}: nothing is sent there in clear text", "clear_text")

    def clear_text_allowed(self, address: Address) -> bool:
        """Whether `check_clear_text` raises nothing."""
        return self._was(address) is None

    def _was(self, address: Address) -> Former | None:
        """What an address was, other than one of this pod's own, if it had an identity lately."""
        former = self.former
        found = former.find(address, trio.current_time()) if former else None
        return None if found is None or self.loops.calls_itself(address.host) else found

    # What is said to whom...

    def name(self, exchange: Exchange) -> bytes:
        """What Proxy-Status calls this proxy: pods are named to those who may know them."""
        if not self.tells(exchange):
            return b"isthmus"
        pod = self.config.pod
        return f"{pod.name or 'isthmus'}.{pod.namespace}.{exchange.facts.direction}".encode("ascii", "replace").replace(b"?", b"_")

    def tells(self, exchange: Exchange) -> bool:
        """Whether the client may know what is behind this proxy: the own application may, and peers whose identity is verified."""
        return (exchange.facts.direction == "outbound" or exchange.facts.identity is not None) and not exchange.outside

    def reports(self, exchange: Exchange) -> bool:
        """Whether the client is a proxy of the mesh that is told why a request has failed (exchange/reports.py)."""
        return exchange.facts.direction != "outbound" and exchange.facts.identity is not None


class closing:  # noqa: N801  # read as a word of a `with`, as contextlib's own are
    """Own `stream` for a block: closed politely behind it, or at once if the block fails or is cancelled."""

    __slots__ = ("_released", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._released = False

    def release(self) -> None:
        """Another owner has taken the stream."""
        self._released = True

    async def __aenter__(self) -> Stream:
        return self._stream

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._released:
            return
        if kind is None:
            await self._stream.aclose()
        else:
            self._stream.close()
