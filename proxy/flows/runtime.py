"""The objects that every flow needs, in one place, and the steps that the flows share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType

import trio

from proxy.balancing.balancer import Balancer
from proxy.config.schema import Config
from proxy.directory import Endpoint, Former
from proxy.directory.former_identities import FormerIdentities
from proxy.directory.source import Source
from proxy.errors import UpstreamTLSError
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import ConnectionInfo, Exchange
from proxy.exchange.h1.pool import PoolSettings
from proxy.exchange.h2.reset_pacing import ResetLimits
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.fastpath.fast_path import FastPath
from proxy.flows.confirmation import await_confirmation
from proxy.flows.late_detection import Found, detect_late
from proxy.flows.loop_guard import LoopGuard
from proxy.identity.identity import Identity, PeerRefused
from proxy.identity.tls_contexts import ALPN_TCP, ALPN_TCP_CONFIRMED, KeptSession
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed, ConnectionLost, TLSFailed
from proxy.net.pacing import Pacer
from proxy.net.relay import Relayed, RelayState, relay
from proxy.net.socket_stream import Stream
from proxy.net.tls.expiry import Expiries
from proxy.net.tls.handshake import TLSOffer, tls_client
from proxy.routing.dispatch import Dispatcher
from proxy.routing.router import Router
from proxy.telemetry.records import Recorder
from proxy.telemetry.tracing_setup import FlowTracing
from proxy.wire.h2.events import Http2Limits
from proxy.wire.messages import Limits

# Seconds that a client without an identity has to answer the PING that follows our GOAWAY.
_PLAIN_LAST_CALL = 1.0


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """The parts of the configuration, as the settings types of the packages that use them."""

    server: ServerSettings
    plain_server: ServerSettings  # for peers outside the pod that presented no client certificate
    client: ClientSettings
    pool: PoolSettings
    limits: Limits
    downstream: Http2Settings  # HTTP/2 connections from clients
    plain_downstream: Http2Settings  # HTTP/2 connections from peers without an identity
    upstream: Http2Settings  # HTTP/2 connections to servers

    @classmethod
    def of(cls, config: Config, pacer: Pacer) -> FlowSettings:
        http, http2, pool = config.http, config.http2, config.pool
        limits = Limits(
            head=http.max_head_bytes, target=http.max_target_bytes, fields=http.max_headers
        )
        windows = Http2Limits(
            http2.max_streams, http.max_head_bytes, http2.stream_window, http2.connection_window
        )
        mux = Http2Settings(
            windows,
            streams=StreamLimit(config.memory.max_streams, pacer),
            budget=http2.frame_budget,
            mesh_budget=http2.mesh_frame_budget,
            resets=ResetLimits(http2.reset_rate, 4 * http2.reset_rate),
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
            client=ClientSettings(
                response_timeout=http.response_timeout, stream_timeout=http.response_body_timeout
            ),
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
            plain_downstream=replace(
                downstream,
                idle_timeout=shortest,
                last_call=min(http2.ping_timeout, _PLAIN_LAST_CALL),
            ),
            upstream=replace(mux, idle_timeout=http2.idle_timeout),
        )


@dataclass(slots=True)
class Runtime:
    """Built by app.py before the proxy accepts connections. The flows share it. It owns nothing
    that must be closed."""

    config: Config
    settings: FlowSettings
    loops: LoopGuard
    identity: Identity | None
    directory: Source
    balancer: Balancer
    router: Router
    dispatcher: Dispatcher
    dialer: Dialer
    recorder: Recorder
    spans: FlowTracing
    drain: Drain
    expiries: Expiries
    former: FormerIdentities | None = None
    fast_path: FastPath | None = None

    # The destination of a connection.

    def destination(self, connection: Connection, fixed: Address | None) -> Address:
        """The destination of `connection` before it was redirected. Without a redirection: `fixed`
        if that is configured, otherwise the address of our own listener, which the loop guard then
        reports."""
        return connection.original or fixed or connection.local

    # Opaque bytes.

    async def relay(
        self,
        client: Stream,
        server: Stream,
        about: ConnectionInfo,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Relayed:
        """net.relay, on the fast path as far as possible. `about` describes the client's
        connection."""

        async def carry(state: RelayState) -> None:
            state.share = about.share
            if self.fast_path is not None:
                await self.fast_path.join(state)

        return await relay(
            client, server, idle=self.config.tcp.idle_timeout, on_bytes=on_bytes, carry=carry
        )

    async def detect_late(self, client: Stream, server: Stream, patience: float) -> Found:
        """Find out the protocol of a client whose first bytes did not show it (late_detection.py).
        If it is not HTTP, all its bytes have been forwarded."""
        idle = self.config.tcp.idle_timeout
        return await detect_late(client, server, patience=patience, idle=idle)

    # Connecting to an endpoint.

    async def connect_opaque(self, endpoint: Endpoint, depth: int = 1) -> Stream:
        """Connect to the application of `endpoint` for opaque bytes, with `connect`. Raises
        Undelivered and TunnelRefused, and what `connect` raises."""
        stream = await self.connect(endpoint, ALPN_TCP, depth)
        try:
            await await_confirmation(stream, self.config.tcp.connect_timeout)
        except BaseException:
            stream.close()
            raise
        return stream

    async def connect(self, endpoint: Endpoint, alpn: bytes, depth: int = 1) -> Stream:
        """Connect to `endpoint`: mutual TLS if it has an identity, clear text if it has none. The
        caller owns the stream.

        Only the endpoint's identity decides: if TLS fails, the connection fails. An endpoint with
        our own identity at our own address is this pod's application. That connection does not
        leave the pod and does not pass the inbound proxy, so it is clear text. `depth`: the nesting
        depth of the connection among this proxy's own connections. Raises ConnectFailed,
        LoopDetected, UpstreamTLSError."""
        identity, expected = self.identity, endpoint.identity
        if expected is None:
            self.check_clear_text(endpoint.address)
        try:
            stream = await self.dialer.dial(endpoint.address, depth)
        except ConnectFailed:
            self.directory.doubt()
            raise
        if expected is None or self.is_direct(endpoint):
            return stream
        if identity is None:
            stream.close()
            raise UpstreamTLSError(
                f"{endpoint.address} has the identity {expected}, and this proxy has none for"
                " mutual TLS",
                "protocol",
            )
        context, sessions = identity.client_context, identity.sessions
        host = endpoint.address.host
        own_end = identity.chain_end
        kept = KeptSession(sessions, expected, host)
        offers = (ALPN_TCP_CONFIRMED, ALPN_TCP) if alpn == ALPN_TCP else (alpn,)
        offer = TLSOffer(expected.sni, offers)
        if identity.resumes:
            offer = TLSOffer(expected.sni, offers, sessions.get(expected, host, time.time()), kept)
        followed, trust = self.loops.follow(stream, endpoint.address), self.expiries.trust
        try:
            tls = await tls_client(
                stream,
                context,
                offer,
                verify=lambda chain: identity.verify_chain(chain, expected),
                timeout=self.config.tcp.handshake_timeout,
            )
        except (TLSFailed, PeerRefused, ConnectionLost) as error:
            kind = (
                error.kind
                if isinstance(error, TLSFailed)
                else "certificate"
                if isinstance(error, PeerRefused)
                else "lost"
            )
            self.recorder.tls_failed("outbound", kind)
            self.directory.doubt()
            followed.check()
            raise UpstreamTLSError(
                f"mutual TLS with {endpoint.address} as {expected}: {error}", kind
            ) from error
        followed.end()
        # When our own certificate has expired, the server refuses the session without an alert.
        kept.end = min(tls.info.peer_not_after, own_end)
        self.expiries.watch(tls, own_end, trust=trust)
        self.recorder.tls_established("outbound", tls.info)
        if self.router.remote_gateways is not None:
            self.router.remote_gateways.connected(endpoint, tls)
        return tls

    def is_direct(self, endpoint: Endpoint) -> bool:
        """Whether `connect` reaches the application of `endpoint` in clear text, without a proxy in
        front of it."""
        expected, own = endpoint.identity, self.identity
        return expected is None or (
            own is not None and expected == own.id and self.loops.own(endpoint.address.host)
        )

    def check_clear_text(self, address: Address) -> None:
        """Raises UpstreamTLSError if `address` recently had an identity, so that it must not get
        clear text. Call this before each use of a pooled connection."""
        former = self._former_identity(address)
        if former is not None:
            of = f" for {', '.join(sorted(former.services))}" if former.services else ""
            words = (
                f"{address} had the identity {former.identity}{of} and has none in the"
                " directory now"
            )
            raise UpstreamTLSError(f"{words}: the proxy sends no clear text there", "clear_text")

    def clear_text_allowed(self, address: Address) -> bool:
        """Whether `check_clear_text` raises nothing."""
        return self._former_identity(address) is None

    def _former_identity(self, address: Address) -> Former | None:
        """The former identity of an address, if it had one recently. None for addresses of this
        pod."""
        former = self.former
        found = former.find(address, trio.current_time()) if former else None
        return None if found is None or self.loops.calls_itself(address.host) else found

    # What clients may learn.

    def name(self, exchange: Exchange) -> bytes:
        """The name of this proxy in Proxy-Status. It contains the pod's name only if the client may
        know it."""
        if not self.tells(exchange):
            return b"isthmus"
        pod = self.config.pod
        return f"{pod.name or 'isthmus'}.{pod.namespace}.{exchange.facts.direction}".encode(
            "ascii", "replace"
        ).replace(b"?", b"_")

    def tells(self, exchange: Exchange) -> bool:
        """Whether the client may know details about what is behind this proxy. The pod's own
        application may, and peers with a verified identity."""
        return (
            exchange.facts.direction == "outbound" or exchange.facts.identity is not None
        ) and not exchange.outside

    def reports(self, exchange: Exchange) -> bool:
        """Whether the client is a proxy of the mesh that gets the reason of a failure
        (exchange/reports.py)."""
        return exchange.facts.direction != "outbound" and exchange.facts.identity is not None


class closing:  # noqa: N801  # lower case, like the context managers of contextlib
    """Own `stream` for a block. Closes it gracefully at the end, or at once if the block fails or
    is cancelled."""

    __slots__ = ("_released", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._released = False

    def release(self) -> None:
        """Another owner has taken the stream. The block does not close it."""
        self._released = True

    async def __aenter__(self) -> Stream:
        return self._stream

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._released:
            return
        if kind is None:
            await self._stream.aclose()
        else:
            self._stream.close()
