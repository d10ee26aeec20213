"""Endpoints with which mutual TLS fails, or which refuse a connection: the client gets the error at
once, without a wait for other requests.

What must hold: other endpoints are tried first. A request waits only if one of the endpoints may
come back. The client gets the reason of its own attempt."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.directory import Endpoint, Target
from proxy.errors import AllCircuitsOpen, TunnelRefused, Undelivered, UpstreamTLSError
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed
from proxy.net.socket_stream import Stream
from tests.kit.apps import HOST, Fleet, application, inbound_port, outbound_port
from tests.kit.clusters import LISTEN
from tests.kit.dispatch import Mesh, mesh, policy
from tests.kit.http import GET, connect, until

PATIENT = policy(
    "{queue: {timeout: 30s}, breaker: {min_penalty: 200ms, connect_penalty: 20ms, jitter: 0}}"
)
SERVICE = "192.0.2.1"


@dataclass
class Endpoints:
    """A dialler that fails: in the way that is set for an endpoint, or else as `default`."""

    default: Exception
    by_port: dict[int, Exception] = field(default_factory=dict)
    tried: list[int] = field(default_factory=list)

    async def connect(self, _: Target, endpoint: Endpoint) -> Stream:
        self.tried.append(endpoint.address.port)
        raise self.by_port.get(endpoint.address.port, self.default)

    def target(self, number: int) -> Target:
        endpoints = tuple(Endpoint(Address(HOST, port)) for port in range(1, number + 1))
        return Target("default/web", endpoints, policy=PATIENT)


def rejections() -> list[Exception]:
    by_tls = [
        UpstreamTLSError("why", kind) for kind in ("certificate", "alert", "protocol", "clear_text")
    ]
    reported = [
        Undelivered("why", reason)
        for reason in ("tls_certificate", "tls_alert", "clear_text_refused")
    ]
    return [*by_tls, *reported, TunnelRefused("why")]


async def fails(
    world: Mesh, endpoints: Endpoints, expected: type[Exception]
) -> tuple[Exception, float]:
    """The error of a connection, and after how many seconds."""
    since = trio.current_time()
    with pytest.raises(expected) as caught:
        await world.dispatcher.connected(lambda: world.target, endpoints.connect)
    return caught.value, trio.current_time() - since


@pytest.mark.parametrize(
    "rejection",
    rejections(),
    ids=lambda error: f"{type(error).__name__}-{getattr(error, 'kind', '')}",
)
@pytest.mark.parametrize("number", [1, 2])
async def test_a_rejected_connection_fails_at_once_after_all_endpoints(
    autojump_clock: trio.testing.MockClock, rejection: Exception, number: int
) -> None:
    async with mesh([], PATIENT) as (world, _):
        endpoints = Endpoints(rejection)
        world.target = endpoints.target(number)
        assert await fails(world, endpoints, type(rejection)) == (rejection, 0.0)
        assert sorted(endpoints.tried) == list(range(1, number + 1)), "each of them once"


@pytest.mark.parametrize(
    "away",
    [
        UpstreamTLSError("lost", "lost"),
        UpstreamTLSError("slow", "timeout"),
        ConnectFailed(Address(HOST, 1), "refused", "refused"),
        Undelivered("why", "connect_refused"),
    ],
    ids=["lost in the handshake", "handshake timeout", "refused", "reported"],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a rejected one"])
async def test_a_connection_waits_for_an_endpoint_that_may_come_back(
    autojump_clock: trio.testing.MockClock, away: Exception, beside: bool
) -> None:
    async with mesh([], PATIENT) as (world, _):
        endpoints = Endpoints(away, {2: UpstreamTLSError("why", "certificate")} if beside else {})
        world.target = endpoints.target(2 if beside else 1)
        _, seconds = await fails(world, endpoints, Exception)
        assert seconds >= 30
        assert endpoints.tried.count(1) > 5


async def test_requests_that_find_the_breaker_open_fail_after_the_first_trial(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A certificate was refused: the next ones wait for one trial, not for the whole of their
    timeout."""
    async with mesh([], PATIENT) as (world, _):
        endpoints = Endpoints(UpstreamTLSError("why", "certificate"))
        world.target = endpoints.target(1)
        await fails(world, endpoints, UpstreamTLSError)
        response_to: list[str] = []

        async def one() -> None:
            failure, seconds = await fails(world, endpoints, (UpstreamTLSError, AllCircuitsOpen))  # type: ignore[arg-type]
            assert seconds <= 0.2 + 0.25
            response_to.append(str(failure) if isinstance(failure, AllCircuitsOpen) else "rejected")

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert response_to.count("rejected") == 1
        assert all("tls_certificate" in words for words in response_to if words != "rejected"), (
            "the others get the reason"
        )
        assert len(endpoints.tried) == 2


# By whole proxies...


@pytest.fixture(params=[True, False], ids=["fast", "ordinary"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def _hears(
    folder: Path, fast: bool, name: str, protocol: str, allow: str = ""
) -> tuple[bytes, float]:
    """The response for a client whose proxy connects to a sidecar as `name`, and after how many
    seconds. The queue's timeout is 20 s."""
    fleet = Fleet(folder)

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with application(greet) as port:
        settings = {**LISTEN, "fixed_destination": f"{HOST}:{port}"} | (
            {"allow": {port: [fleet.identity(allow)]}} if allow else {}
        )
        async with fleet.running("server", inbound=settings, fast_path=fast) as server:
            place = inbound_port(server)
            endpoint = {"address": HOST, "identity": fleet.identity(name), "ports": {"80": place}}
            ports = [{"port": 80, "protocol": protocol}]
            rules = {"queue": {"timeout": "20s"}}
            service = {
                "name": "shop",
                "addresses": [SERVICE],
                "ports": ports,
                "endpoints": [endpoint],
                "policy": rules,
            }
            outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}
            async with fleet.running(
                "west", {"services": [service]}, outbound=outbound, fast_path=fast
            ) as west:
                client, since = (
                    await connect(Address(HOST, outbound_port(west))),
                    trio.current_time(),
                )
                await client.send(GET)
                if protocol == "opaque":
                    received = b""
                    with suppress(trio.BrokenResourceError):
                        received = await client.rest()
                else:
                    answer = await client.response()
                    received = b"%d %b" % (answer.status, answer.get(b"proxy-status") or b"")
                client.close()
                return received, trio.current_time() - since


@pytest.mark.parametrize("protocol", ["http1", "http2", "opaque"])
async def test_a_server_with_another_identity_is_reported_at_once(
    tmp_path: Path, fast: bool, protocol: str
) -> None:
    received, seconds = await _hears(tmp_path, fast, "bank", protocol)
    if protocol == "opaque":
        assert received == b""
    else:
        assert received.startswith(b"502 ")
        assert b"error=tls_certificate_error" in received
    assert seconds < 5


async def test_an_opaque_connection_that_the_policy_does_not_allow_is_closed_at_once(
    tmp_path: Path, fast: bool
) -> None:
    received, seconds = await _hears(tmp_path, fast, "server", "opaque", allow="other")
    assert received == b""
    assert seconds < 5


async def test_a_connection_that_is_lost_in_the_handshake_is_tried_again(
    tmp_path: Path, fast: bool
) -> None:
    """As with a sidecar that is stopped within a handshake, and comes back."""
    fleet, seen = Fleet(tmp_path), 0

    async def cut(stream: trio.SocketStream) -> None:
        nonlocal seen
        seen += 1
        await stream.receive_some(1)

    async with application(cut) as port:
        endpoint = {"address": HOST, "identity": fleet.identity("server"), "ports": {"80": port}}
        ports = [{"port": 80, "protocol": "http1"}]
        rules = {"queue": {"timeout": "1s"}}
        service = {
            "name": "shop",
            "addresses": [SERVICE],
            "ports": ports,
            "endpoints": [endpoint],
            "policy": rules,
        }
        outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}
        async with fleet.running(
            "west", {"services": [service]}, outbound=outbound, fast_path=fast
        ) as west:
            client, since = await connect(Address(HOST, outbound_port(west))), trio.current_time()
            answer = await client.ask()
            assert (answer.status, trio.current_time() - since >= 1) == (502, True)
            assert (
                b'isthmus_errors_total{direction="outbound",reason="tls_lost"} 1.0' in west.render()
            )
            await until(lambda: seen >= 3)
            client.close()
