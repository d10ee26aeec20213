"""HTTP from a client: the layers of a flow, for both paths, and the server of a connection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from proxy.exchange.exchange import (
    ConnectionInfo,
    Direction,
    Exchange,
    ExchangePlan,
    Handler,
    Handoff,
    stack,
)
from proxy.exchange.h1.server import Http1Server
from proxy.exchange.h2.server import Http2Server
from proxy.exchange.layers import admit, deadline, measure, rescue
from proxy.exchange.loop_layer import try_add_token
from proxy.exchange.trace_layer import Side, begin_trace, trace
from proxy.fastpath.plan import Planner
from proxy.flows.runtime import Runtime
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.messages import ProtocolError
from proxy.wire.sniff import Protocol

# Which spans a flow records. A gateway is a server to its client and a client to its endpoints.
_SIDES: dict[Direction, Side] = {"outbound": "client", "inbound": "server", "gateway": "both"}


class HttpLayers:
    """The layers around the exchanges of a flow. The ordinary path runs them as a stack of
    handlers. The fast path calls the functions of those that apply to it: `account`, `begin`."""

    def __init__(self, rt: Runtime, direction: Direction) -> None:
        self.account: Callable[[Exchange], AbstractContextManager[object]] = rt.recorder.exchange
        self._rt = rt
        self._side = _SIDES[direction]
        self._tracing = rt.spans.flows()[direction]
        self._direction = direction
        self._hop_tokens = rt.loops.hop_tokens(direction)

    def stack(self, endpoint: Handler) -> Handler:
        """The handler of the ordinary path. `endpoint` sends the request on."""
        rt = self._rt
        return stack(
            measure(self.account),
            trace(self._tracing, self._side),
            rescue(rt.name, rt.tells, rt.reports),
            admit,
            rt.loops.layer(self._direction),
            deadline,
            endpoint=endpoint,
        )

    def begin_trace(self, exchange: Exchange) -> bool:
        """On the fast path: begin the trace. Returns whether it is sampled, so that the ordinary
        path has to record spans."""
        return begin_trace(exchange, self._tracing)

    def add_token(self, exchange: Exchange) -> bool:
        """On the fast path: add the token of the loop guard. False: the ordinary path has to."""
        return try_add_token(exchange, self._hop_tokens)


def keep_draws(exchange: Exchange, plan: ExchangePlan | None) -> None:
    """The fast path does not carry the exchange. Keep its trace, and a `plan` that has drawn an
    endpoint, for the ordinary path: a second draw would change the odds."""
    if plan is not None or exchange.trace is not None:
        exchange.handoff = Handoff(plan)


async def serve(
    rt: Runtime,
    stream: Stream,
    about: ConnectionInfo,
    handler: Handler,
    planner: Planner | None = None,
) -> None:
    """Serve a downstream HTTP connection of either version until it ends. If there is a `planner`,
    simple exchanges take the fast path."""
    fast_path = rt.fast_path if planner is not None else None
    plain = about.identity is None and about.direction != "outbound"
    settings = rt.settings.plain_server if plain else rt.settings.server
    if about.protocol is Protocol.HTTP2:
        server = Http2Server(
            stream,
            about,
            settings,
            rt.settings.plain_downstream if plain else rt.settings.downstream,
            rt.drain,
        )
        if fast_path is not None and planner is not None:
            server.fork = partial(fast_path.fork, planner)
        if about.slot is not None:
            about.slot.activity = server
        await server.run(handler)
        if server.mux.fault is not None:  # the client got a GOAWAY; raise it for the log
            raise ProtocolError(server.mux.fault)
        return
    prepare = None
    if fast_path is not None and planner is not None:
        prepare = partial(fast_path.prepare, planner)
    one = Http1Server(stream, about, settings, rt.drain, prepare)
    if about.slot is not None:
        about.slot.activity = one
    expiry = stream.expiry if isinstance(stream, TLSStream) else None
    if expiry is None:
        await one.run(handler)
        return
    expiry.retire = one.retire
    try:
        await one.run(handler)
    finally:
        expiry.retire = None  # it refers to the stream: break the reference cycle
