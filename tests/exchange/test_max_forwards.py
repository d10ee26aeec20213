"""Max-Forwards (RFC 9110 §7.6.2) counts proxies for TRACE and OPTIONS; the last one answers."""

from __future__ import annotations

import pytest

from tests.kit.hop import through
from tests.kit.http import Message, answering, origin
from tests.kit.http2_hop import hop2
from tests.kit.http2_peers import GET as GET2
from tests.kit.http2_peers import Answer, Peer2, answering2, ok, speaking

OPTIONS2 = [(b":method", b"OPTIONS"), *GET2[1:]]


def request(method: str, *values: bytes) -> bytes:
    lines = b"".join(b"Max-Forwards: %b\r\n" % value for value in values)
    return b"%b /x HTTP/1.1\r\nHost: a\r\n%b\r\n" % (method.encode(), lines)


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE"])
@pytest.mark.parametrize(("came", "goes"), [(b"1", b"0"), (b"10", b"9"), (b"007", b"6")])
async def test_it_is_counted_down(method: str, came: bytes, goes: bytes) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        for _ in range(2):
            assert (await client.ask(request(method, came), method)).status == 200
    assert [message.get(b"max-forwards") for message in received] == [goes, goes]


@pytest.mark.parametrize(
    ("method", "values"),
    [("GET", [b"0"]), ("OPTIONS", [b"x"]), ("OPTIONS", [b"0", b"1"]), ("TRACE", [b"-1"])],
)
async def test_other_methods_and_invalid_numbers_are_forwarded_unchanged(
    method: str, values: list[bytes]
) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        for _ in range(2):
            assert (await client.ask(request(method, *values), method)).body == b"ok"
    assert [[v for n, v in message.headers if n == b"max-forwards"] for message in received] == [
        values,
        values,
    ]


async def test_at_0_options_is_answered_here() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, proxy):
        for _ in range(2):  # the connection stays
            answer = await client.ask(request("OPTIONS", b"0"), "OPTIONS")
            assert (answer.status, answer.body, answer.get(b"content-length")) == (200, b"", b"0")
        assert proxy.dialled == 0
        assert [e.failure for e in proxy.ended] == [None, None]
    assert received == []


async def test_at_0_trace_returns_the_request_without_secrets_and_the_proxy_s_fields() -> None:
    async with through(answering()) as (client, proxy):
        head = b"TRACE /x HTTP/1.1\r\nHost: a\r\nX-Y: z\r\nMax-Forwards: 0\r\n"
        answer = await client.ask(
            head + b"Cookie: a=b\r\nauthorization: c\r\nisthmus-hops: d\r\n\r\n", "TRACE"
        )
        assert (answer.status, answer.get(b"content-type")) == (200, b"message/http")
        assert answer.body == head + b"\r\n"
        assert proxy.dialled == 0


async def test_streams_are_counted_too() -> None:
    received: list[Answer] = []

    async def note(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await ok(peer, number, message)

    async with origin(speaking(answering2(note))) as up, hop2(up.address) as proxy:
        client = await proxy.connect2()
        for value in (b"3", b"3", b"0"):
            assert (await client.ask([*OPTIONS2, (b"max-forwards", value)])).status == 200
    assert [message.get(b"max-forwards") for message in received] == [b"2", b"2"]
