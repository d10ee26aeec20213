"""A connection ends with the certificates that it depends on: whole proxies, both paths, and a wall
clock that the tests move.

At the end of the certificate a connection accepts no new request. `identity.expiry_grace` later it
is closed, whatever is in progress."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio

from proxy.app import App
from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from tests.kit.apps import (
    HOST,
    Application,
    Fleet,
    application,
    inbound_port,
    mirror,
    outbound_port,
)
from tests.kit.clusters import LISTEN, Clusters, clusters
from tests.kit.http import until

Stream = trio.SSLStream[trio.SocketStream]
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
DAYS = 2 * 86400.0  # longer than a workload's certificate lasts


def later(app: App, seconds: float) -> None:
    """Move the proxy's clock forward by so much, and let it check."""
    moment = time.time() + seconds
    app.own.expiries._clock = lambda: moment
    app.own.expiries.close_expired()


async def end(app: App) -> float:
    """In how many seconds the one connection of the proxy has to end."""
    await until(lambda: len(app.own.expiries) == 1)
    (stream,) = [stream for known in app.own.expiries._minutes.values() for stream in known]
    assert stream.expiry is not None
    assert stream.expiry.ends == stream.info.peer_not_after
    return stream.expiry.ends - time.time()


@pytest.fixture(params=[True, False], ids=["fast path", "ordinary path"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@asynccontextmanager
async def served(
    folder: Path, serve: Application, fast: bool, **identity: Any
) -> AsyncIterator[tuple[Fleet, App]]:
    """A sidecar named `server` before an application."""
    fleet = Fleet(folder)
    async with application(serve) as port:
        inbound = {**LISTEN, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running(
            "server",
            inbound=inbound,
            fast_path=fast,
            identity={**fleet.material("server"), **identity},
        ) as app:
            yield fleet, app


class Slow:
    """An application that responds when the test says so."""

    def __init__(self) -> None:
        self.asked, self.answer = trio.Event(), trio.Event()

    async def __call__(self, stream: trio.SocketStream) -> None:
        await stream.receive_some()
        self.asked.set()
        await self.answer.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await stream.receive_some()


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):  # a relay that is ended is reset on both sides
        async for piece in stream:
            await stream.send_all(piece)


async def received(stream: Stream) -> bytes:
    """The result of one read; b"" for every kind of end."""
    try:
        return bytes(await stream.receive_some())
    except trio.BrokenResourceError:
        return b""


async def test_an_idle_connection_is_closed_and_accepts_no_more_requests(
    tmp_path: Path, fast: bool
) -> None:
    async with (
        served(tmp_path, mirror, fast) as (fleet, app),
        await fleet.meet(app, "peer", "server") as stream,
    ):
        for _ in range(2):
            await stream.send_all(GET)
            assert (await received(stream)).startswith(b"HTTP/1.1 200 OK\r\n")
        later(app, DAYS / 4)
        await stream.send_all(GET)
        assert (await received(stream)).startswith(b"HTTP/1.1 200 OK\r\n"), "it has not ended yet"
        later(app, await end(app) + 1)
        with trio.fail_after(10):
            assert await received(stream) == b""
        assert b'isthmus_certificate_ends_total{how="retired"} 1.0' in app.render()
        assert b'isthmus_certificate_ends_total{how="cut"} 1.0' not in app.render()


async def test_the_response_in_progress_announces_the_close(tmp_path: Path, fast: bool) -> None:
    slow = Slow()
    async with (
        served(tmp_path, slow, fast, expiry_grace="1d") as (fleet, app),
        await fleet.meet(app, "peer", "server") as stream,
    ):
        await stream.send_all(GET)
        await slow.asked.wait()
        later(app, DAYS / 2 + 60)
        slow.answer.set()
        with trio.fail_after(10):
            answer = await received(stream)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close\r\n" in answer.lower()
            assert answer.endswith(b"ok")
            assert await received(stream) == b""


async def test_an_exchange_that_outlasts_the_grace_is_cut(tmp_path: Path, fast: bool) -> None:
    slow = Slow()
    async with (
        served(tmp_path, slow, fast) as (fleet, app),
        await fleet.meet(app, "peer", "server") as stream,
    ):
        await stream.send_all(GET)
        await slow.asked.wait()
        later(app, DAYS)
        with trio.fail_after(10):
            assert await received(stream) == b""
        assert b'isthmus_certificate_ends_total{how="cut"} 1.0' in app.render()


async def test_a_relay_is_ended_after_the_grace_period_with_a_reason(
    tmp_path: Path, fast: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "isthmus.connection")
    async with (
        served(tmp_path, echo, fast) as (fleet, app),
        await fleet.meet(app, "peer", "server", alpn="isthmus-tcp") as stream,
    ):
        due = await end(app)
        for seconds in (0, due + 5):
            later(app, seconds)
            await stream.send_all(b"hello")
            assert await received(stream) == b"hello", "within the grace period"
        later(app, due + 11)
        with trio.fail_after(10):
            assert await received(stream) == b""
        await until(lambda: bool(caplog.records))
    line = caplog.records[-1].__dict__["line"]
    assert line.reason == "certificate_ended"
    assert line.words == "the peer's certificate has expired, and this connection with it"


async def test_where_it_is_switched_off_nothing_ends(tmp_path: Path, fast: bool) -> None:
    off = {"end_with_certificate": False}
    async with (
        served(tmp_path, mirror, fast, **off) as (fleet, app),
        await fleet.meet(app, "peer", "server") as stream,
    ):
        await stream.send_all(GET)
        assert await received(stream)
        later(app, DAYS)
        await stream.send_all(GET)
        assert (await received(stream)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(app.own.expiries) == 0


async def test_a_removed_root_ends_only_the_connections_that_depend_on_it(
    tmp_path: Path, fast: bool
) -> None:
    """First a root is added, which ends nothing. Then the old one is removed, while a peer of each
    is connected."""
    async with served(tmp_path, mirror, fast, reload_interval="50ms", expiry_grace="0s") as (
        fleet,
        app,
    ):
        place, fresh = tmp_path / "server", make_root("cluster.local")
        leaf = issue(fresh, SpiffeId.parse(fleet.identity("server")))
        (place / "roots.pem").write_bytes(fleet.root.certificate_pem + fresh.certificate_pem)
        await until(lambda: app.identity is not None and len(app.identity.roots) == 2)
        renewed = Fleet(tmp_path / "renewed", root=fresh)
        renewed.folder.mkdir()
        async with (
            await fleet.meet(app, "old", "server") as old,
            await renewed.meet(app, "new", "server", roots=fleet) as new,
        ):
            for stream in (old, new):
                await stream.send_all(GET)
                assert await received(stream)
            assert app.identity is not None
            before = app.identity.generation
            for name, pem in (
                ("certificate", leaf.certificate_pem),
                ("key", leaf.key_pem),
                ("roots", fresh.certificate_pem),
            ):
                (place / f"{name}.pem").write_bytes(pem)
            await until(lambda: app.identity is not None and app.identity.generation > before)
            with trio.fail_after(20):
                assert await received(old) == b""
            await new.send_all(GET)
            assert (await received(new)).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_revoked_peer_is_cut_at_once_and_does_not_come_back(
    tmp_path: Path, fast: bool
) -> None:
    """Even with a request in progress and a long grace. Others are not touched."""
    revoked = tmp_path / "revoked.txt"
    revoked.write_text("# nothing\n")
    settings = {"reload_interval": "50ms", "expiry_grace": "1d", "revoked": str(revoked)}
    slow = Slow()
    async with served(tmp_path, slow, fast, **settings) as (fleet, app):
        assert app.identity is not None
        async with await fleet.meet(app, "mallory", "server") as stolen:
            await stolen.send_all(GET)
            await slow.asked.wait()
            async with await fleet.meet(app, "peer", "server") as good:
                slow.asked = trio.Event()
                await good.send_all(GET)
                await slow.asked.wait()
                revoked.write_text(f"{fleet.identity('mallory')}\n")
                with trio.fail_after(20):
                    assert await received(stolen) == b""
                assert b'isthmus_certificate_ends_total{how="cut"} 1.0' in app.render()
                slow.answer.set()
                with trio.fail_after(20):
                    assert (await received(good)).startswith(b"HTTP/1.1 200 OK\r\n")
        with suppress(trio.BrokenResourceError):  # refused within the handshake, or with the answer
            async with await fleet.meet(app, "mallory", "server") as again:
                await again.send_all(GET)
                assert await received(again) == b""


async def frames(stream: Stream) -> AsyncIterator[int]:
    """Send one request by HTTP/2, and return the type of each frame until the end. PINGs are
    answered; h2 would refuse those after a GOAWAY."""
    client = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=True, header_encoding="ascii")
    )
    client.initiate_connection()
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]
    client.send_headers(1, head, end_stream=True)
    await stream.send_all(client.data_to_send())
    data = b""
    while piece := await received(stream):
        data += piece
        while len(data) >= 9 and len(data) >= (size := 9 + int.from_bytes(data[:3], "big")):
            frame, data = data[:size], data[size:]
            if frame[3] == PING and not frame[4]:
                await stream.send_all(frame[:4] + b"\1" + frame[5:])
            yield frame[3]


HEADERS, PING, GOAWAY = 1, 6, 7


async def answer2(stream: trio.SocketStream) -> None:
    """An HTTP/2 server that answers each stream with 200."""
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=False, header_encoding="ascii")
    )
    connection.initiate_connection()
    await stream.send_all(connection.data_to_send())
    async for data in stream:
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.RequestReceived) and event.stream_id is not None:
                connection.send_headers(event.stream_id, [(":status", "200")], end_stream=True)
        await stream.send_all(connection.data_to_send())


async def test_an_http2_connection_sends_goaway_and_ends(tmp_path: Path, fast: bool) -> None:
    async with served(tmp_path, answer2, fast, expiry_grace="1d") as (fleet, app):
        async with await fleet.meet(app, "peer", "server", alpn="h2") as stream:
            seen: list[int] = []
            with trio.fail_after(20):
                async for kind in frames(stream):
                    if kind == HEADERS:
                        later(app, DAYS / 2 + 60)
                    seen.append(kind)
        assert GOAWAY not in seen[: seen.index(HEADERS)]
        assert seen.count(GOAWAY) >= 2, "one that refuses nothing, and one that counts"
        assert b'isthmus_certificate_ends_total{how="retired"} 1.0' in app.render()


@asynccontextmanager
async def dialled(
    folder: Path, fast: bool, protocol: str, serve: Application
) -> AsyncIterator[tuple[App, App]]:
    """(near, far): the sidecars of a client and of the service `c`, which speaks `protocol`."""
    fleet = Fleet(folder)
    async with application(serve) as port:
        inbound = {**LISTEN, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running("server", inbound=inbound, fast_path=fast) as far:
            endpoint = {
                "address": HOST,
                "identity": fleet.identity("server"),
                "ports": {"80": inbound_port(far)},
            }
            service = {
                "name": "c",
                "addresses": ["192.0.2.7"],
                "ports": [{"port": 80, "protocol": protocol}],
                "endpoints": [endpoint],
            }
            outbound = {**LISTEN, "fixed_destination": "192.0.2.7:80"}
            directory = {"cluster": "west", "services": [service]}
            async with fleet.running("near", directory, outbound=outbound, fast_path=fast) as near:
                yield near, far


@pytest.mark.parametrize("protocol", ["http1", "http2"])
async def test_a_kept_connection_to_a_peer_is_not_used_any_more(
    tmp_path: Path, fast: bool, protocol: str
) -> None:
    serve = mirror if protocol == "http1" else answer2
    async with (
        dialled(tmp_path, fast, protocol, serve) as (near, far),
        await trio.open_tcp_stream(HOST, outbound_port(near)) as client,
    ):

        async def ask() -> bytes:
            await client.send_all(GET)
            return bytes(await client.receive_some())

        for _ in range(3):
            assert (await ask()).startswith(b"HTTP/1.1 200")
        assert far.inbound.accepted == 1
        later(near, DAYS)
        later(near, 0)
        for _ in range(2):
            assert (await ask()).startswith(b"HTTP/1.1 200")
        assert far.inbound.accepted == 2


async def test_a_relay_to_a_peer_is_cut(tmp_path: Path, fast: bool) -> None:
    async with (
        dialled(tmp_path, fast, "opaque", echo) as (near, _),
        await trio.open_tcp_stream(HOST, outbound_port(near)) as client,
    ):
        await client.send_all(b"hello")
        assert await client.receive_some() == b"hello"
        later(near, DAYS)
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            assert await client.receive_some(), "a reset, not an end"


async def test_a_gateway_ends_connections_and_tunnels_too(tmp_path: Path) -> None:
    def tunnelled(all_: Clusters) -> Any:
        return all_.fleet.meet(all_.gateway, "west", "gateway")

    async with (
        clusters(tmp_path, echo) as all_,
        await tunnelled(all_) as stream,
        await tunnelled(all_) as idle,
    ):
        await stream.send_all(b"CONNECT c.default:5432 HTTP/1.1\r\nHost: c.default:5432\r\n\r\n")
        assert (await received(stream)).startswith(b"HTTP/1.1 200")
        await stream.send_all(b"hello")
        assert await received(stream) == b"hello"
        await idle.send_all(b"GET /isthmus HTTP/1.1\r\nHost: nothing\r\n\r\n")
        assert (await received(idle)).startswith(b"HTTP/1.1 404")
        later(all_.gateway, DAYS)
        with trio.fail_after(10):
            assert await received(stream) == b""
            assert await received(idle) == b""
