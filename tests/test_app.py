"""The whole proxy in this process, on loopback, with real sockets: properties that its parts have
only together."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from trio.testing import MockClock

from proxy.app import App
from proxy.config.load import load
from proxy.identity.credentials import utc_now
from proxy.telemetry.metrics import Metrics
from proxy.wire.h1 import fast_head
from proxy.wire.messages import Limits
from tests.kit.apps import HOST, Fleet, application
from tests.kit.http import until
from tests.kit.own_identity import identity, port_of


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[App]:
    """A proxy with these settings. Listeners that are not named are off."""
    document: dict[str, Any] = {
        "outbound": {"listen": []},
        "inbound": {"listen": []},
        "admin": {"listen": []},
    }
    for name, section in settings.items():
        document[name] = {**document.get(name, {}), **section}
    file = tmp_path / "isthmus.yaml"
    file.write_text(yaml.safe_dump(document))
    app = App(load(file, {}), Metrics())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.run)
        yield app
        nursery.cancel_scope.cancel()


def inbound_to(port: int, **more: Any) -> dict[str, Any]:
    return {"listen": [f"{HOST}:0"], "fixed_destination": f"{HOST}:{port}", **more}


async def connected(app: App) -> trio.SocketStream:
    return await trio.open_tcp_stream(HOST, port_of(app.listeners.inbound))


async def greet(stream: trio.SocketStream) -> None:
    await stream.send_all(b"220 ready\r\n")
    await trio.sleep_forever()


async def test_without_an_identity_opaque_ports_do_not_wait_for_tls(tmp_path: Path) -> None:
    async with application(greet) as port:
        settings = inbound_to(port, opaque_ports=[port], hello_timeout="30s", detect_timeout="30s")
        async with running(tmp_path, inbound=settings) as app, await connected(app) as client:
            with trio.fail_after(60):
                assert await client.receive_some() == b"220 ready\r\n"


async def test_a_client_hello_in_two_parts_is_one_however_late_the_second_comes(
    tmp_path: Path,
) -> None:
    seen = []

    async def record(stream: trio.SocketStream) -> None:
        seen.append(await stream.receive_some())

    paths, who = identity(tmp_path)
    outgoing, context = ssl.MemoryBIO(), ssl.create_default_context()
    try:
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=who.sni).do_handshake()
    except ssl.SSLWantReadError:
        hello = outgoing.read()
    async with application(record) as port:
        settings = inbound_to(
            port, opaque_ports=[port], hello_timeout="100ms", detect_timeout="30s"
        )
        async with running(tmp_path, inbound=settings, identity=paths) as app:
            first = socket.create_connection((HOST, port_of(app.listeners.inbound)))
            first.sendall(hello[:40])  # before the proxy runs again: so the client is never silent
            first.setblocking(False)
            async with trio.SocketStream(trio.socket.from_stdlib_socket(first)) as client:
                await trio.sleep(0.4)  # four times the time of a silent client
                await client.send_all(hello[40:])
                with trio.fail_after(60):
                    answer = await client.receive_some()
            assert answer[:1] == b"\x16", (
                "a handshake record: the proxy has answered, and not the application"
            )
            assert not seen


FORGED = (
    b"Host: a\r\nIsthmus-Client-Id: spiffe://cluster.local/ns/default/sa/king\r\nConnection:"
    b" close\r\n\r\n"
)


@pytest.mark.parametrize("how", ["as bytes, in the mesh", "as bytes, without TLS"])
@pytest.mark.parametrize("closed", [False, True], ids=["any port", "a port for HTTP only"])
async def test_the_request_layers_cannot_be_bypassed(
    tmp_path: Path, how: str, closed: bool
) -> None:
    """What a peer declares to be opaque bytes is inspected all the same, and on a port for HTTP
    only it is refused."""
    received = bytearray()

    async def record(stream: trio.SocketStream) -> None:
        received.extend(await stream.receive_some())

    fleet = Fleet(tmp_path)
    async with (
        application(record) as port,
        fleet.running("shop", inbound=inbound_to(port, http_ports=[port] if closed else [])) as app,
    ):
        refused = closed and how.endswith("mesh")
        if how.endswith("mesh"):
            client: trio.abc.Stream = await fleet.meet(app, "mallory", "shop", alpn="isthmus-tcp")
            line = b"GET / HTTP/1.1\r\n"
        else:
            client, line = await connected(app), b"X" * 25 + b" / HTTP/1.1\r\n"
        with trio.fail_after(60), suppress(trio.BrokenResourceError):
            await client.send_all(line + FORGED)
            while await client.receive_some():
                pass
        await client.aclose()
        assert bool(received) is not refused
        assert b"king" not in received
        assert (
            b'isthmus_errors_total{direction="inbound",reason="bad_request"} 1.0' in app.render()
        ) is refused


async def test_a_malformed_request_line_is_refused_and_not_passed_on_as_something_unknown(
    tmp_path: Path,
) -> None:
    received = bytearray()

    async def record(stream: trio.SocketStream) -> None:
        received.extend(await stream.receive_some())

    async with application(record) as port, running(tmp_path, inbound=inbound_to(port)) as app:
        lines = [
            b"GET /\0 HTTP/1.1",
            b"GET  / HTTP/1.1",
            b"GET\t/ HTTP/1.1",
            b"\nGET / HTTP/1.1",
            b" GET / HTTP/1.1",
            b"GET / HTTP/1.10",
        ]
        for line in (
            *(line + b"\r\n" for line in lines),
            b"GET / HTTP/1.1\r\r\n",
            b"FOO / HTTP/1.1\r\r\n",
        ):
            async with await connected(app) as client:
                await client.send_all(line + FORGED)
                with trio.fail_after(60):
                    assert (await client.receive_some()).startswith(b"HTTP/1.1 400 ")
    assert not received


@pytest.mark.parametrize(
    "addresses", [[], ["192.0.2.1"]], ids=["addresses found", "addresses told"]
)
async def test_a_connection_made_to_the_listener_itself_is_a_loop_whatever_the_pod_calls_its_own(
    tmp_path: Path, addresses: list[str]
) -> None:
    settings = {
        "listen": ["127.9.9.9:0"]
    }  # an address that no list has, like that of a second interface
    async with running(tmp_path, inbound=settings, pod={"addresses": addresses}) as app:
        port = port_of(app.listeners.inbound)
        async with await trio.open_tcp_stream("127.9.9.9", port) as client:
            with trio.fail_after(60), suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b""
        assert b'isthmus_loops_total{kind="own_listener"} 1.0' in app.render()
        assert app.inbound.accepted == 1, "it did not come back"


@pytest.mark.parametrize("way", ["closed", "reset"])
async def test_a_client_that_leaves_while_the_server_works_is_noticed(
    tmp_path: Path, way: str
) -> None:
    asked, left = trio.Event(), trio.Event()

    async def think(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        asked.set()
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
        left.set()

    async with application(think) as port, running(tmp_path, inbound=inbound_to(port)) as app:
        client = await connected(app)
        await client.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await asked.wait()
        if way == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.socket.close()
        with trio.fail_after(60):
            await left.wait()
        await until(
            lambda: (
                b'isthmus_errors_total{direction="inbound",reason="client_gone"} 1.0'
                in app.render()
            )
        )


async def test_a_client_that_half_closes_after_its_request_is_answered(tmp_path: Path) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    async with (
        application(answer) as port,
        running(tmp_path, inbound=inbound_to(port)) as app,
        await connected(app) as client,
    ):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.send_eof()
        with trio.fail_after(60):
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200 OK")


async def test_a_proxy_that_is_going_down_still_knows_its_own_listeners(tmp_path: Path) -> None:
    """It reads its addresses every few seconds, and its listeners are closed by then."""
    async with running(tmp_path) as app:
        before = app.runtime.loops.listeners
        app.inbound.drain(60)
        app.outbound.drain(60)
        assert app._own() == before


async def test_cached_heads_are_dropped_soon(tmp_path: Path, mock_clock: MockClock) -> None:
    async with running(tmp_path):
        assert (
            fast_head.recognise_request(
                b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n\r\n", Limits()
            )
            is not None
        )
        assert fast_head._known.cache_info().currsize > 0
        mock_clock.autojump_threshold = 0.01
        await trio.sleep(15)
        assert fast_head._known.cache_info().currsize == 0


async def test_a_configured_loopback_destination_is_not_a_call_of_the_pod_to_itself(
    tmp_path: Path,
) -> None:
    """Two sidecars on one machine (README) may have more requests in progress than a pod that calls
    itself in a loop."""
    asked, arrived, answer = 3, trio.Semaphore(0), trio.Event()

    async def wait(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        arrived.release()
        await answer.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    async def ask(app: App) -> None:
        async with await trio.open_tcp_stream(HOST, port_of(app.listeners.outbound)) as client:
            await client.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200 OK")

    async with (
        application(wait) as port,
        running(tmp_path, outbound=inbound_to(port), loops={"max_self_calls": 1}) as app,
    ):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(asked):
                    nursery.start_soon(ask, app)
                for _ in range(asked):
                    await arrived.acquire()
                answer.set()


async def test_an_http2_client_that_breaks_its_connection_is_counted(tmp_path: Path) -> None:
    """The client gets GOAWAY, and the error is in the log and the metrics."""
    async with application(greet) as port, running(tmp_path, inbound=inbound_to(port)) as app:
        with trio.fail_after(60):
            async with await connected(app) as client:
                await client.send_all(
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\x04\x04\0\0\0\0\0four"
                )
                while await client.receive_some():
                    pass
        await until(lambda: app.inbound.open == 0, 20)
        assert b'isthmus_errors_total{direction="inbound",reason="bad_request"} 1.0' in app.render()


@pytest.mark.parametrize(("days", "words"), [(-1, "is not yet valid until"), (2, "expired on")])
async def test_a_proxy_is_not_ready_while_no_peer_takes_its_certificate(
    tmp_path: Path, days: int, words: str
) -> None:
    """By the wall clock, which can also be set back."""
    paths, _ = identity(tmp_path)
    async with running(tmp_path, identity=paths) as app:
        assert app.not_ready() == []
        assert app.identity is not None
        begin = app.metrics.registry.get_sample_value("isthmus_certificate_start_timestamp_seconds")
        assert begin == app.identity.not_before.timestamp() < time.time()
        app.identity._clock = lambda: utc_now() + timedelta(days=days)
        (reason,) = app.not_ready()
        assert words in reason
