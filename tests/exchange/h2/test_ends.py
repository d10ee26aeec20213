"""How streams and connections end: each kind of end reaches the other side as the same kind, and
what was not processed is retried."""

from __future__ import annotations

import h2.connection
import h2.errors
import pytest
import trio

from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange
from tests.kit.http import Peer, origin, until
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import (
    GET,
    GRPC,
    OK,
    POST,
    Answer,
    Pair,
    Peer2,
    answering2,
    frames_goaway,
    ok,
    reserve,
    silent,
    speaking,
)

CANCEL = h2.errors.ErrorCodes.CANCEL

REFUSED = h2.errors.ErrorCodes.REFUSED_STREAM

CALM = h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_client_that_cancels_cancels_at_the_server() -> None:
    received: list[Peer2] = []

    async def script(peer: Peer2) -> None:
        received.append(peer)
        await silent(peer)

    async with through2(script) as (client, proxy):
        number = await client.request(GET)
        await until(lambda: bool(received and received[0].opened_by_peer))
        await client.reset(number)
        await until(
            lambda: bool(received[0].ended - {0}) and received[0].messages[1].reset is not None
        )
        assert received[0].messages[1].reset == CANCEL
        await proxy.idle()
        assert proxy.outcomes == ["cancelled"]


@pytest.mark.parametrize("code", [0, 2, 8, 11, 13, 4242])
@pytest.mark.parametrize("headers", [GET, GRPC], ids=["plain", "grpc"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "behind the head"])
async def test_a_server_s_code_reaches_the_client(
    code: int, headers: list[Pair], begun: bool
) -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        if begun:
            peer.h2.send_headers(number, OK)
        peer.h2.reset_stream(number, code)
        await peer.flush()

    async with through2(answering2(respond)) as (client, proxy):
        answer = await client.ask(headers)
        assert answer.reset == code
        assert proxy.ended[0].failure == "upstream_reset"


async def test_an_http1_client_gets_502() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        await peer.reset(number, 8)

    async with origin(speaking(answering2(respond))) as up, hop2(up.address) as proxy:
        answer = await (await proxy.connect()).ask()
        assert answer.status == 502
        assert b"http_response_incomplete" in (answer.get(b"proxy-status") or b"")


async def _dies(peer: Peer2, *, begun: bool) -> None:
    await peer.next(h2.events.StreamEnded)
    if begun:
        peer.h2.send_headers(1, OK)
        peer.h2.send_data(1, b"half")
        await peer.flush()
    peer.peer.reset()


async def test_a_server_that_dies_within_a_grpc_call_leaves_a_grpc_status() -> None:
    async with through2(lambda peer: _dies(peer, begun=True)) as (client, _):
        answer = await client.ask(GRPC)
        assert (answer.status, answer.reset) == (200, None)
        assert dict(answer.trailers)[b"grpc-status"] == b"14"


async def test_a_server_that_goes_away_within_a_grpc_call_leaves_a_grpc_status_and_does_not_refuse_it() -> (
    None
):
    """REFUSED_STREAM would tell the client that the call was not processed, but it was half
    answered."""

    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        peer.h2.send_data(number, b"half")
        await peer.flush()
        await peer.peer.send(frames_goaway(0))

    async with through2(answering2(respond)) as (client, proxy):
        answer = await client.ask(GRPC)
        assert (answer.status, answer.body, answer.reset) == (200, b"half", None)
        assert dict(answer.trailers)[b"grpc-status"] == b"14"
        assert (await client.ask()).reset == h2.errors.ErrorCodes.INTERNAL_ERROR
        assert [end.failure for end in proxy.ended] == ["upstream_closed"] * 2


async def test_a_server_that_falls_silent_within_a_grpc_call_is_as_good_as_gone() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.flush()

    async with through2(
        answering2(respond), Settings2(client=ClientSettings(stream_timeout=0.1))
    ) as (client, proxy):
        answer = await client.ask(GRPC)
        assert (answer.status, answer.reset) == (200, None)
        assert dict(answer.trailers)[b"grpc-status"] == b"14"
        assert proxy.ended[0].failure == "upstream_timeout"


async def test_a_reset_followed_by_the_end_of_the_connection_is_a_reset() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        peer.h2.reset_stream(number, CALM)
        await peer.flush()
        await peer.peer.eof()

    async with through2(answering2(respond)) as (client, _):
        for _ in range(5):
            assert (await client.ask(GRPC)).reset == CALM


async def test_a_server_that_dies_within_a_response_breaks_the_stream_and_not_the_connection() -> (
    None
):
    async with through2(lambda peer: _dies(peer, begun=True)) as (client, _):
        assert (await client.ask()).reset is not None
        assert (await client.ask()).reset is not None


async def test_a_server_that_dies_before_its_answer_is_answered_for() -> None:
    async with through2(lambda peer: _dies(peer, begun=False)) as (client, _):
        call = await client.ask(GRPC)
        assert (call.status, call.reset) == (200, None)
        assert call.get(b"content-type") == b"application/grpc"
        assert call.get(b"grpc-status") == b"14"
        assert b"connection_terminated" in (call.get(b"proxy-status") or b"")
        assert (call.get(b"grpc-message") or b"").startswith(b"connection_terminated")
        assert (await client.ask()).status == 502


async def test_a_refused_connection() -> None:
    sock, address = reserve()
    with sock:
        async with hop2(address) as proxy:
            client = await proxy.connect2()
            assert (await client.ask()).status == 502
            assert (await client.ask(GRPC)).get(b"grpc-status") == b"14"


async def _refuses(peer: Peer2, *, how: str, after_body: bool = False) -> None:
    """Refuse the first requests on this connection."""
    await peer.next(h2.events.StreamEnded if after_body else h2.events.RequestReceived)
    if how == "reset":
        await peer.reset(1, REFUSED)
        await silent(peer)
    peer.h2.close_connection(last_stream_id=0)
    await peer.flush()


@pytest.mark.parametrize("headers", [GET, POST])
async def test_requests_in_flight_to_a_connection_that_goes_away_are_sent_again_on_another(
    headers: list[Pair],
) -> None:
    first = True

    async def script(peer: Peer2) -> None:
        nonlocal first
        if first:
            first = False
            await _refuses(peer, how="goaway")
        else:
            await answering2(ok)(peer)

    async with through2(script) as (client, proxy):
        assert (await client.ask(headers)).body == b"ok"
        assert proxy.ended[0].attempts == 2


async def test_that_is_done_once_and_then_the_client_may_repeat_it() -> None:
    async with through2(lambda peer: _refuses(peer, how="goaway")) as (client, proxy):
        assert (await client.ask()).reset == REFUSED
        assert proxy.ended[0].attempts == 2


async def test_a_stream_that_a_server_refuses_is_refused_to_the_client_at_once() -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if number == 1:
            await peer.reset(1, REFUSED)
        else:
            await ok(peer, number, message)

    async with through2(answering2(respond)) as (client, proxy):
        assert (await client.ask(POST)).reset == REFUSED
        assert (await client.ask(POST)).body == b"ok", "on the same connections"
        assert [end.attempts for end in proxy.ended] == [1, 1]
        assert proxy.dialled == 1


async def test_a_stream_refused_after_its_body_may_be_repeated_by_the_client() -> None:
    async with through2(lambda peer: _refuses(peer, how="reset", after_body=True)) as (
        client,
        proxy,
    ):
        number = await client.request(POST, end=False)
        await client.send(number, b"body", end=True)
        assert (await client.message(number)).reset == REFUSED
        assert proxy.ended[0].attempts == 1


async def test_after_goaway_open_streams_finish_and_new_requests_use_another_connection() -> None:
    release = trio.Event()
    connections: list[Peer2] = []

    async def script(peer: Peer2) -> None:
        connections.append(peer)

        async def respond(peer: Peer2, number: int, message: Answer) -> None:
            if message.get(b":path") == b"/slow":
                peer.h2.send_headers(number, OK)
                await peer.flush()
                await peer.peer.send(frames_goaway(number))
                await release.wait()
                await peer.send(number, b"slow", end=True)
            else:
                await ok(peer, number, message)

        await answering2(respond)(peer)

    async with through2(script) as (client, proxy):
        slow = await client.request([*GET[:3], (b":path", b"/slow")])
        while not client.messages.get(slow, Answer()).headers:
            await client.read()
        assert (await client.ask()).body == b"ok"
        assert len(connections) == 2
        release.set()
        assert (await client.message(slow)).body == b"slow"
        await until(lambda: proxy.closed == 1)


async def test_a_response_that_is_not_an_http2_message_is_a_fault_of_the_server() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, [*OK, (b"content-length", b"10")])
        await peer.send(number, b"short")
        await peer.peer.send(
            bytes((0, 0, 0, 0, 1)) + number.to_bytes(4, "big")
        )  # END_STREAM too early

    async with through2(answering2(respond)) as (client, proxy):
        assert (await client.ask()).reset is not None
        assert proxy.ended[0].failure == "upstream_protocol"


async def test_an_http1_server_where_http2_was_expected() -> None:
    async def script(peer: Peer) -> None:
        await peer.more()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    async with origin(script) as up, hop2(up.address) as proxy:
        assert (await (await proxy.connect2()).ask()).status == 502


async def test_a_fault_of_ours_in_one_exchange_ends_its_stream_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def account(exchange: Exchange) -> object:
        if exchange.request.target == b"/bug":
            raise RuntimeError("a bug")
        return trio.CancelScope()

    async with through2(answering2(), Settings2(account=account)) as (client, _):  # type: ignore[arg-type]
        assert (
            await client.ask([*GET[:3], (b":path", b"/bug")])
        ).reset == h2.errors.ErrorCodes.INTERNAL_ERROR
        assert (await client.ask()).body == b"ok"
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ([*GET, (b"connection", b"close")], "the field 'connection' is not allowed in HTTP/2"),
        (GET[:3], "a request without a valid :path"),
        (
            [*POST, (b"content-length", b"1")],
            "a message has no body, but its Content-Length is not 0",
        ),
    ],
)
async def test_a_request_that_cannot_be_read_is_reset_counted_and_named(
    head: list[Pair], words: str
) -> None:
    async with through2(answering2()) as (_, proxy):
        broken = await proxy.connect2(checked=False)
        assert (await broken.ask(head)).reset == h2.errors.ErrorCodes.PROTOCOL_ERROR
        await until(lambda: bool(proxy.ended))
        assert (proxy.ended[0].status, proxy.ended[0].failure, proxy.ended[0].words) == (
            None,
            "bad_request",
            words,
        )
        assert proxy.outcomes == ["done"]
        assert (await broken.ask()).body == b"ok"  # the connection continues
        broken.peer.close()


async def test_a_body_that_contradicts_its_head_is_the_failure_of_the_request() -> None:
    async with through2(silent) as (_, proxy):
        broken = await proxy.connect2(checked=False)
        number = await broken.request([*POST, (b"content-length", b"1")], end=False)
        await until(lambda: proxy.exchanges == 2)
        broken.h2.send_data(number, b"three")
        await broken.flush()
        await until(lambda: bool(proxy.ended))
        assert proxy.ended[0].failure == "bad_request"
        broken.peer.close()


async def test_a_request_that_is_reset_in_the_same_read_is_not_forwarded() -> None:
    told: list[int] = []

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        told.append(number)
        await ok(peer, number, message)

    async with through2(answering2(respond, early=True)) as (client, proxy):
        assert (await client.ask()).body == b"ok"
        for _ in range(5):
            number = client.h2.get_next_available_stream_id()
            client.h2.send_headers(number, GET)
            client.h2.reset_stream(number)
        await client.flush()
        assert (await client.ask()).body == b"ok"
        await proxy.idle()
        assert told == [1, 3]
        assert [ended.status for ended in proxy.ended] == [200, 200]
