"""The guard layer: it adds a token to each request, and answers a request that has been here with
508 and the cycle.

A proxy that is its own target is the shortest loop. Only the tokens end it here, because no layer
checks addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopguard import HopLimits, HopTokens, ProxyName
from loopguard.l7 import LONGEST
from proxy.errors import LoopDetected
from proxy.exchange.exchange import ConnectionInfo, Exchange, Handler
from proxy.exchange.loop_layer import add_token, guard, hide_names
from proxy.net.address import Address
from proxy.wire.h1.fast_head import recognise_request
from proxy.wire.messages import Field, Headers, Limits, RequestHead
from tests.kit.exchanges import unanswered
from tests.kit.hop import Settings, hop, through
from tests.kit.http import GET, Message, answering, origin

WHO = ProxyName("west", "default", "web-1")
PEER = Address("127.0.0.1", 1)
HEADER = b"isthmus-hops"


class Guarded(Settings):
    """A hop with the guard; `why` collects the verdicts."""

    def __init__(self, max_returns: int = 0, max_hops: int = 64) -> None:
        self.why: list[str] = []
        hop_tokens = HopTokens("outbound", WHO, bytes(32), HopLimits(max_returns, max_hops))
        super().__init__(layers=(guard(hop_tokens, self.why.append),))


def hops(message: Message) -> list[bytes]:
    value = message.get(HEADER)
    return value.split(b", ") if value else []


async def test_a_request_is_forwarded_with_the_proxy_s_token_and_name() -> None:
    received: list[Message] = []
    async with through(answering(received=received), Guarded()) as (client, _):
        assert (await client.ask()).get(HEADER) is None
    assert len(hops(received[0])) == 1
    assert hops(received[0])[0].endswith(b":west/web-1")


async def test_tokens_of_others_are_forwarded_before_ours_in_one_line() -> None:
    received: list[Message] = []
    others = b"o" + b"A" * 16 + b":east/a", b"g" + b"B" * 16
    async with through(answering(received=received), settings := Guarded()) as (client, _):
        await client.ask(
            b"GET / HTTP/1.1\r\nHost: a\r\nIsthmus-Hops: %b\r\nX: 1\r\nISTHMUS-HOPS: %b\r\n\r\n"
            % others
        )
    assert hops(received[0])[:2] == list(others)
    assert len(hops(received[0])) == 3
    assert settings.why == []


@pytest.mark.parametrize(
    ("junk", "why"),
    [(b"junk", "malformed"), (b"o" * (LONGEST + 1), "oversized")],
    ids=["malformed", "oversized"],
)
async def test_junk_is_dropped_and_counted_and_the_request_is_forwarded(
    junk: bytes, why: str
) -> None:
    received: list[Message] = []
    async with through(answering(received=received), settings := Guarded()) as (client, _):
        assert (
            await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nIsthmus-Hops: %b\r\n\r\n" % junk)
        ).status == 200
    assert len(hops(received[0])) == 1
    assert settings.why == [why]


@pytest.mark.parametrize("returns", [0, 3])
@pytest.mark.parametrize(
    ("request_", "changes"),
    [
        (GET, 0),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", 0),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", 0),
        (b"GET / HTTP/1.0\r\n\r\n", 1),  # which gets a Host in its first round
        (b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n", 1),  # whose Host is corrected
    ],
    ids=["get", "post", "connect", "1.0", "absolute"],
)
async def test_a_proxy_that_is_its_own_target_answers_508(
    request_: bytes, changes: int, returns: int
) -> None:
    async with hop(PEER, Guarded(returns)) as proxy:
        proxy.target = proxy.address
        client = await proxy.connect()
        answer = await client.ask(request_)
        await proxy.idle()
    assert answer.status == 508
    status = answer.get(b"proxy-status") or b""
    assert b"error=proxy_loop_detected" in status
    assert b"west/web-1 -> west/web-1" in status
    assert len(proxy.ended) == 1 + changes + returns + 1, (
        "it came, it came changed, it came back, and once too often"
    )


async def test_two_proxies_that_point_at_each_other_are_both_named() -> None:
    other = Settings(
        layers=(
            guard(
                HopTokens(
                    "outbound", ProxyName("east", "default", "shop-1"), b"x" * 32, HopLimits(0, 64)
                ),
                lambda _: None,
            ),
        )
    )
    async with hop(PEER, Guarded()) as one, hop(one.address, other) as two:
        one.target = two.address
        answer = await (await one.connect()).ask()
    assert answer.status == 508
    assert b"west/web-1 -> east/shop-1 -> west/web-1" in answer.body


async def test_repeated_requests_are_not_a_loop() -> None:
    async with origin(answering()) as server, hop(server.address, Guarded()) as proxy:
        client = await proxy.connect()
        for _ in range(1000):
            assert (await client.ask()).status == 200


# What each client may see...


def made(facts: ConnectionInfo, field: bytes | None = None) -> Exchange:
    headers = Headers([(b"Host", b"a"), *([(HEADER, field)] if field is not None else [])])
    return unanswered(RequestHead(b"GET", b"/", headers), facts)


def went_on(exchange: Exchange) -> bytes:
    (value,) = exchange.request.headers.all(HEADER)
    return value


INBOUND = HopTokens("inbound", WHO, bytes(32), HopLimits(0, 8))
NAMED = b"o" + b"A" * 16 + b":east/secret"


def ignored(_: str) -> None:
    pass


async def test_names_from_a_peer_without_an_identity_are_not_believed() -> None:
    exchange = made(ConnectionInfo("inbound", PEER, PEER), NAMED)
    add_token(exchange, INBOUND, ignored)
    assert b"east/secret" not in went_on(exchange)
    assert went_on(exchange).split(b", ")[1].startswith(b"e")


async def test_names_from_a_verified_peer_and_from_the_application_are() -> None:
    for facts in (
        ConnectionInfo("inbound", PEER, PEER, identity="spiffe://a/ns/b/sa/c"),
        ConnectionInfo("outbound", PEER, PEER),
    ):
        exchange = made(facts, NAMED)
        add_token(exchange, INBOUND, ignored)
        assert went_on(exchange).startswith(NAMED)
        hide_names(exchange)
        assert b"secret" not in went_on(exchange)
        assert b"web-1" not in went_on(exchange)
        assert went_on(exchange).count(b",") == 1


@pytest.mark.parametrize("outside", [False, True])
async def test_a_loop_that_began_outside_is_not_explained_to_the_outside(outside: bool) -> None:
    verified = ConnectionInfo("inbound", PEER, PEER, identity="spiffe://a/ns/b/sa/c")
    first = made(ConnectionInfo("inbound", PEER, PEER) if outside else verified)
    add_token(first, INBOUND, ignored)
    second = made(verified, went_on(first))
    with pytest.raises(LoopDetected) as caught:
        add_token(second, INBOUND, ignored)
    assert second.outside == outside
    assert caught.value.cycle == "west/web-1 -> west/web-1"


async def test_a_layer_calls_the_next_one() -> None:
    called: list[Exchange] = []

    async def handler(exchange: Exchange) -> None:
        called.append(exchange)

    wrapped: Handler = guard(INBOUND, ignored)(handler)
    exchange = made(ConnectionInfo("outbound", PEER, PEER))
    await wrapped(exchange)
    assert called == [exchange]


TOKENS = st.sampled_from(
    [
        b"o" + b"A" * 16,
        b"i" + b"B" * 16 + b":east/a",
        b"junk",
        b"o" + b"A" * 16 + b", g" + b"C" * 16,
        b"x" * 17000,
    ]
)
NAMES = st.sampled_from(
    [b"isthmus-hops", b"Isthmus-Hops", b"ISTHMUS-HOPS", b"X-Isthmus-Hops", b"isthmus-hops-not"]
)
OTHERS = st.sampled_from(
    [
        (b"Accept", b"*/*"),
        (b"X-Note", b"isthmus-hops: a"),
        (b"X-Host", b"host: b"),
        (b"Cookie", b"a=b"),
    ]
)


IDENTITIES = st.sampled_from(["spiffe://a/ns/b/sa/c", None])


@given(st.lists(OTHERS | st.tuples(NAMES, TOKENS), max_size=3), st.integers(0, 3), IDENTITIES)
def test_a_raw_head_and_a_parsed_head_are_forwarded_the_same(
    fields: list[Field], host: int, identity: str | None
) -> None:
    fields.insert(host, (b"hOST", b"shop:80"))
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    found = recognise_request(b"GET /a HTTP/1.1\r\n%b\r\n" % lines, Limits())
    assert found is not None
    told: list[tuple[Headers, list[str]]] = []
    for headers in (found[0].headers, Headers(fields)):
        exchange, why = (
            unanswered(
                RequestHead(b"GET", b"/a", headers),
                ConnectionInfo("inbound", PEER, PEER, identity=identity),
            ),
            list[str](),
        )
        assert (headers.block is not None) is (headers is found[0].headers)
        add_token(exchange, INBOUND, why.append)
        told.append((exchange.request.headers, why))
    assert told[0] == told[1]
