"""Single rules of RFC 9110 and RFC 9112 for a hop, each tested by what both sides see."""

from __future__ import annotations

import pytest
import trio

from tests.kit.hop import through
from tests.kit.http import BROKEN, GET, OK, Message, Peer, answering, chunked, origin
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import GET as GET2
from tests.kit.http2_peers import OK as OK2
from tests.kit.http2_peers import Answer, Pair, Peer2, answering2, ok, speaking

TO_HTTP1 = Settings2(up=b"1.1")


async def _received_by_http2(request: bytes, method: str = "GET") -> Answer:
    """A request of HTTP/1 as an HTTP/2 server gets it."""
    received: list[Answer] = []

    async def note(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await ok(peer, number, message)

    async with origin(speaking(answering2(note))) as up, hop2(up.address) as proxy:
        assert (await (await proxy.connect()).ask(request, method)).status == 200
    return received[0]


# Control characters, fragments, targets


@pytest.mark.parametrize("bad", [b"\x01", b"\x08", b"\x0b", b"\x1f", b"\x7f"])
async def test_a_control_character_in_a_request_is_the_client_s_fault_at_the_first_hop(
    bad: bytes,
) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, proxy):
        assert (await client.ask()).body == b"ok"
        answer = await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nX-Y: a" + bad + b"b\r\n\r\n")
        assert answer.status == 400
        assert (
            b"the value of the field X-Y, in line 3 of the head, has control characters"
            in answer.body
        )
        assert await client.ended()
    assert len(received) == 1
    assert [(e.status, e.failure, e.attempts) for e in proxy.ended] == [
        (200, None, 1),
        (400, "bad_request", 0),
    ]


@pytest.mark.parametrize("line", [b"X: a\x01b\r\n", b"X: a\x7fb\r\n"])
async def test_a_control_character_in_a_response_is_the_server_s_fault(line: bytes) -> None:
    response = b"HTTP/1.1 200 OK\r\n" + line + b"Content-Length: 2\r\n\r\nok"
    async with through(answering(response)) as (client, proxy):
        assert (await client.ask()).status == 502
        assert [e.failure for e in proxy.ended] == ["upstream_protocol"]


async def test_white_space_before_a_colon_of_a_response_is_removed() -> None:
    heads: list[bytes] = []
    response = b"HTTP/1.1 200 OK\r\nX-A : 1\r\nContent-Length\t: 2\r\n\r\nok"
    async with through(answering(response)) as (client, _):
        for _ in range(2):
            await client.send(GET)
            heads.append(await client.head())
            assert await client.exactly(2) == b"ok"
    assert heads == [b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 2\r\n\r\n"] * 2


@pytest.mark.parametrize("target", [b"/a#b", b"/#", b"http://a/#b", b"/\xc3\xbc"])
async def test_a_target_that_no_client_may_send_is_refused(target: bytes) -> None:
    async with through(answering()) as (client, proxy):
        assert (await client.ask(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")).status == 400
        assert proxy.dialled == 0


@pytest.mark.parametrize("path", [b"/a#b", b"/\xc3\xbc"])
async def test_a_path_that_no_client_may_send_is_reset(path: bytes) -> None:
    async with through2(answering2()) as (client, proxy):
        client.h2.config.validate_outbound_headers = False
        number = await client.request([*GET2[:3], (b":path", path)])
        assert (await client.message(number)).reset == 1  # PROTOCOL_ERROR
        assert proxy.dialled == 0


async def test_a_long_target_passes() -> None:
    received: list[Message] = []
    target = b"/" + b"x" * 10_240
    async with through(answering(received=received)) as (client, _):
        assert (await client.ask(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")).status == 200
    assert received[0].start[1] == target


@pytest.mark.parametrize(
    ("line", "path", "authority"),
    [
        (b"OPTIONS * HTTP/1.1", b"*", b"a"),
        (b"OPTIONS http://b HTTP/1.1", b"*", b"b"),
        (b"OPTIONS http://b:81/x HTTP/1.1", b"/x", b"b:81"),
        (b"GET http://b/x?y HTTP/1.1", b"/x?y", b"b"),
        (b"GET http://b?y HTTP/1.1", b"/?y", b"b"),
        (b"GET http://b HTTP/1.1", b"/", b"b"),
    ],
)
async def test_the_absolute_form_and_the_star_have_their_places_in_http2(
    line: bytes, path: bytes, authority: bytes
) -> None:
    request = await _received_by_http2(line + b"\r\nHost: a\r\n\r\n", line.split(b" ")[0].decode())
    assert dict(request.headers) == {
        b":method": line.split(b" ")[0],
        b":scheme": b"http",
        b":authority": authority,
        b":path": path,
    }


# Lengths, expectations, TE


@pytest.mark.parametrize("status", [b"103 Early Hints", b"100 Continue"])
async def test_an_interim_response_has_no_length(status: bytes) -> None:
    response = b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\nLink: x\r\n\r\n" + OK
    async with through(answering(response)) as (client, _):
        await client.send(GET)
        assert await client.head() == b"HTTP/1.1 " + status + b"\r\nLink: x\r\n\r\n"
        assert (await client.response()).body == b"ok"
    async with origin(answering(response)) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        answer = await (await proxy.connect2()).ask()
    assert answer.interim == [[(b":status", status[:3]), (b"link", b"x")]]
    assert answer.body == b"ok"


async def test_a_switch_of_protocols_has_no_length() -> None:
    switch = (
        b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 5\r\nConnection: Upgrade\r\nUpgrade:"
        b" x\r\n\r\n"
    )

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(switch + b"raw")
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        assert b"ength" not in await client.head()
        assert await client.exactly(3) == b"raw"


async def test_an_expectation_of_http_1_0_is_ignored() -> None:
    """RFC 9110 §10.1.1. It is not forwarded either: the server does not know that the client uses
    HTTP/1.0."""
    received: list[Message] = []
    request = (
        b"POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nExpect:"
        b" 100-continue\r\nContent-Length: 2\r\n\r\n"
    )

    async with through(answering(received=received)) as (client, _):
        assert (await client.ask(request + b"hi", "POST")).interim == []
    assert received[0].get(b"expect") is None
    assert received[0].body == b"hi"


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        (b"TE: trailers\r\nConnection: TE\r\n", b"trailers"),
        (b"TE: gzip, trailers;q=0.5\r\nConnection: TE, keep-alive\r\n", b"trailers"),
        (b"TE: gzip\r\nConnection: TE\r\n", None),
        (b"TE: deflate;q=0.5\r\nTE: gzip\r\nConnection: te\r\n", None),
        (b"Connection: TE\r\n", None),
    ],
)
async def test_only_trailers_of_te_is_forwarded(fields: bytes, passed: bytes | None) -> None:
    received: list[Message] = []
    request = b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
    async with through(answering(received=received)) as (client, _):
        await client.ask(request)
    assert received[0].get(b"te") == passed
    assert received[0].get(b"connection") == (b"TE" if passed else None)
    second = await _received_by_http2(request)
    assert second.get(b"te") == passed
    assert second.get(b"connection") is None


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_response_has_the_highest_version_that_this_proxy_supports(version: bytes) -> None:
    """RFC 9110 §6.2: also to a client of HTTP/1.0. It gets nothing that it cannot read (chunks,
    interim responses)."""
    response = (
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunked(b"hello")
    )
    async with through(answering(response)) as (client, _):
        await client.send(b"GET / HTTP/%b\r\nHost: a\r\nConnection: close\r\n\r\n" % version)
        received = await client.rest()
    assert received.startswith(b"HTTP/1.1 ")
    if version == b"1.0":
        assert received == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"


# Fields that Connection names, and trailers


async def test_connection_cannot_remove_a_field_of_the_proxy() -> None:
    """The loop guard's tokens, above all."""
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"GET / HTTP/1.1\r\nHost: a\r\nisthmus-hops: x\r\nTraceparent: y\r\nX-Z: z\r\n"
            b"Connection: isthmus-hops, traceparent, x-z\r\n\r\n"
        )
    assert received[0].headers == [(b"host", b"a"), (b"isthmus-hops", b"x"), (b"traceparent", b"y")]


_TRAILERS: list[Pair] = [
    (b"content-length", b"5"), (b"host", b"evil"), (b"authorization", b"x"), (b"isthmus-hops", b"x"), (b"isthmus-timeout", b"1s"),
    (b"isthmus-client-id", b"x"), (b"grpc-status", b"0"), (b"x-sum", b"1"),
]  # fmt: skip
_LEFT: list[Pair] = [(b"grpc-status", b"0"), (b"x-sum", b"1")]


async def test_trailers_that_frame_route_or_authenticate_are_dropped_in_both_versions_and_directions() -> (
    None
):
    body = chunked(b"x", trailers=b"".join(b"%b: %b\r\n" % pair for pair in _TRAILERS))
    received: list[Message] = []
    async with through(
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body, received)
    ) as (client, _):
        answer = await client.ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body, "POST"
        )
    assert received[0].trailers == answer.trailers == _LEFT

    heard2: list[Answer] = []

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        heard2.append(message)
        peer.h2.send_headers(number, OK2)
        await peer.send(number, b"x")
        await peer.trailers(number, _TRAILERS)

    async with through2(answering2(respond)) as (second, _):
        for _ in range(2):
            number = await second.request([(b":method", b"POST"), *GET2[1:]], end=False)
            await second.send(number, b"x")
            await second.trailers(number, _TRAILERS)
            assert (await second.message(number)).trailers == _LEFT
    assert [message.trailers for message in heard2] == [_LEFT, _LEFT]


# A body that cannot be read


async def test_a_fault_in_a_body_that_came_with_its_head_is_a_502_of_this_hop() -> None:
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello"
    async with through(answering(response)) as (client, proxy):
        for _ in range(2):
            answer = await client.ask()
            assert answer.status == 502
            assert b"a chunk size that is not a hexadecimal number" in answer.body
        assert {e.failure for e in proxy.ended} == {"upstream_closed"}


@pytest.mark.parametrize("at_once", [True, False])
async def test_data_before_a_fault_in_a_body_reaches_the_client(at_once: bool) -> None:
    """Otherwise the next proxy would report that there was no response at all."""
    head, good, bad = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"5\r\nhello\r\n",
        b"zz\r\n",
    )

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(OK) if not heads else None
            if heads:
                for piece in [head + good + bad] if at_once else [head, good, bad]:
                    await peer.send(piece)
                    await trio.sleep(0.01)
                await peer.rest()
                return
            heads.append(b"")

    heads: list[bytes] = []
    async with through(script) as (client, proxy):
        assert (await client.ask()).body == b"ok"
        await client.send(GET)
        assert await client.head() == head
        assert await client.exactly(len(good)) == good
        with pytest.raises(BROKEN):
            await client.response()
        await proxy.gone()
        assert [(e.status, e.failure, e.response_bytes) for e in proxy.ended] == [
            (200, None, 2),
            (200, "upstream_closed", 5),
        ]
