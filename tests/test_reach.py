"""From a target to one of its endpoints, with real servers behind it.

What must hold: another attempt is made only if nothing of a response has been passed on, if the request may be sent twice (or was not
sent), if its body can be sent again, and within limit, budget and deadline; the server of a dropped response keeps its connection; where
nothing can be used the client is told why, at once if waiting is in vain.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from proxy.errors import AllBroken, NoEndpoint, QueueFull
from proxy.exchange.client import ClientSettings
from proxy.exchange.exchange import Attempt, Exchange
from proxy.mesh.balance import Balancer
from proxy.mesh.directory import Endpoint, Target
from proxy.mesh.document import Mistakes, load
from proxy.mesh.policy import Policy, read_policy
from proxy.metrics import Metrics
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.errors import ConnectFailed
from proxy.net.streams import Stream
from proxy.reach import Reach
from tests.kit.http import GET, OK, POST, Message, Peer, Script, listen, origin, until
from tests.kit.http2_hop import Hop2, Settings2, hop2
from tests.kit.http2_peers import GRPC, Answer, Peer2, answering2, speaking

PUT = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
# Of a sidecar whose application has closed, and of one that quotes somebody.
CLOSED = b'HTTP/1.1 502 x\r\nProxy-Status: a;error=connection_terminated;details="b;error=connection_refused"\r\nContent-Length: 0\r\n\r\n'
# Of a sidecar whose application does not listen.
UNHEARD = b"HTTP/1.1 502 Bad Gateway\r\nProxy-Status: web-1.default.inbound;error=connection_refused\r\nContent-Length: 4\r\n\r\nnone"


def policy(text: str = "") -> Policy:
    mistakes = Mistakes()
    found = read_policy(load(text, "test"), "policy", mistakes)
    assert not mistakes, mistakes.found()
    return found


@dataclass
class Mesh:
    """A proxy, its balancer, and what it has done."""

    target: Target
    metrics: Metrics = field(default_factory=Metrics)
    balancer: Balancer = field(default_factory=lambda: Balancer(trio.current_time, random.Random(5)))
    tried: list[list[Attempt]] = field(default_factory=list)
    hop: Hop2 = field(init=False)

    def __post_init__(self) -> None:
        self.reach = Reach(self.balancer, self.metrics, ClientSettings())

    async def steer(self, exchange: Exchange, send: Callable[[Address], Awaitable[None]]) -> None:
        async def to(exchange: Exchange, _: Target, endpoint: Endpoint) -> None:
            exchange.upstream = endpoint.address
            await send(endpoint.address)

        try:
            await self.reach.exchange(exchange, lambda _: self.target, to)
        finally:
            self.tried.append(exchange.tried or [])

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"isthmus_{name}", labels) or 0.0

    @property
    def broken(self) -> int:
        return len(list(self.balancer.broken()))


@asynccontextmanager
async def mesh(scripts: list[Script], rules: Policy, *, dead: int = 0, up: bytes = b"1.1") -> AsyncIterator[tuple[Mesh, list[Address]]]:
    """A proxy to servers that run `scripts`, and to so many addresses where nobody listens."""
    async with AsyncExitStack() as stack:
        places = [(await stack.enter_async_context(origin(script))).address for script in scripts]
        for _ in range(dead):
            with listen() as reserved:
                places.append(Address.of(reserved.getsockname()))
        world = Mesh(Target("default/web", tuple(Endpoint(place) for place in places), policy=rules))
        world.hop = await stack.enter_async_context(hop2(*places, settings=Settings2(up=up, steer=world.steer)))
        yield world, places


Step = Callable[[Peer, Message], Awaitable[None]]


def saying(data: bytes) -> Step:
    async def step(peer: Peer, _: Message) -> None:
        await peer.send(data)

    return step


async def breaking(peer: Peer, _: Message) -> None:
    peer.reset()
    raise trio.BrokenResourceError


async def silent(_: Peer, __: Message) -> None:
    await trio.sleep_forever()


def taking(steps: list[Step], heard: list[Message]) -> Script:
    """A server that answers its requests one after the other as `steps` say, which all its connections, and other servers, use up."""

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            heard.append(request)
            await steps.pop(0)(peer, request)

    return script


@dataclass
class Told:
    status: int
    body: bytes
    proxy_status: bytes
    heard: list[Message]
    world: Mesh


async def told(request: bytes, steps: list[Step], rules: str = "", *, servers: int = 2) -> Told:
    """What a client is told if the servers, whichever is asked, do these things one after the other."""
    heard: list[Message] = []
    async with mesh([taking(steps, heard)] * servers, policy(rules)) as (world, _):
        client = await world.hop.connect()
        answer = await client.ask(request, request.split()[0].decode())
        return Told(answer.status, answer.body, answer.get(b"proxy-status") or b"", heard, world)


# Not sent...


@pytest.mark.parametrize("request_bytes", [GET, POST], ids=["GET", "POST"])
async def test_a_request_goes_to_another_endpoint_if_the_first_cannot_be_connected_to(request_bytes: bytes) -> None:
    heard: list[Message] = []
    async with mesh([taking([saying(OK)] * 20, heard)], policy("retries: {limit: 0}"), dead=2) as (world, places):
        client = await world.hop.connect()
        for _ in range(10):
            assert (await client.ask(request_bytes, request_bytes.split()[0].decode())).status == 200
        attempts = [attempt for tried in world.tried for attempt in tried]
        assert len(attempts) == 2, "each of the dead ones is found to be dead once"
        assert {attempt.upstream for attempt in attempts} == set(places[1:])
        assert {attempt.reason for attempt in attempts} == {"connect_refused"}
        assert world.broken == 2


async def test_if_none_can_be_connected_to_the_client_is_told_so() -> None:
    async with mesh([], policy(), dead=2) as (world, _):
        answer = await (await world.hop.connect()).ask()
        assert answer.status == 502
        assert b"error=connection_refused" in (answer.get(b"proxy-status") or b"")


# Answered...


async def test_a_status_that_the_policy_names_is_tried_again() -> None:
    found = await told(GET, [saying(BUSY), saying(OK)], "retries: {statuses: [503]}")
    assert (found.status, found.body) == (200, b"ok")
    assert len(found.heard) == 2
    (attempt,) = found.world.tried[0]
    assert (attempt.status, attempt.reason) == (503, "status")
    assert found.world.count("retries_total", cause="status") == 1


async def test_the_last_answer_is_passed_on_as_it_is() -> None:
    found = await told(GET, [saying(BUSY)] * 3, "retries: {statuses: [503], limit: 2}")
    assert (found.status, found.body, found.proxy_status) == (503, b"busy", b"")
    assert len(found.heard) == 3
    assert found.world.count("retries_refused_total", reason="limit") == 1


@pytest.mark.parametrize("rules", ["", "retries: {statuses: [500]}", "retries: {statuses: [503], limit: 0}"])
async def test_a_status_that_it_does_not_name_is_not(rules: str) -> None:
    found = await told(GET, [saying(BUSY)], rules)
    assert (found.status, len(found.heard)) == (503, 1)


async def test_a_method_that_is_not_idempotent_is_tried_again_only_if_the_policy_says_so() -> None:
    assert (await told(POST, [saying(BUSY)], "retries: {statuses: [503]}")).status == 503
    found = await told(POST, [saying(BUSY), saying(OK)], "retries: {statuses: [503], all_methods: true}")
    assert found.status == 200
    assert [message.body for message in found.heard] == [b"hi", b"hi"]


async def test_a_dropped_response_leaves_its_connection_for_the_next_request() -> None:
    heard: list[Message] = []
    steps = [saying(BUSY), saying(OK), saying(OK)]
    async with origin(taking(steps, heard)) as server:
        world = Mesh(Target("default/web", (Endpoint(server.address),), policy=policy("retries: {statuses: [503]}")))
        async with hop2(server.address, settings=Settings2(up=b"1.1", steer=world.steer)) as world.hop:
            client = await world.hop.connect()
            assert (await client.ask()).status == 200, "the only endpoint is asked again"
            assert (await client.ask()).status == 200
            assert server.opened == 1


async def test_a_dropped_response_that_is_long_costs_its_connection_and_nothing_else() -> None:
    async def long(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 503 x\r\nContent-Length: 10000000\r\n\r\n" + bytes(1000))
        await peer.rest()

    found = await told(GET, [long, saying(OK)], "retries: {statuses: [503]}")
    assert found.status == 200


# Broken off...


async def test_an_idempotent_request_that_broke_off_is_tried_again_with_its_body() -> None:
    found = await told(PUT, [breaking, saying(OK)])
    assert found.status == 200
    assert [message.body for message in found.heard] == [b"hi", b"hi"]
    assert found.world.tried[0][0].reason == "upstream_closed"


async def test_any_other_one_is_not() -> None:
    found = await told(POST, [breaking])
    assert found.status == 502
    assert len(found.heard) == 1


async def test_a_body_of_64_kib_is_sent_again_and_a_longer_one_is_not() -> None:
    for size, status in ((65536, 200), (65537, 502)):
        body = bytes(range(256)) * 257
        request = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, body[:size])
        found = await told(request, [breaking, saying(OK)])
        assert found.status == status
        if status == 200:
            assert [message.body for message in found.heard] == [body[:size]] * 2
        else:
            assert found.world.count("retries_refused_total", reason="body") == 1


async def test_a_body_that_is_still_coming_is_sent_again_from_its_beginning() -> None:
    heard: list[Message] = []

    async def first(peer: Peer) -> None:
        await peer.until(b"first")
        heard.append(Message((b"", b""), [], b""))
        peer.reset()

    scripts: list[Script] = [first, taking([saying(OK)], heard)]

    async def either(peer: Peer) -> None:
        await scripts.pop(0)(peer)

    async with mesh([either, either], policy()) as (world, _):
        client = await world.hop.connect()
        await client.send(b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await until(lambda: len(heard) == 1 and not scripts)
        await client.send(b"6\r\nsecond\r\n0\r\n\r\n")
        assert (await client.response("PUT")).status == 200
        assert heard[1].body == b"firstsecond"


async def test_nothing_is_tried_again_once_a_byte_has_been_passed_on() -> None:
    async def hints(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.05)  # a reset would take the hints with it
        await breaking(peer, _)

    found = await told(GET, [hints])
    assert found.status == 502
    assert len(found.heard) == 1


async def test_without_a_budget_nothing_is_tried_again() -> None:
    found = await told(GET, [breaking], "retries: {budget: {ratio: 0, min_per_second: 0}}")
    assert found.status == 502
    assert found.world.count("retries_refused_total", reason="budget") == 1


# Time...


async def test_an_attempt_that_takes_too_long_is_given_up_for_another() -> None:
    found = await told(GET, [silent, saying(OK)], "retries: {attempt_timeout: 50ms}")
    assert found.status == 200
    assert found.world.tried[0][0].reason == "upstream_timeout"


async def test_the_time_of_an_attempt_ends_with_the_head_of_its_response() -> None:
    async def slow(peer: Peer, _: Message) -> None:
        await peer.send(OK[:-2])
        await trio.sleep(0.3)
        await peer.send(OK[-2:])

    found = await told(GET, [slow], "retries: {attempt_timeout: 100ms}")
    assert (found.status, found.body) == (200, b"ok")


async def test_a_request_that_takes_longer_than_its_policy_allows_is_answered_504() -> None:
    found = await told(GET, [silent], "timeouts: {request: 100ms}")
    assert found.status == 504
    assert b"error=http_response_timeout" in found.proxy_status
    assert b"not over within 0.1 s" in found.proxy_status


async def test_a_head_that_takes_longer_than_the_policy_allows_is_answered_504() -> None:
    found = await told(GET, [silent], "timeouts: {response_head: 100ms}")
    assert found.status == 504
    assert b"did not answer within 0.1 s" in found.proxy_status


# What a request says itself...


def asking(*fields: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(f + b"\r\n" for f in fields) + b"\r\n"


async def test_limits_of_the_request_hold_where_the_policy_allows_them_and_are_never_passed_on() -> None:
    request = asking(b"isthmus-retry-limit: 3", b"Isthmus-Retry-Statuses: 503, 5xx", b"isthmus-timeout: 10s", b"x-kept: 1")
    found = await told(request, [saying(BUSY)] * 3 + [saying(OK)], "overrides: true")
    assert (found.status, len(found.heard)) == (200, 4)
    found = await told(request, [saying(BUSY)])
    assert (found.status, len(found.heard)) == (503, 1), "the policy does not allow it"
    for message in found.heard:
        assert not [name for name, _ in message.headers if name.startswith(b"isthmus-")]
        assert message.get(b"x-kept") == b"1"


async def test_a_limit_that_cannot_be_read_is_answered_400() -> None:
    for line, words in (
        (b"isthmus-timeout: 5", b"isthmus-timeout: expected a duration"),
        (b"isthmus-retry-limit: 11", b"isthmus-retry-limit: must be from 0 to 10"),
        (b"isthmus-retry-grpc: unavailable, what", b"isthmus-retry-grpc: expected a gRPC status"),
        (b"isthmus-retry-statuses: \xff", b"isthmus-retry-statuses: "),
    ):
        found = await told(asking(line), [], "overrides: true")
        assert found.status == 400
        assert words in found.proxy_status
        assert not found.heard


@pytest.mark.parametrize(
    ("rules", "line", "status"),
    [
        ("{overrides: true, breaker: {failures: 0}}", b"isthmus-timeout: 1s", 504),
        ("{timeouts: {request: 1s}, breaker: {failures: 0}}", b"x: y", 504),
        ("{retries: {attempt_timeout: 1s}, breaker: {failures: 0}}", b"x: y", 200),
    ],
    ids=["the client's limit", "the policy's", "an attempt's"],
)
async def test_an_endpoint_that_does_not_answer_in_time_does_not_look_idle(rules: str, line: bytes, status: int) -> None:
    ignored: list[Message] = []
    async with mesh([taking([silent] * 20, ignored), taking([saying(OK)] * 20, [])], policy(rules)) as (world, _):
        client, seen = await world.hop.connect(), []
        for _ in range(20):
            seen.append((await client.ask(asking(line))).status)
            if seen[-1] != 200:
                client = await world.hop.connect()
    assert 1 <= len(ignored) <= 5
    assert seen.count(200) >= 10
    assert status in seen


# gRPC...


def calls(respond: list[Callable[[Peer2, int, Answer], Awaitable[None]]]) -> Script:
    async def one(peer: Peer2, number: int, message: Answer) -> None:
        await respond.pop(0)(peer, number, message)

    return speaking(answering2(one))


async def unavailable(peer: Peer2, number: int, _: Answer) -> None:
    head = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"14")]
    peer.h2.send_headers(number, head, end_stream=True)
    await peer.flush()


async def unavailable_by_trailers(peer: Peer2, number: int, _: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.trailers(number, [(b"grpc-status", b"14")])


async def fine(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(number, [(b"grpc-status", b"0"), (b"left", message.get(b"grpc-timeout") or b"none")])


@pytest.mark.parametrize("first", [unavailable, unavailable_by_trailers], ids=["by its head", "by trailers"])
async def test_a_call_that_ends_with_a_status_of_the_policys_is_tried_again(first: Callable[[Peer2, int, Answer], Awaitable[None]]) -> None:
    async with mesh([calls(steps := [first, fine])] * 2, policy("retries: {grpc: [unavailable]}"), up=b"2") as (world, _):
        client = await world.hop.connect2()
        answer = await client.ask([*GRPC, (b"grpc-timeout", b"20S")], b"message")
        assert (answer.body, answer.trailers[0]) == (b"message", (b"grpc-status", b"0"))
        left = dict(answer.trailers)[b"left"]
        assert left.endswith(b"u"), left
        assert 5_000_000 < int(left[:-1]) < 20_000_000, "the second server is told what is left"
        assert not steps
        assert world.tried[0][0].reason == "grpc_status"


async def test_a_call_is_not_tried_again_for_another_status() -> None:
    async with mesh([calls([unavailable])] * 2, policy("retries: {grpc: [aborted]}"), up=b"2") as (world, _):
        answer = await (await world.hop.connect2()).ask(GRPC, b"message")
        assert answer.get(b"grpc-status") == b"14"
        assert not world.tried[0]


async def unavailable_at_the_end(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(number, [(b"grpc-status", b"14")])


async def aborted_at_the_end(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(number, [(b"grpc-status", b"10")])


Ends = Callable[[Peer2, int, Answer], Awaitable[None]]


async def statuses(steps: list[Ends], fields: list[tuple[bytes, bytes]] = GRPC) -> tuple[list[bytes], int]:
    """What calls that end so, one after the other, are told, and how many endpoints are broken then."""
    rules = policy("{breaker: {failures: 3}, retries: {grpc: [unavailable]}}")
    async with mesh([calls(list(steps))], rules, up=b"2") as (world, _):
        client = await world.hop.connect2()
        seen = [dict((await client.ask(fields, b"message")).trailers).get(b"grpc-status", b"") for _ in steps]
        assert not any(world.tried), "what has been passed on is not tried again"
        return seen, world.broken


async def test_a_status_behind_messages_counts_for_the_breaker() -> None:
    assert await statuses([unavailable_at_the_end] * 3) == ([b"14"] * 3, 1)


@pytest.mark.parametrize("between", [fine, aborted_at_the_end], ids=["OK", "the call's own fault"])
async def test_a_call_that_ends_well_ends_the_row(between: Ends) -> None:
    bad = unavailable_at_the_end
    seen, broken = await statuses([bad, bad, between, bad, bad])
    assert (len(seen), broken) == (5, 0)


async def test_such_trailers_of_what_is_not_grpc_say_nothing() -> None:
    fields = [field for field in GRPC if field[0] != b"content-type"]
    seen, broken = await statuses([unavailable_at_the_end] * 4, fields)
    assert (seen, broken) == ([b"14"] * 4, 0)


async def test_a_call_that_is_under_way_neither_ends_a_row_nor_keeps_an_endpoint_on_probation() -> None:
    rules = policy("{breaker: {failures: 3, min_penalty: 50ms, jitter: 0}, queue: {timeout: 20s}}")
    release = trio.Event()

    async def streaming(peer: Peer2, number: int, message: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
        await peer.send(number, message.body)
        await release.wait()
        await peer.trailers(number, [(b"grpc-status", b"0")])

    async with mesh([calls([unavailable_at_the_end] * 3 + [streaming])], rules, up=b"2") as (world, _):
        client = await world.hop.connect2()
        for _ in range(3):
            await client.ask(GRPC, b"message")
        assert world.broken == 1
        number = await client.request(GRPC, end=False)
        await client.send(number, b"message", end=True)
        await until(lambda: not world.broken, 20)
        release.set()
        assert (await client.message(number)).trailers == [(b"grpc-status", b"0")]


async def test_no_attempt_outlives_the_deadline_of_the_call() -> None:
    async def late(_: Peer2, __: int, ___: Answer) -> None:
        await trio.sleep_forever()

    async with mesh([calls([late])], policy(), up=b"2") as (world, _):
        answer = await (await world.hop.connect2()).ask([*GRPC, (b"grpc-timeout", b"100m")], b"message")
        assert answer.get(b"grpc-status") == b"4"
        assert b"http_response_timeout" in (answer.get(b"grpc-message") or b"")
        assert world.broken == 0, "the client's impatience says nothing against the endpoint"


async def test_a_call_that_has_no_time_left_for_another_attempt_gets_its_answer() -> None:
    rules = policy("retries: {grpc: [unavailable], backoff: 30s, max_backoff: 30s}")
    async with mesh([calls([unavailable])], rules, up=b"2") as (world, _):
        answer = await (await world.hop.connect2()).ask([*GRPC, (b"grpc-timeout", b"20S")], b"message")
        assert answer.get(b"grpc-status") == b"14"
        assert world.count("retries_refused_total", reason="deadline") == 1


# Broken endpoints...


async def test_an_endpoint_that_fails_in_a_row_is_left_alone_and_used_again_when_it_has_recovered() -> None:
    heard: list[Message] = []
    rules = policy("{retries: {limit: 0}, breaker: {failures: 3, min_penalty: 50ms, jitter: 0}, queue: {timeout: 20s}}")
    steps = [saying(UNHEARD), saying(UNHEARD), saying(UNHEARD), saying(OK), saying(OK)]
    async with mesh([taking(steps, heard)], rules) as (world, _):
        client = await world.hop.connect()
        assert [(await client.ask()).status for _ in range(3)] == [502] * 3
        assert world.broken == 1
        assert (await client.ask()).status == 200, "it waited, and was the one on probation"
        assert world.broken == 0
        assert world.count("queued_total", result="served") == 1
        assert [world.count("breaker_changes_total", state=state) for state in ("open", "probation", "closed")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("poison", "status"),
    [
        (breaking, 502),
        (saying(BUSY), 503),
        (saying(CLOSED), 502),
    ],
    ids=["closing", "by 503", "closing, as its sidecar says"],
)
async def test_requests_that_the_only_endpoint_answers_badly_do_not_take_it_from_others(poison: Step, status: int) -> None:
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
        assert world.count("breaker_changes_total", state="open") <= 2, "and it does not flap with each of them"


async def test_an_endpoint_that_answers_nobody_is_left_alone_although_it_is_the_only_one() -> None:
    rules = policy("{timeouts: {response_head: 50ms}, breaker: {failures: 3, min_penalty: 1m}, queue: {timeout: 1s}, retries: {limit: 0}}")
    heard: list[Message] = []
    async with mesh([taking([silent] * 5, heard)], rules) as (world, _):
        seen = [(await (await world.hop.connect()).ask()).status for _ in range(5)]
        assert seen == [504] * 3 + [503] * 2
        assert len(heard) == 3


async def test_statuses_that_are_the_requests_own_fault_do_not_count() -> None:
    steps = [saying(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status) for status in (400, 404, 500, 501)] * 5
    async with mesh([taking(steps, [])], policy()) as (world, _):
        client = await world.hop.connect()
        for _ in range(20):
            await client.ask()
        assert world.broken == 0


async def test_a_request_waits_for_an_early_trial_while_the_outage_is_young_and_is_told_at_once_when_it_is_not() -> None:
    rules = policy("{breaker: {failures: 1, min_penalty: 50ms, jitter: 0}, queue: {timeout: 20s}, retries: {limit: 0}}")
    async with mesh([taking([saying(UNHEARD), saying(UNHEARD), saying(OK)], [])], rules) as (world, _):
        client, fleet = await world.hop.connect(), world.balancer.fleet("default/web")
        assert (await client.ask()).status == 502
        (breaker,) = fleet.broken.values()
        breaker.until = trio.current_time() + 10  # it has failed more often: less than anybody may wait
        fleet._changes += 1
        assert [(await client.ask()).status for _ in range(2)] == [502, 200], "the second one waited, and not for 10 s"
        assert world.count("queued_total", result="served") == 2
        assert not fleet.broken


async def test_after_a_long_outage_one_request_tries_and_the_others_are_told_at_once() -> None:
    heard: list[Message] = []
    rules = policy("{breaker: {failures: 1, min_penalty: 1s, jitter: 0}, queue: {timeout: 10s}, retries: {limit: 0}}")
    async with mesh([taking([saying(UNHEARD), saying(UNHEARD), saying(OK), saying(OK)], heard)], rules) as (world, _):
        client, fleet = await world.hop.connect(), world.balancer.fleet("default/web")
        assert (await client.ask()).status == 502
        (breaker,) = fleet.broken.values()
        breaker.until = trio.current_time() + 3600
        fleet._changes += 1
        seen: list[tuple[int, bool]] = []
        with trio.fail_after(30):
            while (200, False) not in seen:
                answer = await client.ask()
                seen.append((answer.status, b"the next one is tried in" in (answer.get(b"proxy-status") or b"")))
        assert len(heard) == 3
        assert set(seen) == {(503, True), (502, False), (200, False)}
        assert world.count("queued_total", result="served") == 0
        assert world.balancer.waiting() == 0


async def test_if_all_are_broken_for_longer_than_anybody_may_wait_the_client_is_told_at_once() -> None:
    async with mesh([], policy("{breaker: {min_penalty: 1m}, queue: {timeout: 30s}}"), dead=2) as (world, _):
        client = await world.hop.connect()
        assert (await client.ask()).status == 502
        with trio.fail_after(10):
            answer = await client.ask()
        assert answer.status == 503
        assert b"error=destination_unavailable" in (answer.get(b"proxy-status") or b"")
        words = b"all 2 endpoints of default/web are broken (last: connect_refused); the next one is tried in"
        assert words in (answer.get(b"proxy-status") or b"")
        assert world.hop.ended[-1].failure == "all_broken"


async def test_a_service_without_endpoints_fails_at_once() -> None:
    async with mesh([], policy(), dead=1) as (world, _):
        world.target = Target("default/web", ())
        answer = await (await world.hop.connect()).ask()
        assert answer.status == 503
        assert world.hop.ended[0].failure == "no_endpoint"


async def test_only_so_many_wait_and_they_are_told_when_it_was_in_vain() -> None:
    release, heard = trio.Event(), []

    async def probed(peer: Peer, _: Message) -> None:
        await release.wait()
        await peer.send(UNHEARD)

    rules = policy("{breaker: {failures: 1, min_penalty: 1m, jitter: 0}, queue: {size: 1, timeout: 500ms}, retries: {limit: 0}}")
    async with mesh([taking([saying(UNHEARD), probed], heard)], rules) as (world, _):
        clients = [await world.hop.connect() for _ in range(3)]
        assert (await clients[0].ask()).status == 502
        (breaker,) = world.balancer.fleet("default/web").broken.values()
        breaker.until = 0.0  # its penalty is over, and a step is still a minute
        world.balancer.fleet("default/web")._changes += 1
        await clients[0].send(GET)
        await until(lambda: len(heard) == 2)  # on probation
        await clients[1].send(GET)
        await until(lambda: world.balancer.waiting() == 1)
        answer = await clients[2].ask()
        assert answer.status == 503
        assert b"error=connection_limit_reached" in (answer.get(b"proxy-status") or b"")
        assert world.hop.ended[-1].failure == "queue_full"
        assert (await clients[1].response()).status == 503
        assert world.hop.ended[-1].failure == "all_broken"
        assert world.balancer.waiting() == 0
        release.set()
        assert (await clients[0].response()).body == b"none"


async def test_who_waits_is_served_when_the_directory_has_something_new() -> None:
    rules = policy("{breaker: {min_penalty: 10s, jitter: 0}, queue: {timeout: 30s}}")
    async with mesh([taking([saying(OK)], [])], rules, dead=1) as (world, _):
        alive, dead = world.target.endpoints
        world.target = Target("default/web", (dead,), policy=world.target.policy)
        client = await world.hop.connect()
        assert (await client.ask()).status == 502
        await client.send(GET)
        await until(lambda: world.balancer.waiting() == 1)
        world.target = Target("default/web", (alive, dead), policy=world.target.policy)
        world.reach.changed()
        with trio.fail_after(5):
            assert (await client.response()).status == 200


async def test_those_who_wait_are_served_in_order_once_the_endpoint_has_recovered() -> None:
    heard: list[Message] = []
    rules = policy("{breaker: {failures: 1, min_penalty: 100ms, jitter: 0}, queue: {timeout: 20s}, retries: {limit: 0}}")
    async with mesh([taking([saying(UNHEARD)] + [saying(OK)] * 20, heard)], rules) as (world, _):
        first = await world.hop.connect()
        assert (await first.ask()).status == 502
        clients = [await world.hop.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            await client.send(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            if world.broken:
                await until(lambda number=number: world.balancer.waiting() > number or not world.broken)  # type: ignore[misc]
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

    async with mesh([taking([saying(OK)] * 9, [])], policy("breaker: {min_penalty: 1m}"), dead=1) as (world, places):
        for _ in range(8):
            async with world.reach.connection(lambda: world.target, connect) as stream:
                assert stream.peer == places[0]
                assert world.balancer.fleet("default/web").outstanding(places[0]) == 1
                stream.close()
        assert world.broken == 1
        world.target = Target("default/web", world.target.endpoints[1:], policy=world.target.policy)
        with pytest.raises(AllBroken):
            async with world.reach.connection(lambda: world.target, connect):
                pass
        world.target = Target("default/web", ())
        with pytest.raises(NoEndpoint):
            async with world.reach.connection(lambda: world.target, connect):
                pass


async def test_connections_wait_in_the_same_queue() -> None:
    async def refused(_: Target, endpoint: Endpoint) -> Stream:
        raise ConnectFailed(endpoint.address, "refused", "refused")

    async with mesh([], policy("{queue: {size: 0, timeout: 10s}, breaker: {min_penalty: 1s}}"), dead=1) as (world, _):
        with pytest.raises(ConnectFailed):
            async with world.reach.connection(lambda: world.target, refused):
                pass
        with pytest.raises(QueueFull):
            async with world.reach.connection(lambda: world.target, refused):
                pass
