"""The administration listener of a whole proxy in this process. Threads send the requests, because
probes and scrapers are outside of the main thread too.

Rules: whatever the main thread does, a probe is answered within 100 ms, and a stuck main thread is
reported. Clients that only hold connections do not block probes. One text of metrics is sent to all
that ask within its lifetime, compressed for those that accept that."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import trio

from proxy.admin import takes_gzip
from proxy.app import App
from proxy.config.load import load
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Headers

HOST = "127.0.0.1"
PATIENCE = 30.0
T = TypeVar("T")


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[tuple[App, int]]:
    """A proxy without traffic, and its administration port."""
    admin = "".join(f", {name}: {value}" for name, value in settings.items())
    file = folder / "isthmus.yaml"
    file.write_text(
        "outbound: {listen: []}\ninbound: {listen: []}\nadmin: {listen:"
        f" ['{HOST}:0']{admin}}}\n"
    )
    app = App(load(file, {}), Metrics())
    port: int = app.listeners.admin[0].getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.run)
        assert await becomes(port, 200), "its thread answers"
        yield app, port
        nursery.cancel_scope.cancel()


async def elsewhere(what: Callable[..., T], *arguments: Any) -> T:
    """Do it in a thread."""
    return await trio.to_thread.run_sync(what, *arguments)


def ask(
    port: int, path: str, source: str = HOST, **fields: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """One request on its own connection, from this address."""
    connection = http.client.HTTPConnection(
        HOST, port, timeout=PATIENCE, source_address=(source, 0)
    )
    try:
        connection.request(
            "GET", path, headers={name.replace("_", "-"): value for name, value in fields.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


async def becomes(port: int, status: int) -> bool:
    """Wait until /live has this answer; returns whether it got it in time."""
    for _ in range(1000):
        if (await elsewhere(ask, port, "/live"))[0] == status:
            return True
        await trio.sleep(0.02)
    return False


class Probing:
    """Requests /live and /ready again and again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seconds: list[float] = []
        self.answers: list[tuple[int, bytes]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            for path in ("/live", "/ready"):
                began = time.perf_counter()
                self.answers.append(ask(self.port, path)[:2])
                self.seconds.append(time.perf_counter() - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(PATIENCE)


def count(app: App, name: str, **labels: str) -> float:
    return app.metrics.registry.get_sample_value(f"isthmus_{name}", labels) or 0.0


@contextmanager
def silent(port: int, number: int, source: str = HOST) -> Any:
    """Connections that send nothing."""
    sockets = [socket.create_connection((HOST, port), PATIENCE, (source, 0)) for _ in range(number)]
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def ends(sock: socket.socket) -> bytes:
    """All bytes until the other side ends the connection in any way."""
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


async def test_probes_are_answered_while_the_main_thread_does_something_else(
    tmp_path: Path,
) -> None:
    """Half of the time it calls what waits without the interpreter lock, half of the time it
    computes."""
    async with running(tmp_path) as (_, port):
        with Probing(port) as probing:
            time.sleep(0.7)  # noqa: ASYNC251  # the main thread stands still: that is the test
            until = time.monotonic() + 0.7
            while time.monotonic() < until:
                sum(range(1000))
    assert len(probing.answers) > 10
    assert {status for status, _ in probing.answers} == {200}
    assert sorted(probing.seconds)[len(probing.seconds) * 9 // 10] < 0.1


async def test_a_stuck_main_thread_is_reported_until_it_runs_again(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, stall_timeout="1s") as (_, port):
        assert (await elsewhere(ask, port, "/live"))[:2] == (200, b"live\n")
        with Probing(port) as probing:
            time.sleep(2.6)  # noqa: ASYNC251  # as above
        seen = [answer for answer in probing.answers if answer[0] == 503]
        assert (503, b"not live: the event loop has been stuck for 1 s\n") in seen
        assert (503, b"not ready: the event loop has been stuck for 1 s\n") in seen
        assert probing.answers[0][0] == 200, "and not before its time"
        assert await becomes(port, 200)


async def test_metrics_can_be_read_while_the_main_thread_is_stuck(tmp_path: Path) -> None:
    async with running(tmp_path, metrics_max_age=0) as (_, port):
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(ask(port, "/metrics")[1]))
        thread.start()
        thread.join(PATIENCE)  # the main thread waits here, and nowhere else
        assert b"isthmus_build_info" in found[0]


async def test_clients_that_only_hold_connections_block_no_probe(tmp_path: Path) -> None:
    async with running(tmp_path, max_connections=8, max_per_source=8, request_timeout="60s") as (
        app,
        port,
    ):
        with silent(port, 8, "127.0.0.2") as held:
            for _ in range(20):
                began = time.perf_counter()
                assert (await elsewhere(ask, port, "/live"))[0] == 200
                assert time.perf_counter() - began < 10, (
                    "the connections would be there for a minute"
                )
            assert await elsewhere(ends, held[0]) == b"", "the oldest has been closed"
        # A connection counts as busy for a short time, because its request may be in flight.
        evicted = [
            count(app, "connections_evicted_total", listener="admin", reason=reason)
            for reason in ("idle", "busy")
        ]
        assert sum(evicted) >= 1


async def test_one_address_cannot_take_the_slots_of_others(tmp_path: Path) -> None:
    async with running(tmp_path, max_connections=8, max_per_source=3, request_timeout="60s") as (
        app,
        port,
    ):
        with silent(port, 1, "127.0.0.3") as other, silent(port, 20, "127.0.0.2"):
            assert (await elsewhere(ask, port, "/live"))[0] == 200
            ended = (
                count(app, f"connections_{how}_total", listener="admin", reason="source")
                for how in ("evicted", "refused")
            )
            assert sum(ended) >= 17
            other[0].sendall(b"GET /live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert (await elsewhere(ends, other[0])).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", b"GET /live HT"], ids=["nothing", "a part of its head"])
async def test_the_first_request_must_be_there_in_time(tmp_path: Path, said: bytes) -> None:
    async with running(tmp_path, request_timeout="300ms") as (_, port):
        with silent(port, 1) as (sock,):
            began = time.perf_counter()
            sock.sendall(said)
            answer = await elsewhere(ends, sock)
            assert 0.2 < time.perf_counter() - began < 5
            assert answer.startswith(b"HTTP/1.1 408 ") if said else answer == b""


async def test_a_connection_that_has_asked_may_pause(tmp_path: Path) -> None:
    async with running(tmp_path, request_timeout="100ms") as (_, port):
        connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
        for _ in range(2):
            await elsewhere(connection.request, "GET", "/ready")
            answer = await elsewhere(connection.getresponse)
            assert (answer.status, answer.read()) == (200, b"ready\n")
            assert connection.sock is not None
            await trio.sleep(0.3)
        connection.close()


async def test_metrics_are_compressed_for_clients_that_accept_it(tmp_path: Path) -> None:
    async with running(tmp_path, metrics_max_age="1m") as (_, port):
        status, plain, fields = await elsewhere(ask, port, "/metrics")
        assert (status, fields["vary"], fields["content-encoding"]) == (
            200,
            "Accept-Encoding",
            None,
        )
        _, zipped, fields = await elsewhere(lambda: ask(port, "/metrics", Accept_Encoding="gzip"))
        assert (fields["content-encoding"], fields["vary"], int(fields["content-length"])) == (
            "gzip",
            "Accept-Encoding",
            len(zipped),
        )
        assert gzip.decompress(zipped) == plain
        assert len(zipped) < len(plain) / 4


async def test_one_text_is_given_to_all_within_its_age(tmp_path: Path) -> None:
    async with running(tmp_path, metrics_max_age="1m") as (app, port):
        before = (await elsewhere(ask, port, "/metrics"))[1]
        app.metrics.count_error("inbound", "test")
        assert (await elsewhere(ask, port, "/metrics"))[1] == before
    async with running(tmp_path, metrics_max_age=0) as (app, port):
        app.metrics.count_error("inbound", "test")
        assert b'reason="test"' in (await elsewhere(ask, port, "/metrics"))[1]


async def test_scrapers_in_a_loop_are_slowed_down_and_probes_are_not(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, port):
        scraped: list[float] = []
        began = time.perf_counter()

        def scrape() -> None:
            connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
            for _ in range(25):
                connection.request("GET", "/metrics")
                connection.getresponse().read()
                scraped.append(time.perf_counter() - began)
            connection.close()

        threads = [threading.Thread(target=scrape) for _ in range(8)]
        with Probing(port) as probing:
            for thread in threads:
                thread.start()
            for thread in threads:
                await elsewhere(thread.join, PATIENCE)
    assert len(scraped) == 200
    assert scraped[-1] > 2.8, "50 at once, and 50 a second after them"
    assert sorted(probing.seconds)[len(probing.seconds) * 9 // 10] < 0.1


async def test_scrapers_that_leave_before_their_answer_delay_neither_probes_nor_other_scrapers(
    tmp_path: Path,
) -> None:
    """From so many addresses that a limit for each address does not help. A request is queued until
    it is served, or its client has left, or the queue is full."""
    async with running(tmp_path) as (app, port):
        there: deque[socket.socket] = deque()
        with Probing(port) as probing:
            for number in range(400):
                sock = socket.create_connection(
                    (HOST, port), PATIENCE, (f"127.0.0.{number % 100 + 2}", 0)
                )
                there.append(sock)
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
                if number % 2:
                    sock.shutdown(socket.SHUT_WR)  # a half-close: it may still read
                if len(there) > 80:  # more than the queue holds
                    there.popleft().close()
                await trio.sleep(0.002)
            for sock in there:
                sock.close()
            began = time.perf_counter()
            assert (await elsewhere(ask, port, "/metrics"))[0] == 200
            assert time.perf_counter() - began < 3, "400 turns would take 7 s"
        assert [answer for answer in probing.answers if answer[0] != 200] == []
        assert sorted(probing.seconds)[len(probing.seconds) * 9 // 10] < 2, (
            "no request waits for its turn"
        )
        assert count(app, "connections_evicted_total", listener="admin", reason="busy") >= 10


@pytest.mark.parametrize(
    ("value", "takes"),
    [
        (b"gzip", True), (b"deflate, gzip;q=0.5", True), (b"GZIP", True), (b"x-gzip", True), (b"gzip;q=1.000", True), (b"gzip; q=0", False),
        (b"gzip;q=0.000", False), (b"identity", False), (b"br, deflate", False), (b"", False),
    ],
)  # fmt: skip
def test_who_can_read_gzip_says_so(value: bytes, takes: bool) -> None:
    assert takes_gzip(Headers([(b"Accept-Encoding", value)])) is takes
