"""What ends at this hop and what is forwarded: the version, the authority, and the fields that
describe one connection only."""

from __future__ import annotations

import pytest

from tests.kit.hop import hop, through
from tests.kit.http import OK, Message, answering, chunked, origin


async def test_a_1_0_request_is_answered_and_the_connection_closed() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        answer = await client.ask(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")
        assert await client.ended()
    assert (answer.body, answer.get(b"connection")) == (b"ok", b"close")
    assert received[0].headers == [(b"host", b"a")]
    assert received[0].version == b"1.1"


async def test_a_1_0_request_without_a_host_gets_the_address_it_was_sent_to() -> None:
    received: list[Message] = []
    async with origin(answering(received=received)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        assert (await client.ask(b"GET / HTTP/1.0\r\n\r\n")).status == 200
    assert received[0].get(b"host") == str(server.address).encode()


async def test_a_1_0_connection_is_kept_if_the_client_asks_for_it() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        for _ in range(3):
            answer = await client.ask(
                b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
            )
            assert answer.get(b"connection") == b"keep-alive"
        await client.ask(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")
        assert await client.ended()
    assert all(request.get(b"connection") is None for request in received)


async def test_a_1_0_client_gets_no_chunks() -> None:
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(
        b"ab", b"c", trailers=b"X-T: 1\r\n"
    )
    async with through(answering(response)) as (client, _):
        await client.send(b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"Connection: close" in head
    assert body == b"abc"


async def test_a_1_0_client_gets_no_interim_responses() -> None:
    async with through(answering(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + OK)) as (
        client,
        _,
    ):
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_an_upgrade_in_a_1_0_request_is_ignored() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"GET / HTTP/1.0\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
    assert received[0].headers == [(b"host", b"a")]


# The authority


async def test_the_authority_of_an_absolute_target_wins_over_the_host_field() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(b"GET http://right.example:81/a HTTP/1.1\r\nHost: wrong.example\r\n\r\n")
    assert received[0].get(b"host") == b"right.example:81"


async def test_options_for_the_server_as_a_whole_pass() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS")
    assert received[0].start == (b"OPTIONS", b"*")


# Fields of one hop


async def test_fields_of_the_hop_stay_on_it() -> None:
    received: list[Message] = []
    response = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: timeout=5\r\nX-Mine:"
        b" 1\r\nX-Yours: 2\r\nProxy-Connection: x\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n"
    )
    async with through(answering(response, received)) as (client, _):
        answer = await client.ask(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Secret\r\nConnection:"
            b" x-other\r\nX-Secret: 1\r\nX-Other: 2\r\nKeep-Alive: 300\r\nProxy-Connection:"
            b" keep-alive\r\nTE: gzip\r\nX-Kept: 3\r\n\r\n"
        )
    assert received[0].headers == [(b"host", b"a"), (b"x-kept", b"3")]
    assert answer.headers == [(b"x-yours", b"2"), (b"content-length", b"0")]


async def test_connection_cannot_remove_essential_fields() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Host, Content-Length, Authorization,"
            b" X-Forwarded-For\r\nAuthorization: b\r\nX-Forwarded-For: c\r\nContent-Length:"
            b" 2\r\n\r\nhi",
            "POST",
        )
    assert received[0].body == b"hi"
    assert [name for name, _ in received[0].headers] == [
        b"host",
        b"authorization",
        b"x-forwarded-for",
        b"content-length",
    ]


@pytest.mark.parametrize(
    ("sent", "passed"),
    [(b"trailers", b"trailers"), (b"gzip, trailers;q=0.5", b"trailers"), (b"gzip", None)],
)
async def test_of_te_only_trailers_pass(sent: bytes, passed: bytes | None) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: TE\r\nTE: " + sent + b"\r\n\r\n"
        )
    assert received[0].get(b"te") == passed
    assert received[0].get(b"connection") == (b"TE" if passed else None)
