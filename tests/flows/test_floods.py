"""Floods of clients without an identity, beside a member of the mesh: real proxies, and the memory
and time that they take.

What took seconds takes milliseconds now. The bounds leave room for a busy machine."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from proxy.wire.h2.frames import PREFACE
from tests.kit.floods import HOST, MIB, Flooded, Uploads, eventually, flooded, member
from tests.kit.http2 import GET, headers, settings

# Seconds for every response that the member gets.
WITHIN = 2.0
FAST = pytest.mark.parametrize("fast", [True, False], ids=["fast path", "ordinary path"])


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group with a limit of 256 MiB."""
    group = Path("/sys/fs/cgroup/memory") / f"isthmus-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 * MIB), "ascii")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text("ascii"), 5)
    group.rmdir()


def acted(proxy: Flooded, name: str) -> bool:
    return proxy.metric(name) > 0


def _refused(port: int) -> bool:
    """A new client's connection ends without a response."""
    with socket.create_connection((HOST, port)) as sock:
        sock.settimeout(2)
        try:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return sock.recv(1000) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


@FAST
def test_uploads_that_are_not_taken_cannot_take_the_memory(tmp_path: Path, fast: bool) -> None:
    budget = 96 * MIB
    with flooded(tmp_path, "hold", {"memory": {"budget": budget}, "fast_path": fast}) as proxy:
        with member(proxy) as seen:
            before, most = proxy.resident(), 0

            def watch() -> None:
                nonlocal most
                most = max(most, proxy.resident())

            uploads = Uploads(proxy.port, 60, 40)
            # Without a budget 225 MiB and more go into the proxy.
            for action in ("window", "read"):
                name = f'isthmus_memory_short_total{{action="{action}"}}'
                assert uploads.send_until(partial(acted, proxy, name), watch)
            used = proxy.metric('isthmus_memory_used_bytes{clients="others"}')
            assert budget // 2 < used <= budget * 3 // 4 + MIB
            assert most - before < budget * 3 // 2
            uploads.close()
            assert eventually(
                lambda: proxy.metric('isthmus_memory_used_bytes{clients="others"}') == 0
            )
            assert eventually(lambda: proxy.metric('isthmus_streams_open{clients="others"}') == 0)
            assert eventually(lambda: proxy.resident() < before + 64 * MIB), (
                before / MIB,
                proxy.resident() / MIB,
            )
            assert eventually(lambda: proxy.metric("isthmus_memory_trims_total") > 0)
        seen.was_served(WITHIN)
        assert proxy.process.poll() is None


def test_a_connection_that_holds_too_much_for_too_long_is_closed(tmp_path: Path) -> None:
    with flooded(tmp_path, "hold", {"memory": {"budget": 32 * MIB, "patience": "1s"}}) as proxy:
        uploads = Uploads(proxy.port, 20, 40)
        assert uploads.send_until(
            lambda: acted(proxy, 'isthmus_memory_short_total{action="close"}')
        )
        assert eventually(
            lambda: proxy.metric('isthmus_memory_used_bytes{clients="others"}') < 20 * MIB
        )
        uploads.close()


def test_when_memory_is_short_new_clients_are_refused_and_members_are_not(tmp_path: Path) -> None:
    with (
        flooded(tmp_path, "hold", {"memory": {"budget": 16 * MIB, "patience": "1m"}}) as proxy,
        member(proxy) as seen,
    ):
        uploads = Uploads(proxy.port, 300, 4)
        assert uploads.send_until(
            lambda: acted(proxy, 'isthmus_memory_short_total{action="connection"}')
        )
        assert eventually(lambda: _refused(proxy.port)), (
            "another one may fit in when the member's request has ended"
        )
        uploads.close()
    seen.was_served(WITHIN)


def test_a_sidecar_keeps_within_the_limit_of_its_container(tmp_path: Path, cgroup: Path) -> None:
    """The default budget, in a control group of 256 MiB: 120 connections offer 450 MiB."""
    with flooded(tmp_path, "hold", cgroup=cgroup) as proxy:
        assert proxy.metric("isthmus_memory_limit_bytes") == (256 - 88) * MIB * 4 // 5
        with member(proxy) as seen:
            uploads = Uploads(proxy.port, 120, 40)
            assert uploads.send_until(
                lambda: acted(proxy, 'isthmus_memory_short_total{action="read"}')
            )
            assert proxy.process.poll() is None
            uploads.close()
            assert eventually(
                lambda: proxy.metric('isthmus_memory_used_bytes{clients="others"}') == 0
            )
        seen.was_served(WITHIN)
        assert proxy.process.poll() is None
    assert int((cgroup / "memory.failcnt").read_text("ascii")) == 0


def _answers(socks: list[socket.socket], quiet: float) -> int:
    """The number of bytes that arrive until none has arrived for `quiet` seconds."""
    poll, total = select.poll(), 0
    for sock in socks:
        sock.setblocking(False)
        poll.register(sock, select.POLLIN)
    last = time.monotonic()
    while time.monotonic() < last + quiet:
        for descriptor, _ in poll.poll(100):
            try:
                data = os.read(descriptor, 65536)
            except OSError:
                data = b""
            if data:
                total += len(data)
                last = time.monotonic()
            else:
                poll.unregister(descriptor)
    return total


@pytest.mark.parametrize(
    ("fast", "protected"),
    [(True, False), (False, True)],
    ids=["open, fast path", "protected, ordinary path"],
)
def test_thousands_of_streams_at_once_do_not_stop_the_others(
    tmp_path: Path, fast: bool, protected: bool
) -> None:
    with flooded(tmp_path, "answer", {"fast_path": fast}, require_identity=protected) as proxy:
        with member(proxy) as seen:
            socks = [socket.create_connection((HOST, proxy.port)) for _ in range(60)]
            for sock in socks:
                sock.sendall(PREFACE + settings())
            burst = b"".join(headers(1 + 2 * number, GET) for number in range(200))
            for sock in socks:
                sock.sendall(burst)
            # Each is answered: no request is lost in a queue. On a protected port the first refusal
            # ends the connection.
            assert _answers(socks, 2.0) > (0 if protected else 60 * 200 * 10)
            for sock in socks:
                with suppress(OSError):
                    sock.send(b"".join(headers(1001 + 2 * number, GET) for number in range(200)))
            for sock in socks:  # and all of these end while they are in progress
                sock.close()
            assert eventually(lambda: proxy.metric('isthmus_streams_open{clients="others"}') == 0)
        seen.was_served(WITHIN)
        # The streams of the second burst may come after the look at the open ones.
        assert eventually(lambda: proxy.metric("isthmus_steps_waiting") == 0)


def test_no_more_streams_are_open_than_may_be_and_members_have_a_reserve(tmp_path: Path) -> None:
    with (
        flooded(tmp_path, "hold", {"memory": {"max_streams": 400}}) as proxy,
        member(proxy) as seen,
    ):
        socks = [socket.create_connection((HOST, proxy.port)) for _ in range(20)]
        for sock in socks:
            sock.sendall(
                PREFACE
                + settings()
                + b"".join(headers(1 + 2 * number, GET) for number in range(100))
            )
        assert eventually(lambda: proxy.metric('isthmus_streams_open{clients="others"}') == 300)
        assert eventually(lambda: proxy.metric("isthmus_streams_refused_total") == 1700)
        for sock in socks:
            sock.close()
        assert eventually(lambda: proxy.metric('isthmus_streams_open{clients="others"}') == 0)
    seen.was_served(WITHIN)


@pytest.mark.parametrize("kind", ["http1", "http2", "silent"])
def test_thousands_of_clients_that_leave_at_once_do_not_stop_the_others(
    tmp_path: Path, kind: str
) -> None:
    with flooded(tmp_path, "answer") as proxy, member(proxy) as seen:
        socks: list[socket.socket] = []
        for _ in range(1500):
            sock = socket.create_connection((HOST, proxy.port))
            socks.append(sock)
            if kind == "http2":
                sock.sendall(PREFACE + settings())
            elif kind == "http1":
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        name = 'isthmus_connections_open{direction="inbound",peer="src",tls="none"}'
        if kind != "silent":
            assert eventually(lambda: proxy.metric(name) >= 1500)
        for sock in socks:
            sock.close()
        assert eventually(lambda: proxy.metric('isthmus_memory_used_bytes{clients="others"}') == 0)
    seen.was_served(WITHIN)
