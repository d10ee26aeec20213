"""Endpoints with open circuits, with real servers behind them: which circuits open, which requests
wait, which fail at once, and which one is the trial.

What must hold: if no endpoint can be used the client gets the reason, at once if waiting is
useless. Waiting requests are served in order, and their number is bounded. Connections are treated
like requests."""

from __future__ import annotations

from functools import partial

import h2.errors
import pytest
import trio
from trio.testing import MockClock

from proxy.directory import Endpoint, Target
from proxy.errors import AllCircuitsOpen, NoEndpoint, QueueFull
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed
from proxy.net.socket_stream import Stream
from tests.kit.dispatch import (
    AUTOJUMP,
    BUSY,
    CLOSED,
    NOT_LISTENING,
    PUT,
    Step,
    breaking,
    mesh,
    policy,
    saying,
    silent,
    taking,
)
from tests.kit.http import GET, OK, Message, Peer, answering, origin, until
from tests.kit.http2_peers import Answer, Peer2, answering2, reserve, speaking


async def test_an_endpoint_that_fails_in_a_row_is_left_alone_and_used_again_when_it_has_recovered() -> (
    None
):
    received: list[Message] = []
    rules = policy(
        "{retries: {limit: 0}, breaker: {failures: 3, min_penalty: 50ms, jitter: 0}, queue:"
        " {timeout: 20s}}"
    )
    steps = [
        saying(NOT_LISTENING),
        saying(NOT_LISTENING),
        saying(NOT_LISTENING),
        saying(OK),
        saying(OK),
    ]
    async with mesh([taking(steps, received)], rules) as (world, _):
        client = await world.hop.connect()
        assert [(await client.ask()).status for _ in range(3)] == [502] * 3
        assert world.broken == 1
        assert (await client.ask()).status == 200, "it waited, and was the trial request"
        assert world.broken == 0
        assert world.count("queued_total", result="served") == 1
        assert [
            world.count("breaker_changes_total", state=state)
            for state in ("open", "half_open", "closed")
        ] == [1, 1, 1]


@pytest.mark.parametrize(
    ("poison", "status"),
    [
        (breaking, 502),
        (saying(BUSY), 503),
        (saying(CLOSED), 502),
    ],
    ids=["closing", "by 503", "closing, as its sidecar says"],
)
async def test_requests_that_the_only_endpoint_answers_badly_do_not_take_it_from_others(
    poison: Step, status: int
) -> None:
    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            await (poison if request.start[1] == b"/poison" else saying(OK))(peer, request)

    async with mesh([script], policy("retries: {limit: 0}")) as (world, _):
        client, other = await world.hop.connect(), await world.hop.connect()
        for _ in range(40):
            assert (await client.ask(GET.replace(b"/", b"/poison", 1))).status == status
        assert world.broken == 1, "others would be preferred"
        assert [(await other.ask()).status for _ in range(3)] == [200] * 3
        assert world.broken == 0
        assert world.count("queued_total", result="served") == 0
        assert world.count("breaker_changes_total", state="open") <= 2, (
            "and it does not flap with each of them"
        )


async def test_the_circuit_breaker_of_a_silent_endpoint_opens_although_it_is_the_only_one(
    mock_clock: MockClock,
) -> None:
    mock_clock.autojump_threshold = AUTOJUMP
    rules = policy(
        "{timeouts: {response_head: 5s}, breaker: {failures: 3, min_penalty: 1m}, queue:"
        " {timeout: 1s}, retries: {limit: 0}}"
    )
    received: list[Message] = []
    async with mesh([taking([silent] * 5, received)], rules) as (world, _):
        seen = [(await (await world.hop.connect()).ask()).status for _ in range(5)]
        assert seen == [504] * 3 + [503] * 2
        assert len(received) == 3


async def test_statuses_that_are_the_requests_own_fault_do_not_count() -> None:
    steps = [
        saying(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)
        for status in (400, 404, 500, 501)
    ] * 5
    async with mesh([taking(steps, [])], policy()) as (world, _):
        client = await world.hop.connect()
        for _ in range(20):
            await client.ask()
        assert world.broken == 0


@pytest.mark.parametrize(
    "code", [h2.errors.ErrorCodes.PROTOCOL_ERROR, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM]
)
@pytest.mark.parametrize("version", [1, 2])
async def test_a_request_that_a_server_of_http2_does_not_accept_is_sent_once_and_does_not_count(
    version: int, code: int
) -> None:
    """RFC 9113 §8.1.1: it is malformed, or too large. Only the client can correct it."""
    received: list[Answer] = []

    async def resets(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await peer.reset(number, code)

    async with mesh([speaking(answering2(resets))] * 2, policy("retries: {limit: 3}"), up=b"2") as (
        world,
        _,
    ):
        first, second = await world.hop.connect(), await world.hop.connect2()
        for _ in range(20):
            if version == 1:
                assert (await first.ask()).status == 502
            else:
                assert (await second.ask()).reset == code
        assert len(received) == 20
        assert world.broken == 0


async def test_a_client_that_is_too_slow_for_the_deadline_of_its_request_does_not_count(
    mock_clock: MockClock,
) -> None:
    mock_clock.autojump_threshold = AUTOJUMP

    async def reads(peer: Peer) -> None:
        await peer.rest()

    rules = policy(
        "{timeouts: {request: 5s}, breaker: {failures: 3, min_penalty: 1m}, queue: {timeout: 0s}}"
    )
    async with mesh([reads], rules) as (world, _):
        for _ in range(6):
            client = await world.hop.connect()
            await client.send(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nslow")
            assert (await client.response("PUT")).status == 504
        assert world.broken == 0
    async with mesh([reads], rules) as (world, _):
        for _ in range(3):  # and a server that is, does
            assert (await (await world.hop.connect()).ask(PUT, "PUT")).status == 504
        assert world.broken == 1


async def test_a_request_waits_for_an_early_trial_in_a_short_outage_and_fails_at_once_in_a_long_one() -> (
    None
):
    rules = policy(
        "{breaker: {failures: 1, min_penalty: 50ms, jitter: 0}, queue: {timeout: 20s}, retries:"
        " {limit: 0}}"
    )
    async with mesh(
        [taking([saying(NOT_LISTENING), saying(NOT_LISTENING), saying(OK)], [])], rules
    ) as (
        world,
        _,
    ):
        client, endpoint_set = await world.hop.connect(), world.balancer.endpoint_set("default/web")
        assert (await client.ask()).status == 502
        (breaker,) = endpoint_set.broken.values()
        breaker.until = (
            trio.current_time() + 10
        )  # it has failed more often: less than the maximum wait
        endpoint_set._changes += 1
        assert [(await client.ask()).status for _ in range(2)] == [
            502,
            200,
        ], "the second one waited, and not for 10 s"
        assert world.count("queued_total", result="served") == 2
        assert not endpoint_set.broken


async def test_after_a_long_outage_all_wait_for_one_trial_and_fail_if_it_fails() -> None:
    received: list[Message] = []
    rules = policy(
        "{breaker: {failures: 1, min_penalty: 1s, jitter: 0}, queue: {timeout: 10s}, retries:"
        " {limit: 0}}"
    )
    async with mesh(
        [taking([saying(NOT_LISTENING), saying(NOT_LISTENING)] + [saying(OK)] * 9, received)], rules
    ) as (world, _):
        clients, endpoint_set = (
            [await world.hop.connect() for _ in range(4)],
            world.balancer.endpoint_set("default/web"),
        )
        assert (await clients[0].ask()).status == 502
        (breaker,) = endpoint_set.broken.values()
        breaker.until = trio.current_time() + 3600
        endpoint_set._changes += 1
        with trio.fail_after(8):  # and not for 10 s
            for number, client in enumerate(clients):
                await client.send(GET)
                await until(lambda number=number: world.balancer.waiting() == number + 1)  # type: ignore[misc]
            statuses = [(await client.response()).status for client in clients]
            assert statuses == [502, 503, 503, 503], "one was the trial"
            assert len(received) == 2
            for client in clients:
                await client.send(GET)
            assert [(await client.response()).status for client in clients] == [200] * 4
        assert world.balancer.waiting() == 0


async def test_no_request_fails_because_of_a_trial_from_before_the_service_came_back() -> None:
    """Requests whose time is over between the return and the next trial wait for that one, and so
    do those that arrive in between."""
    rules = policy("{breaker: {connect_penalty: 600ms, jitter: 0}, queue: {timeout: 2s}}")
    taken, place = reserve()
    async with mesh([], rules, dead=1) as (world, _):
        world.target = Target("default/web", (Endpoint(place),), policy=rules)
        statuses: list[int] = []

        async def ask() -> None:
            client = await world.hop.connect()
            statuses.append((await client.ask()).status)
            client.close()

        async with trio.open_nursery() as asking:
            began = trio.current_time()
            for _ in range(40):
                asking.start_soon(ask)
                await trio.sleep(0.01)
            await trio.sleep_until(began + 1.9)
            assert not statuses, "the first one waits like the others"
            # The last trial was at 1.8 s, the next one is at 2.4 s.
            async with origin(answering(), listener=taken):
                for _ in range(20):
                    asking.start_soon(ask)
                    await trio.sleep(0.01)
                await until(lambda: len(statuses) == 60)
        assert statuses == [200] * 60
        assert not world.broken


async def test_if_all_circuits_are_open_for_longer_than_the_maximum_wait_the_request_fails_at_once() -> (
    None
):
    async with mesh(
        [],
        policy("{breaker: {min_penalty: 1m, connect_penalty: 1m}, queue: {timeout: 30s}}"),
        dead=2,
    ) as (world, _):
        client = await world.hop.connect()
        assert (await client.ask()).status == 502
        with trio.fail_after(20):  # and not for 30 s
            answer = await client.ask()
        assert answer.status == 503
        assert b"error=destination_unavailable" in (answer.get(b"proxy-status") or b"")
        words = (
            b"the circuit breakers of all 2 endpoints of default/web are open (last failure:"
            b" connect_refused); the next trial is in"
        )
        assert words in (answer.get(b"proxy-status") or b"")
        assert world.hop.ended[-1].failure == "circuit_open"


async def test_a_service_without_endpoints_fails_at_once() -> None:
    async with mesh([], policy(), dead=1) as (world, _):
        world.target = Target("default/web", ())
        answer = await (await world.hop.connect()).ask()
        assert answer.status == 503
        assert world.hop.ended[0].failure == "no_endpoint"


async def test_the_number_of_waiting_requests_is_bounded_and_they_fail_when_the_trial_fails() -> (
    None
):
    release = trio.Event()
    received: list[Message] = []

    async def probed(peer: Peer, _: Message) -> None:
        await release.wait()
        await peer.send(NOT_LISTENING)

    rules = policy(
        "{breaker: {failures: 1, min_penalty: 1m, jitter: 0}, queue: {size: 1, timeout: 2500ms},"
        " retries: {limit: 0}}"
    )
    async with mesh([taking([saying(NOT_LISTENING), probed], received)], rules) as (world, _):
        clients = [await world.hop.connect() for _ in range(3)]
        assert (await clients[0].ask()).status == 502
        (breaker,) = world.balancer.endpoint_set("default/web").broken.values()
        breaker.until = 0.0  # its open time is over, and a step is still a minute
        world.balancer.endpoint_set("default/web")._changes += 1
        await clients[0].send(GET)
        await until(lambda: len(received) == 2)  # half open
        await clients[1].send(GET)
        await until(lambda: world.balancer.waiting() == 1)
        answer = await clients[2].ask()
        assert answer.status == 503
        assert b"error=connection_limit_reached" in (answer.get(b"proxy-status") or b"")
        assert world.hop.ended[-1].failure == "queue_full"
        assert (await clients[1].response()).status == 503
        assert world.hop.ended[-1].failure == "circuit_open"
        assert world.balancer.waiting() == 0
        release.set()
        assert (await clients[0].response()).body == b"none"


async def test_who_waits_is_served_when_the_directory_has_something_new() -> None:
    rules = policy("{breaker: {min_penalty: 1m, jitter: 0}, queue: {timeout: 2m}}")
    async with mesh([taking([saying(OK)], [])], rules, dead=1) as (world, _):
        alive, dead = world.target.endpoints
        world.target = Target("default/web", (dead,), policy=world.target.policy)
        client = await world.hop.connect()
        await client.send(GET)
        await until(lambda: world.balancer.waiting() == 1)
        world.target = Target("default/web", (alive, dead), policy=world.target.policy)
        world.dispatcher.changed()
        with trio.fail_after(30):
            assert (await client.response()).status == 200


async def test_waiting_requests_are_served_in_order_when_the_endpoint_has_recovered() -> None:
    received: list[Message] = []
    rules = policy(
        "{breaker: {failures: 1, min_penalty: 100ms, jitter: 0}, queue: {timeout: 20s}, retries:"
        " {limit: 0}}"
    )
    async with mesh([taking([saying(NOT_LISTENING)] + [saying(OK)] * 20, received)], rules) as (
        world,
        _,
    ):
        first = await world.hop.connect()
        assert (await first.ask()).status == 502
        clients = [await world.hop.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            await client.send(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            if world.broken:
                await until(
                    partial(
                        lambda most: world.balancer.waiting() > most or not world.broken, number
                    )
                )
        for client in clients:
            assert (await client.response()).status == 200


async def test_an_address_of_no_service_is_connected_to_as_without_a_proxy() -> None:
    async with mesh([], policy(), dead=1) as (world, places):
        world.target = Target(None, (Endpoint(places[0]),))
        client = await world.hop.connect()
        for _ in range(3):
            assert (await client.ask()).status == 502
        assert world.broken == 0


# Connections...


async def test_a_connection_goes_to_another_endpoint_if_the_first_cannot_be_connected_to() -> None:
    dialer = Dialer(timeout=5)

    async def connect(_: Target, endpoint: Endpoint) -> Stream:
        return await dialer.dial(endpoint.address)

    async with mesh(
        [taking([saying(OK)] * 9, [])],
        policy("breaker: {min_penalty: 1m, connect_penalty: 1m}"),
        dead=1,
    ) as (world, places):
        for _ in range(8):
            async with world.dispatcher.connection(lambda: world.target, connect) as stream:
                assert stream.peer == places[0]
                assert world.balancer.endpoint_set("default/web").outstanding(places[0]) == 1
                stream.close()
        assert world.broken == 1
        world.target = Target("default/web", world.target.endpoints[1:], policy=world.target.policy)
        with pytest.raises(AllCircuitsOpen):
            async with world.dispatcher.connection(lambda: world.target, connect):
                pass
        world.target = Target("default/web", ())
        with pytest.raises(NoEndpoint):
            async with world.dispatcher.connection(lambda: world.target, connect):
                pass


async def test_connections_wait_in_the_same_queue() -> None:
    async def refused(_: Target, endpoint: Endpoint) -> Stream:
        raise ConnectFailed(endpoint.address, "refused", "refused")

    async with mesh(
        [], policy("{queue: {size: 0, timeout: 10s}, breaker: {min_penalty: 1s}}"), dead=1
    ) as (world, _):
        with pytest.raises(ConnectFailed):
            async with world.dispatcher.connection(lambda: world.target, refused):
                pass
        with pytest.raises(QueueFull):
            async with world.dispatcher.connection(lambda: world.target, refused):
                pass
