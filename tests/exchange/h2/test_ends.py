"""How streams and connections end: each end reaches the other side as what it was, and what was not
looked at is tried again."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import h2.errors
import pytest
import trio

from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange
from proxy.exchange.h1.pool import PoolSettings
from proxy.exchange.h2.settings import Http2Settings
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
    speaking,
)

CANCEL = h2.errors.ErrorCodes.CANCEL
REFUSED = h2.errors.ErrorCodes.REFUSED_STREAM
CALM = h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
MAX_STREAMS = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS


async def _silent(peer: Peer2) -> None:
    while True:
        await peer.read()


async def test_a_client_that_cancels_cancels_at_the_server() -> None:
    heard: list[Peer2] = []

    async def script(peer: Peer2) -> None:
        heard.append(peer)
        await _silent(peer)

    async with through2(script) as (client, proxy):
        number = await client.request(GET)
        await until(lambda: bool(heard and heard[0].told))
        await client.reset(number)
        await until(lambda: bool(heard[0].ended - {0}) and heard[0].messages[1].reset is not None)
        assert heard[0].messages[1].reset == CANCEL
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


async def test_an_http1_client_is_told_502() -> None:
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
    """REFUSED_STREAM would tell the client that nobody has looked at what was half answered."""

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


async def test_a_reset_and_the_end_of_the_connection_behind_it_are_a_reset() -> None:
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


async def test_nobody_listens() -> None:
    sock, address = reserve()
    with sock:
        async with hop2(address) as proxy:
            client = await proxy.connect2()
            assert (await client.ask()).status == 502
            assert (await client.ask(GRPC)).get(b"grpc-status") == b"14"


async def _refuses(peer: Peer2, *, how: str, after_body: bool = False) -> None:
    """Take nothing of what is asked first on this connection."""
    await peer.next(h2.events.StreamEnded if after_body else h2.events.RequestReceived)
    if how == "reset":
        await peer.reset(1, REFUSED)
        await _silent(peer)
    peer.h2.close_connection(last_stream_id=0)
    await peer.flush()


@pytest.mark.parametrize("headers", [GET, POST])
async def test_what_was_on_its_way_to_a_connection_that_goes_away_is_sent_again_on_another(
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


async def test_what_is_refused_behind_its_body_is_the_client_s_to_repeat() -> None:
    async with through2(lambda peer: _refuses(peer, how="reset", after_body=True)) as (
        client,
        proxy,
    ):
        number = await client.request(POST, end=False)
        await client.send(number, b"body", end=True)
        assert (await client.message(number)).reset == REFUSED
        assert proxy.ended[0].attempts == 1


async def test_goaway_lets_what_is_under_way_finish_and_new_requests_go_elsewhere() -> None:
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


async def test_a_response_that_is_no_http2_message_is_the_server_s_fault() -> None:
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


@pytest.mark.parametrize("allowed", [1, 3])
async def test_no_more_streams_than_the_server_takes(allowed: int) -> None:
    most = now = 0

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        nonlocal most, now
        now += 1
        most = max(most, peer.h2.open_inbound_streams)
        await trio.sleep(0.003)
        now -= 1
        await ok(peer, number, message)

    async with through2(answering2(respond), server={MAX_STREAMS: allowed}) as (client, proxy):
        numbers = [await client.request(POST, end=False) for _ in range(90)]
        for number in numbers:
            await client.send(number, b"x", end=True)
        with trio.fail_after(60):
            for number in numbers:
                assert (await client.message(number)).body == b"ok"
        assert most <= allowed
        assert proxy.dialled <= 16
        assert {e.failure for e in proxy.ended} == {None}


async def test_a_request_waits_for_a_stream_so_long_and_no_longer() -> None:
    settings = Settings2(pool=PoolSettings(wait_timeout=0.1))
    async with through2(_silent, settings, server={MAX_STREAMS: 1}) as (client, proxy):
        for number in range(1, 17):
            await client.request(GET)
            await until(
                lambda most=2 * number: proxy.exchanges == most
            )  # each has a connection before the next one asks for one
        with trio.fail_after(20):
            answer = await client.ask()
        assert answer.status == 503
        assert b"connection_limit_reached" in (answer.get(b"proxy-status") or b"")


async def test_while_a_connection_is_being_opened_no_stream_is_refused_for_want_of_it() -> None:
    settings = Settings2(pool=PoolSettings(wait_timeout=0.05))
    async with (
        origin(speaking(answering2(), {MAX_STREAMS: 10})) as server,
        hop2(server.address, settings=settings) as proxy,
    ):
        client = await proxy.connect2()
        proxy.hangs = trio.Event()
        numbers = [await client.request(GET) for _ in range(90)]
        await until(lambda: proxy.exchanges == 90)
        await trio.sleep(0.2)  # four times as long as one waits for a stream
        assert not client.ended
        proxy.hangs.set()
        assert {(await client.message(number)).status for number in numbers} == {200}
        assert proxy.dialled > 1, "one connection has room for ten of them"


async def test_one_dial_that_fails_fails_for_all_who_waited_for_it() -> None:
    sock, address = reserve()
    with sock:
        async with hop2(address) as proxy:
            client = await proxy.connect2()
            proxy.hangs = trio.Event()
            numbers = [await client.request(GET) for _ in range(20)]
            await until(lambda: proxy.exchanges == 20)
            slot = next(iter(proxy.pool2._slots.values()))
            await until(lambda: len(slot.waiting) == 19)
            proxy.hangs.set()
            assert {(await client.message(number)).status for number in numbers} == {502}
            assert not proxy.pool2._slots


async def test_a_closed_pool_lets_each_connection_go_behind_its_last_stream() -> None:
    async with through2(answering2()) as (client, proxy):
        for dialled in (1, 2, 3):  # the first before it is closed
            assert (await client.ask()).body == b"ok"
            assert proxy.dialled == dialled
            if dialled == 1:
                proxy.pool2.close()
            await until(lambda: not proxy.pool2._slots)


async def test_trimming_retires_connections_without_a_stream() -> None:
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":path") == b"/slow":
            await release.wait()
        await ok(peer, number, message)

    async with through2(answering2(respond)) as (client, proxy):
        slow = await client.request([*GET[:3], (b":path", b"/slow")])
        await until(lambda: proxy.exchanges == 2)
        proxy.pool2.trim({})
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 1, "it has a stream, so it goes on"
        release.set()
        assert (await client.message(slow)).body == b"ok"
        proxy.pool2.trim(dict.fromkeys(proxy.targets, 1))
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 1
        proxy.pool2.trim({})
        await until(lambda: not proxy.pool2._slots)


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


async def test_draining_says_goaway_serves_what_crosses_with_it_and_takes_nothing_behind_it() -> (
    None
):
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        await release.wait()
        await ok(peer, number, message)

    async with through2(answering2(respond)) as (client, proxy):
        await client.request(GET)
        await until(lambda: proxy.exchanges == 2)
        proxy.drain.begin()
        crossing = [await client.request(GET) for _ in range(5)]
        answer = await client.last_call()
        await until(lambda: proxy.servers[0].mux.http.open_streams == 6)
        await answer()
        await client.peer.until(frames_goaway(crossing[-1]))
        late = await client.request(GET)
        await client.peer.until(
            b"\0\0\x04\x03\0" + late.to_bytes(4, "big") + REFUSED.to_bytes(4, "big")
        )
        release.set()
        assert (await client.peer.rest()).count(b"ok") == 6
        client.peer.close()
        await proxy.gone()


async def test_a_new_connection_while_draining_has_all_served_that_was_sent_before_it_could_know() -> (
    None
):
    """Not its first request alone: a client sends its calls together, and repeats a refused one
    only once."""
    async with through2(answering2()) as (client, proxy):
        proxy.drain.begin()
        for _ in range(5):
            await client.request(GET)
        answer = await client.last_call()
        await until(lambda: len(proxy.ended) == 5)
        await answer()
        await client.peer.rest()
        client.peer.close()
        await proxy.gone()
        assert [each.failure for each in proxy.ended] == [None] * 5


async def test_a_silent_server_is_given_up_and_an_idle_client_told_to_go(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.06
    settings = Settings2(upstream=Http2Settings(ping_interval=20, ping_timeout=10))
    settings.downstream = Http2Settings(idle_timeout=90, ping_interval=1e6)

    async def deaf(peer: Peer2) -> None:
        await peer.next(h2.events.RequestReceived)
        await trio.sleep_forever()

    async with through2(deaf, settings) as (client, _):
        started = trio.current_time()
        answer = await client.ask()
        assert answer.status == 502
        assert trio.current_time() - started == pytest.approx(30, abs=6)
        started = trio.current_time()
        answer = await client.last_call()
        assert trio.current_time() - started == pytest.approx(90, abs=3)
        await answer()
        await client.peer.rest()


async def test_a_connection_that_is_too_old_takes_nothing_new_and_finishes() -> None:
    async with through2(answering2(), Settings2(pool=PoolSettings(max_age=0))) as (client, proxy):
        await client.ask()
        await until(lambda: proxy.pool2.sweep() == 1)
        await until(lambda: proxy.closed == 1)
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 2


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    settings = Settings2()

    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.send(number, bytes(200_000), end=True)

    settings.server = replace(settings.server, write_timeout=0.2)
    async with through2(answering2(respond), settings) as (client, proxy):
        number = await client.request(GET)
        with trio.fail_after(30):
            while number not in client.ended:
                await client.read()
        assert client.messages[number].reset is not None
        assert proxy.ended[0].failure == "client_gone"


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
        assert (await broken.ask()).body == b"ok"  # the connection goes on
        broken.peer.close()


async def test_a_body_that_breaks_its_promise_is_what_became_of_the_request() -> None:
    async with through2(_silent) as (_, proxy):
        broken = await proxy.connect2(checked=False)
        number = await broken.request([*POST, (b"content-length", b"1")], end=False)
        await until(lambda: proxy.exchanges == 2)
        broken.h2.send_data(number, b"three")
        await broken.flush()
        await until(lambda: bool(proxy.ended))
        assert proxy.ended[0].failure == "bad_request"
        broken.peer.close()


async def test_a_client_that_never_answers_the_goodbye_cannot_hold_its_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It goes on sending, so it is not silent; and new streams are as many as it likes, until we
    have said GOAWAY for good."""
    autojump_clock.autojump_threshold = 0.06
    settings = Settings2(
        downstream=Http2Settings(idle_timeout=5, ping_interval=20, ping_timeout=10)
    )
    async with through2(answering2(), settings) as (client, proxy):
        await client.ask()
        await client.last_call()
        started = trio.current_time()
        while proxy.acceptor.open and trio.current_time() < started + 1000:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.peer.send(b"\0\0\x08\x06\0\0\0\0\0anything")
            await trio.sleep(3)
        assert trio.current_time() - started < 60


async def test_a_request_that_is_taken_back_in_the_same_breath_is_not_sent_on() -> None:
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
