"""From a target to one of its endpoints, with real servers behind it.

What must hold: another attempt is made only if nothing of a response has been forwarded, if the
request may be sent twice (or was not sent), if its body can be sent again, and within limit, budget
and deadline. The server of a dropped response keeps its connection."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from proxy.directory import Endpoint, Target
from tests.kit.dispatch import (
    AUTOJUMP,
    BUSY,
    PUT,
    Mesh,
    breaking,
    mesh,
    policy,
    response_to,
    saying,
    silent,
    taking,
)
from tests.kit.http import GET, OK, POST, Message, Peer, Script, origin, until
from tests.kit.http2_hop import Settings2, hop2
from tests.kit.http2_peers import Answer, Peer2, answering2, speaking

# Not sent...


@pytest.mark.parametrize("request_bytes", [GET, POST], ids=["GET", "POST"])
async def test_a_request_goes_to_another_endpoint_if_the_first_cannot_be_connected_to(
    request_bytes: bytes,
) -> None:
    received: list[Message] = []
    async with mesh(
        [taking([saying(OK)] * 20, received)], policy("retries: {limit: 0}"), dead=2
    ) as (
        world,
        places,
    ):
        client = await world.hop.connect()
        for _ in range(10):
            assert (
                await client.ask(request_bytes, request_bytes.split()[0].decode())
            ).status == 200
        attempts = [attempt for tried in world.tried for attempt in tried]
        assert len(attempts) == 2, "each of the dead ones is found to be dead once"
        assert {attempt.upstream for attempt in attempts} == set(places[1:])
        assert {attempt.reason for attempt in attempts} == {"connect_refused"}
        assert world.broken == 2


async def test_if_no_endpoint_can_be_connected_to_the_client_gets_the_reason() -> None:
    async with mesh([], policy("queue: {timeout: 500ms}"), dead=2) as (world, _):
        began = trio.current_time()
        answer = await (await world.hop.connect()).ask()
        assert trio.current_time() - began >= 0.5, (
            "they were tried again as long as the request may wait"
        )
        assert answer.status == 502
        assert b"error=connection_refused" in (answer.get(b"proxy-status") or b"")


# Responses...


async def test_a_status_that_the_policy_names_is_tried_again() -> None:
    found = await response_to(GET, [saying(BUSY), saying(OK)], "retries: {statuses: [503]}")
    assert (found.status, found.body) == (200, b"ok")
    assert len(found.received) == 2
    (attempt,) = found.world.tried[0]
    assert 0 <= attempt.ended - attempt.started < 60, "the first attempt has a beginning too"
    assert (attempt.status, attempt.reason) == (503, "status")
    assert found.world.count("retries_total", cause="status") == 1


async def test_the_last_answer_is_passed_on_as_it_is() -> None:
    found = await response_to(GET, [saying(BUSY)] * 3, "retries: {statuses: [503], limit: 2}")
    assert (found.status, found.body, found.proxy_status) == (503, b"busy", b"")
    assert len(found.received) == 3
    assert found.world.count("retries_refused_total", reason="limit") == 1


@pytest.mark.parametrize(
    "rules", ["", "retries: {statuses: [500]}", "retries: {statuses: [503], limit: 0}"]
)
async def test_a_status_that_it_does_not_name_is_not(rules: str) -> None:
    found = await response_to(GET, [saying(BUSY)], rules)
    assert (found.status, len(found.received)) == (503, 1)


async def test_a_method_that_is_not_idempotent_is_tried_again_only_if_the_policy_says_so() -> None:
    assert (await response_to(POST, [saying(BUSY)], "retries: {statuses: [503]}")).status == 503
    found = await response_to(
        POST, [saying(BUSY), saying(OK)], "retries: {statuses: [503], all_methods: true}"
    )
    assert found.status == 200
    assert [message.body for message in found.received] == [b"hi", b"hi"]


async def test_a_dropped_response_leaves_its_connection_for_the_next_request() -> None:
    received: list[Message] = []
    steps = [saying(BUSY), saying(OK), saying(OK)]
    async with origin(taking(steps, received)) as server:
        world = Mesh(
            Target(
                "default/web",
                (Endpoint(server.address),),
                policy=policy("retries: {statuses: [503]}"),
            )
        )
        async with hop2(
            server.address, settings=Settings2(up=b"1.1", steer=world.steer)
        ) as world.hop:
            client = await world.hop.connect()
            assert (await client.ask()).status == 200, "the only endpoint is tried again"
            assert (await client.ask()).status == 200
            assert server.opened == 1


async def test_a_dropped_response_that_is_long_closes_only_its_connection() -> None:
    async def long(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 503 x\r\nContent-Length: 10000000\r\n\r\n" + bytes(1000))
        await peer.rest()

    found = await response_to(GET, [long, saying(OK)], "retries: {statuses: [503]}")
    assert found.status == 200


# Broken off...


async def test_an_idempotent_request_that_broke_off_is_tried_again_with_its_body() -> None:
    found = await response_to(PUT, [breaking, saying(OK)])
    assert found.status == 200
    assert [message.body for message in found.received] == [b"hi", b"hi"]
    (attempt,) = found.world.tried[0]
    assert (attempt.reason, attempt.request_bytes) == ("upstream_closed", 2)


async def test_any_other_one_is_not() -> None:
    found = await response_to(POST, [breaking])
    assert found.status == 502
    assert len(found.received) == 1


async def test_a_body_of_64_kib_is_sent_again_and_a_longer_one_is_not() -> None:
    for size, status in ((65536, 200), (65537, 502)):
        body = bytes(range(256)) * 257
        request = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, body[:size])
        found = await response_to(request, [breaking, saying(OK)])
        assert found.status == status
        if status == 200:
            assert [message.body for message in found.received] == [body[:size]] * 2
        else:
            assert found.world.count("retries_refused_total", reason="body") == 1


async def test_a_body_that_is_still_coming_is_sent_again_from_its_beginning() -> None:
    received: list[Message] = []

    async def first(peer: Peer) -> None:
        await peer.until(b"first")
        received.append(Message((b"", b""), [], b""))
        peer.reset()

    scripts: list[Script] = [first, taking([saying(OK)], received)]

    async def either(peer: Peer) -> None:
        await scripts.pop(0)(peer)

    async with mesh([either, either], policy()) as (world, _):
        client = await world.hop.connect()
        await client.send(
            b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n"
        )
        await until(lambda: len(received) == 1 and not scripts)
        await client.send(b"6\r\nsecond\r\n0\r\n\r\n")
        assert (await client.response("PUT")).status == 200
        assert received[1].body == b"firstsecond"


async def test_nothing_is_tried_again_once_a_byte_has_been_passed_on() -> None:
    async def hints(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.05)  # a reset would destroy the hints
        await breaking(peer, _)

    found = await response_to(GET, [hints])
    assert found.status == 502
    assert len(found.received) == 1


async def test_without_a_budget_nothing_is_tried_again() -> None:
    found = await response_to(GET, [breaking], "retries: {budget: {ratio: 0, min_per_second: 0}}")
    assert found.status == 502
    assert found.world.count("retries_refused_total", reason="budget") == 1


# Time...


async def test_an_attempt_that_takes_too_long_is_ended_and_another_one_starts(
    mock_clock: MockClock,
) -> None:
    mock_clock.autojump_threshold = AUTOJUMP
    found = await response_to(GET, [silent, saying(OK)], "retries: {attempt_timeout: 30s}")
    assert found.status == 200
    assert found.world.tried[0][0].reason == "upstream_timeout"


async def test_the_time_of_an_attempt_ends_with_the_head_of_its_response(
    mock_clock: MockClock,
) -> None:
    mock_clock.autojump_threshold = AUTOJUMP

    async def slow(peer: Peer, _: Message) -> None:
        await peer.send(OK[:-2])
        await trio.sleep(100)
        await peer.send(OK[-2:])

    found = await response_to(GET, [slow], "retries: {attempt_timeout: 30s}")
    assert (found.status, found.body) == (200, b"ok")


async def test_a_request_that_takes_longer_than_its_policy_allows_is_answered_504(
    mock_clock: MockClock,
) -> None:
    mock_clock.autojump_threshold = AUTOJUMP
    found = await response_to(GET, [silent], "timeouts: {request: 30s}")
    assert found.status == 504
    assert b"error=http_response_timeout" in found.proxy_status
    assert b"did not finish within 30 s" in found.proxy_status


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
         b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=["upgrade", "connect"],
)  # fmt: skip
async def test_the_time_of_a_request_ends_with_its_upgrade(
    request_bytes: bytes, answer: bytes, mock_clock: MockClock
) -> None:
    """A WebSocket lives for hours. What follows the switch is not a request any more."""
    mock_clock.autojump_threshold = AUTOJUMP

    async def server(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer)
        assert await peer.exactly(5) == b"hello"
        await trio.sleep(8)
        await peer.send(b"bye")
        await peer.rest()

    async with mesh([server], policy("timeouts: {request: 2s}")) as (world, _):
        client = await world.hop.connect()
        await client.send(request_bytes)
        assert (await client.head()).split(b" ")[1] in (b"101", b"200")
        await trio.sleep(5)
        await client.send(b"hello")
        assert await client.exactly(3) == b"bye"
        assert world.broken == 0


async def test_the_time_of_a_connect_on_a_stream_ends_with_its_2xx(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = AUTOJUMP

    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"200")])
        await peer.flush()
        await trio.sleep(8)
        await peer.send(number, b"late", end=True)

    async with mesh(
        [speaking(answering2(respond, early=True))], policy("timeouts: {request: 2s}"), up=b"2"
    ) as (world, _):
        client = await world.hop.connect2()
        number = await client.request(
            [(b":method", b"CONNECT"), (b":authority", b"a:80")], end=False
        )
        answer = await client.message(number)
        assert (answer.body, answer.reset) == (b"late", None)


async def test_a_head_that_takes_longer_than_the_policy_allows_is_answered_504() -> None:
    found = await response_to(GET, [silent], "timeouts: {response_head: 100ms}")
    assert found.status == 504
    assert b"did not answer within 0.1 s" in found.proxy_status


# Settings of a request itself...


def asking(*fields: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(f + b"\r\n" for f in fields) + b"\r\n"


async def test_limits_of_the_request_hold_where_the_policy_allows_them_and_are_never_passed_on() -> (
    None
):
    request = asking(
        b"isthmus-retry-limit: 3",
        b"Isthmus-Retry-Statuses: 503, 5xx",
        b"isthmus-timeout: 10s",
        b"x-kept: 1",
    )
    found = await response_to(request, [saying(BUSY)] * 3 + [saying(OK)], "overrides: true")
    assert (found.status, len(found.received)) == (200, 4)
    found = await response_to(request, [saying(BUSY)])
    assert (found.status, len(found.received)) == (503, 1), "the policy does not allow it"
    for message in found.received:
        assert not [name for name, _ in message.headers if name.startswith(b"isthmus-")]
        assert message.get(b"x-kept") == b"1"


async def test_a_limit_that_cannot_be_read_is_answered_400() -> None:
    for line, words in (
        (b"isthmus-timeout: 5", b"isthmus-timeout: expected a duration"),
        (b"isthmus-retry-limit: 11", b"isthmus-retry-limit: must be from 0 to 10"),
        (b"isthmus-retry-grpc: unavailable, what", b"isthmus-retry-grpc: expected a gRPC status"),
        (b"isthmus-retry-statuses: \xff", b"isthmus-retry-statuses: "),
    ):
        found = await response_to(asking(line), [], "overrides: true")
        assert found.status == 400
        assert words in found.proxy_status
        assert not found.received


@pytest.mark.parametrize(
    ("rules", "line", "status"),
    [
        ("{overrides: true, breaker: {failures: 0}}", b"isthmus-timeout: 1s", 504),
        ("{timeouts: {request: 1s}, breaker: {failures: 0}}", b"x: y", 504),
        ("{retries: {attempt_timeout: 1s}, breaker: {failures: 0}}", b"x: y", 200),
    ],
    ids=["the client's limit", "the policy's", "an attempt's"],
)
async def test_an_endpoint_that_does_not_answer_in_time_does_not_look_idle(
    rules: str, line: bytes, status: int
) -> None:
    ignored: list[Message] = []
    async with mesh(
        [taking([silent] * 20, ignored), taking([saying(OK)] * 20, [])], policy(rules)
    ) as (world, _):
        client, seen = await world.hop.connect(), []
        for _ in range(20):
            seen.append((await client.ask(asking(line))).status)
            if seen[-1] != 200:
                client = await world.hop.connect()
    assert 1 <= len(ignored) <= 5
    assert seen.count(200) >= 10
    assert status in seen
