"""The trace layer around real exchanges: which spans there are, under which parents, and what the
next hop gets."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from proxy.errors import NoEndpoint
from proxy.exchange.exchange import (
    Body,
    ConnectionInfo,
    Exchange,
    FailedAttempt,
    Handler,
    Layer,
    Whole,
)
from proxy.exchange.trace_layer import Side, Tracing, trace
from proxy.net.address import Address
from proxy.net.socket_stream import Stream
from proxy.wire.messages import Headers, RequestHead, ResponseHead
from tests.kit.build import interpreted
from tests.kit.hop import Hop, Settings, hop
from tests.kit.http import Peer, origin, until
from tracing.sampling import Sampling, Tracer
from tracing.spans import HttpRecord, Record, describe

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GET = (
    "GET /a?q=1 HTTP/1.1\r\nHost: shop\r\nUser-Agent: test\r\ntraceparent:"
    f" 00-{TRACE}-{CALLER}-01\r\n\r\n".encode()
)
UNSAMPLED = GET.replace(b"-01\r\n", b"-00\r\n")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Seen:
    """What the server got, and the records of the spans that have ended."""

    proxy: Hop
    heads: list[bytes] = field(default_factory=list)
    records: list[HttpRecord] = field(default_factory=list)

    @property
    def parents(self) -> list[str]:
        """The span in the traceparent of each request that the server got."""
        found = [
            re.search(rb"(?i)traceparent: 00-[0-9a-f]{32}-([0-9a-f]{16})-", head)
            for head in self.heads
        ]
        return [match[1].decode() if match is not None else "" for match in found]


@asynccontextmanager
async def traced(
    side: Side,
    *answers: bytes,
    ratio: float = 0.0,
    on: bool = True,
    hold: trio.Event | None = None,
    layers: tuple[Layer, ...] = (),
) -> AsyncIterator[tuple[Peer, Seen]]:
    """A client, a hop that traces, and a server that gives these responses in sequence; b"": it
    closes the connection instead. After the last one it closes too, when `hold` is set."""
    left, heads, records = list(answers or (ANSWER,)), [], []

    async def script(peer: Peer) -> None:
        while left:
            heads.append(await peer.head())
            answer = left.pop(0)
            if not answer:
                return
            await peer.send(answer)
        if hold is not None:
            await hold.wait()

    def put(record: Record) -> None:
        assert isinstance(record, HttpRecord)
        records.append(record)

    tracing = Tracing(Tracer(Sampling(ratio)), put) if on else None
    async with (
        origin(script) as server,
        hop(server.address, Settings(tracing=tracing, side=side, layers=layers)) as proxy,
    ):
        yield await proxy.connect(), Seen(proxy, heads, records)


async def test_a_servers_span_hangs_under_the_callers_and_the_next_hops_under_it() -> None:
    async with traced("server") as (client, seen):
        await client.ask(GET)
        await until(lambda: len(seen.records) == 1, 10)
    (span,) = seen.records
    assert (span.kind, span.trace_id.decode(), span.parent.decode(), span.remote) == (
        "server",
        TRACE,
        CALLER,
        True,
    )
    assert seen.parents == [span.span_id.decode()]
    assert (span.method, span.target, span.authority, span.status, span.agent) == (
        b"GET",
        b"/a?q=1",
        b"shop",
        200,
        b"test",
    )
    assert span.peer is not None
    assert span.started <= span.head_at <= span.ended
    assert (span.response_bytes, span.failure, span.direction) == (2, None, "outbound")


async def test_a_clients_span_names_the_server() -> None:
    async with traced("client") as (client, seen):
        await client.ask(GET)
        await until(lambda: len(seen.records) == 1, 10)
    (span,) = seen.records
    assert (span.kind, span.parent.decode(), span.attempt, span.follows) == (
        "client",
        CALLER,
        0,
        b"",
    )
    assert span.peer == seen.proxy.target
    assert seen.parents == [span.span_id.decode()]


async def test_a_gateways_client_span_hangs_under_its_server_span() -> None:
    async with traced("both") as (client, seen):
        await client.ask(GET)
        await until(lambda: len(seen.records) == 2, 10)
    inner, outer = seen.records
    assert (outer.kind, outer.parent.decode(), outer.remote) == ("server", CALLER, True)
    assert (inner.kind, inner.parent, inner.remote) == ("client", outer.span_id, False)
    assert seen.parents == [inner.span_id.decode()]
    assert outer.started <= inner.started <= inner.ended <= outer.ended


@pytest.mark.parametrize("side", ["client", "both"])
async def test_a_retry_has_its_own_span_with_a_link_to_the_first(
    side: Side,
) -> None:
    async with traced(side, ANSWER, b"", ANSWER) as (client, seen):
        await client.ask(GET)
        answer = await client.ask(GET)  # the kept connection breaks: another one is tried
        assert answer.status == 200
        await until(lambda: len(seen.records) == (3 if side == "client" else 5), 10)
    spans = [record for record in seen.records if record.kind == "client"]
    first, again = spans[-2:]
    assert seen.parents == [span.span_id.decode() for span in spans]
    assert len({*seen.parents}) == 3
    assert first.parent == again.parent
    assert (first.failure, first.status, first.attempt, first.follows) == ("unanswered", 0, 0, b"")
    assert (again.failure, again.status, again.attempt, again.follows) == (
        None,
        200,
        1,
        first.span_id,
    )
    assert first.ended <= again.started


async def test_an_attempt_that_failed_shows_the_backend_and_the_bytes_that_it_had_itself() -> None:
    def failed_over(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            now = trio.current_time()
            exchange.tried = [
                FailedAttempt(exchange.facts.destination, now, now, 503, "status", "default/old", 7)
            ]
            exchange.service, exchange.chosen = "default/shop", "default/new"
            await handler(exchange)

        return handle

    async with traced("client", layers=(failed_over,)) as (client, seen):
        await client.ask(GET)
        await until(lambda: len(seen.records) == 2, 10)
    old, new = seen.records
    assert (old.service, old.chosen, old.status, old.request_bytes, old.failure) == (
        "default/shop",
        "default/old",
        503,
        7,
        None,
    )
    assert (new.service, new.chosen, new.status, new.request_bytes, new.follows) == (
        "default/shop",
        "default/new",
        200,
        0,
        old.span_id,
    )


@pytest.mark.parametrize("side", ["server", "client", "both"])
async def test_an_unsampled_request_is_forwarded_unchanged_and_leaves_no_span(side: Side) -> None:
    async with traced(side) as (client, seen):
        await client.ask(UNSAMPLED)
        await seen.proxy.idle()
    assert seen.parents == [CALLER]
    assert not seen.records


async def test_without_tracing_headers_are_not_touched() -> None:
    async with traced("server", on=False) as (client, seen):
        await client.ask(GET)
        await seen.proxy.idle()
    assert seen.parents == [CALLER]
    assert not seen.records


async def test_a_request_without_a_trace_starts_one_at_the_sampling_ratio() -> None:
    async with traced("server", ratio=1.0) as (client, seen):
        await client.ask(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
        await until(lambda: len(seen.records) == 1, 10)
    assert seen.records[0].parent == b""
    assert seen.parents == [seen.records[0].span_id.decode()]


@pytest.mark.parametrize(
    ("side", "kinds"), [("server", ["server"]), ("client", ["client"]), ("both", ["server"])]
)
async def test_responses_of_the_proxy_are_traced_with_their_reason(
    side: Side, kinds: list[str]
) -> None:
    async with traced(side) as (client, seen):
        seen.proxy.raises = NoEndpoint("none of the 3 endpoints of shop is ready")
        answer = await client.ask(GET)
        await until(lambda: len(seen.records) == len(kinds), 10)
    assert [record.kind for record in seen.records] == kinds
    (span,) = seen.records
    assert (span.status, span.failure, span.words) == (
        503,
        "no_endpoint",
        "none of the 3 endpoints of shop is ready",
    )
    assert span.proxy_status == answer.get(b"proxy-status")
    assert span.head_at


async def test_a_request_that_cannot_be_read_is_a_span_where_all_are() -> None:
    async with traced("server", ratio=1.0) as (client, seen):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization : hunter2\r\n\r\n")
        await client.rest()
        await until(lambda: len(seen.records) == 1, 10)
    assert (seen.records[0].status, seen.records[0].failure) == (400, "bad_request")
    assert "hunter2" not in repr(describe(seen.records[0]))


async def test_a_span_ends_with_the_body_and_not_with_the_head() -> None:
    hold = trio.Event()
    async with traced("server", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab", hold=hold) as (
        client,
        seen,
    ):
        await client.send(GET)
        await client.until(b"\r\n\r\nab")
        assert not seen.records  # the server still owes two bytes
        hold.set()  # and never sends them
        await until(lambda: len(seen.records) == 1, 10)
    (span,) = seen.records
    assert (span.status, span.failure, span.response_bytes) == (200, "upstream_closed", 2)
    assert describe(span).error is not None


async def test_an_answer_before_the_end_of_the_request_ends_the_span() -> None:
    hold = trio.Event()
    async with traced("server", ANSWER, hold=hold) as (client, seen):
        await client.send(
            GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\nab")
        )
        await client.until(b"ok")
        await until(lambda: len(seen.records) == 1, 20)
        hold.set()
    assert (seen.records[0].status, seen.records[0].request_bytes) == (200, 2)


@pytest.mark.parametrize(
    ("lines", "agent"),
    [
        (b"Host: a\r\nUSER-AGENT: one\r\nuser-agent: two\r\n", b"one"),
        (b"User-Agent: one\r\nHost: a\r\nUser-Agent: two\r\n", b"one"),
        (
            b"Accept: user-agent: none\r\nHost: a\r\nX-User-Agent: none\r\nUser-Agent: one\r\n",
            b"one",
        ),
        (b"Host: a\r\nAccept: user-agent: none\r\n", None),
        (b"Host: a\r\nUser-Agent: %b\r\n" % (b"x" * 1000), b"x" * 256),
    ],
)
async def test_a_servers_span_has_the_first_user_agent_at_any_position(
    lines: bytes, agent: bytes | None
) -> None:
    async with traced("server") as (client, seen):
        await client.ask(
            b"GET / HTTP/1.1\r\n%btraceparent: 00-%b-%b-01\r\n\r\n"
            % (lines, TRACE.encode(), CALLER.encode())
        )
        await until(lambda: len(seen.records) == 1, 10)
    assert (seen.records[0].agent, seen.records[0].authority) == (agent, b"a")


@interpreted  # it makes a class under a compiled one
@pytest.mark.parametrize("side", ["server", "client", "both"])
async def test_a_traced_exchange_is_gone_when_it_is_over_without_the_collector(side: Side) -> None:
    class Referred(Exchange):
        """An exchange with a weak reference. It is answered, so nothing else is used of it."""

        __slots__ = ("__weakref__",)

        async def inform(self, head: ResponseHead) -> None:
            raise NotImplementedError  # `answer` uses none of these three

        async def respond(self, head: ResponseHead, body: Body) -> None:
            self.response = head
            self.on_response(head.status)

        async def switch(self, head: ResponseHead) -> Stream:
            raise NotImplementedError

        def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:
            raise NotImplementedError

    here, records = Address("127.0.0.1", 1), list[Record]()

    async def answer(exchange: Exchange) -> None:
        exchange.record_upstream_address(here, None)
        await exchange.respond(ResponseHead(200), Whole())

    lines = b"Host: a\r\ntraceparent: 00-%b-%b-01\r\n" % (TRACE.encode(), CALLER.encode())
    exchange = Referred(
        RequestHead(b"GET", b"/", Headers.canonical(lines, [])),
        Whole(),
        ConnectionInfo("gateway", here, here),
    )
    left = weakref.ref(exchange)
    gc.disable()
    try:
        await trace(Tracing(Tracer(Sampling()), records.append), side)(answer)(exchange)
        del exchange
        assert left() is None
    finally:
        gc.enable()
    assert len(records) == (2 if side == "both" else 1)
