"""Proxies in this process, between a client and a server that read all the time, and all results of
a play."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
import yaml

from proxy.app import App
from proxy.config.load import load
from proxy.exchange.trace_layer import Tracing
from proxy.net.address import Address
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing_setup import FlowTracing
from tests.kit.apps import HOST
from tests.kit.http import listen, until
from tests.kit.own_identity import identity, port_of
from tracing.sampling import Sampling, Tracer
from tracing.spans import HttpRecord, Record

WhichPath = Literal["ordinary", "fast", "disturbed"]
Shape = Literal["inbound", "outbound", "pair"]

PATHS: tuple[WhichPath, ...] = ("ordinary", "fast", "disturbed")
ALL = ("requests", "clients", "servers", "connections", "spans", "metrics")


class End:
    """One end of a connection, outside of the proxies. Data is read at once."""

    def __init__(self, stage: Stage, sock: trio.socket.SocketType) -> None:
        self._stage = stage
        self.stream = trio.SocketStream(sock)
        self.received = bytearray()
        self.used = 0  # bytes that a test has read
        self.ended: str | None = None  # by the other side
        self.closed = False  # by us

    async def read(self) -> None:
        try:
            while data := await self.stream.receive_some(65536):
                await self.receive(data)
                self._stage.tell()
            self.ended = "end"
        except trio.BrokenResourceError:
            self.ended = "reset"
        except trio.ClosedResourceError:
            self.ended = "closed here"
        self._stage.tell()

    async def receive(self, data: bytes) -> None:
        self.received += data

    @property
    def new(self) -> bytes:
        return bytes(self.received[self.used :])

    async def behind(self, count: int) -> bytes:
        """The new data without the first `count` bytes; nothing at the end."""
        await self._stage.until(lambda: len(self.new) > count or self.ended is not None)
        return self.new[count:]

    def take(self, count: int) -> bytes:
        data = self.new[:count]
        self.used += len(data)
        self._stage.tell()
        return data

    async def send(self, *pieces: bytes) -> None:
        """Each in its own write. Whether the other side still reads does not matter here."""
        try:
            for piece in pieces:
                if piece:
                    await self.stream.send_all(piece)
                await trio.lowlevel.checkpoint()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def close(self, *, reset: bool = False) -> None:
        if not self.closed:
            self.closed = True
            if reset:
                self.stream.setsockopt(
                    trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0"
                )
            self.stream.socket.close()
            self._stage.tell()

    async def finish(self) -> None:
        """Half-close."""
        await self.stream.send_eof()

    @property
    def quiet(self) -> bool:
        """Wait for nothing more of what a proxy has started to send."""
        return True

    def seen(self) -> object:
        """What it has received."""
        return masked(self.received)


@dataclass
class Left:
    """The results of a play, without ports, times and random ids."""

    clients: list[tuple[Any, str | None]] = field(
        default_factory=list
    )  # what they received, and how their connection ended
    # The same for servers; whether it was open
    servers: list[tuple[Any, bool]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # their log lines
    connections: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # log entries that must not occur
    finished: float = 0  # exchanges on the fast path


class Stage:
    """Where a play runs: the proxies, and the connections to both sides of them."""

    def __init__(
        self, nursery: trio.Nursery, address: Address, apps: list[App], cast: Cast
    ) -> None:
        self.apps = apps
        self._nursery = nursery
        self._address = address
        self._cast = cast
        self._changed = trio.Event()
        self.clients: list[End] = []
        self.servers: list[End] = []
        self.released = 0  # how often the waiting side has been released
        self.waits = 0  # how often a side has waited
        self.notes: list[str] = []  # the requests that servers have received

    def tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        with trio.fail_after(seconds):
            while not condition():
                await self._changed.wait()

    async def client(self, **how: Any) -> End:
        """A new connection to the proxy."""
        sock = trio.socket.socket()
        await sock.connect(tuple(self._address))
        end = self._cast.client(self, sock, **how)
        self.clients.append(end)
        self._nursery.start_soon(end.read)
        return end

    def accepted(self, sock: trio.socket.SocketType) -> End:
        end = self._cast.server(self, sock)
        self.servers.append(end)
        self._nursery.start_soon(end.read)
        return end

    async def wait(self) -> None:
        """The server waits until the client tells it to go on."""
        self.waits += 1
        mine = self.waits
        self.tell()
        await self.until(lambda: self.released >= mine)

    async def waiting(self) -> None:
        """The client waits until the server does."""
        await self.until(lambda: self.waits > self.released)

    def go_on(self) -> None:
        self.released += 1
        self.tell()

    async def settled(self) -> None:
        """Wait until no exchange is in progress in any proxy, and the servers know."""
        await until(
            lambda: (
                not any(
                    app.outbound_pools.counts()[0] + app.inbound_pools.counts()[0]
                    for app in self.apps
                )
            ),
            20,
        )
        await self.until(lambda: all(end.quiet for end in self.servers))

    async def known(self) -> None:
        """Wait until the proxy knows which of the server's connections are open."""
        last = self.apps[-1]
        pools = last.inbound_pools if last.listeners.inbound else last.outbound_pools
        await until(
            lambda: (
                sum(pools.counts())
                == sum(not end.closed and end.ended is None for end in self.servers)
            ),
            20,
        )

    async def forgotten(self) -> None:
        """Wait until the proxy knows which of the clients' connections are open."""
        acceptor = (
            self.apps[0].outbound if self.apps[0].listeners.outbound else self.apps[0].inbound
        )
        await until(lambda: acceptor.open <= sum(not end.closed for end in self.clients), 20)

    async def clear(self) -> None:
        """Close the clients, and wait until the proxies know."""
        for end in self.clients:
            end.close()
        await until(lambda: not self.apps[0].outbound.open + self.apps[0].inbound.open, 20)
        await self.settled()


Act = Callable[[Stage, random.Random], Awaitable[None]]
Serve = Callable[[Stage, End], Awaitable[None]]


@dataclass(frozen=True)
class Cast:
    """The parameters of a play. `protocol` and `policy`: what the directory says about the
    service."""

    serve: Serve
    client: Callable[..., End] = End
    server: Callable[[Stage, trio.socket.SocketType], End] = End
    protocol: Literal["http1", "http2"] = "http1"
    policy: Mapping[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def sidecar(tmp_path: Path, spans: list[Record], **document: Any) -> AsyncIterator[App]:
    file = tmp_path / "isthmus.yaml"
    off: dict[str, Any] = {
        "outbound": {"listen": []},
        "inbound": {"listen": []},
        "admin": {"listen": []},
    }
    off |= {"log": {"access": True}, "loops": {"max_hops": 8}}
    file.write_text(yaml.safe_dump({**off, **document}))
    tracing = Tracing(Tracer(Sampling()), spans.append)
    app = App(load(file, {}), Metrics(), FlowTracing(tracing, tracing))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.run)
        yield app
        nursery.cancel_scope.cancel()


def _calling(
    tmp_path: Path, cast: Cast, number: int, who: object, both: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a client's sidecar: there is one service, with one endpoint at port `number`."""
    port = {"port": number, "protocol": cast.protocol}
    endpoint = {"address": HOST} if who is None else {"address": HOST, "identity": str(who)}
    service = {
        "name": "c",
        "addresses": ["10.96.0.1"],
        "ports": [port],
        "endpoints": [endpoint],
        "policy": dict(cast.policy),
    }
    (tmp_path / "directory.yaml").write_text(yaml.safe_dump({"services": [service]}))
    way = {"listen": [f"{HOST}:0"], "fixed_destination": f"10.96.0.1:{port['port']}"}
    return {
        "outbound": way,
        "directory": {"file": str(tmp_path / "directory.yaml"), "settle": "0s"},
        **both,
    }


@asynccontextmanager
async def proxies(
    shape: Shape, tmp_path: Path, server: Address, spans: list[Record], *, cast: Cast, **both: Any
) -> AsyncIterator[list[App]]:
    """The sidecar of a server, or of a client, or one of each with mutual TLS between them; the
    client's first."""

    async with AsyncExitStack() as stack:
        to_server = {"inbound": {"listen": [f"{HOST}:0"], "fixed_destination": str(server)}, **both}
        if shape == "inbound":
            yield [await stack.enter_async_context(sidecar(tmp_path, spans, **to_server))]
        elif shape == "outbound":
            yield [
                await stack.enter_async_context(
                    sidecar(tmp_path, spans, **_calling(tmp_path, cast, server.port, None, both))
                )
            ]
        else:
            paths, who = identity(tmp_path)
            inbound = await stack.enter_async_context(
                sidecar(tmp_path, spans, **to_server, identity=paths)
            )
            calling = _calling(
                tmp_path, cast, port_of(inbound.listeners.inbound), who, {**both, "identity": paths}
            )
            yield [await stack.enter_async_context(sidecar(tmp_path, spans, **calling)), inbound]


@asynccontextmanager
async def staged(
    shape: Shape, tmp_path: Path, cast: Cast, spans: list[Record], **both: Any
) -> AsyncIterator[Stage]:
    listener = listen()
    server = Address.of(listener.getsockname())
    async with (
        trio.open_nursery() as nursery,
        proxies(shape, tmp_path, server, spans, cast=cast, **both) as apps,
        AsyncExitStack() as clients,
    ):
        for app in apps:
            # So that no connection is closed because of a limit, at a time that a play does not know.
            for _ in range(64):
                clients.enter_context(app.inbound_pools.client(server))
        first = apps[0].listeners
        stage = Stage(
            nursery, Address.of((first.outbound or first.inbound)[0].getsockname()), apps, cast
        )

        async def accept() -> None:
            listening = trio.socket.from_stdlib_socket(listener)
            with listening:
                while True:
                    sock, _ = await listening.accept()
                    nursery.start_soon(cast.serve, stage, stage.accepted(sock))

        nursery.start_soon(accept)
        yield stage
        for end in (*stage.clients, *stage.servers):
            end.close()
        nursery.cancel_scope.cancel()


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """The size of writes; usually all at once."""
    if rng.random() < 0.6:
        return [data]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([1, 1, 2, 5])))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


async def disturb(stage: Stage, rng: random.Random) -> None:
    """Hand over exchanges in progress, again and again."""
    while True:
        await trio.sleep(rng.random() * 0.003)
        for app in stage.apps:
            if app.runtime.fast_path is not None:
                app.runtime.fast_path.give_up(math.inf)


@dataclass
class Theatre:
    """Runs plays. `settings` of all proxies."""

    tmp_path: Path
    log: pytest.LogCaptureFixture
    cast: Cast
    settings: dict[str, Any] = field(default_factory=dict)

    async def on_all_paths(self, acts: list[Act], shape: Shape, seed: int) -> list[Left]:
        """One play, carried once on each of PATHS. The fast path carries what it can. The ordinary
        one is another path."""
        ordinary, fast, disturbed = [await self.play(acts, shape, path, seed) for path in PATHS]
        assert not ordinary.finished
        assert ordinary.spans
        return [ordinary, fast, disturbed]

    async def play(self, acts: list[Act], shape: Shape, path: WhichPath, seed: int) -> Left:
        self.log.clear()
        left, spans = Left(), list[Record]()
        async with (
            staged(
                shape,
                self.tmp_path,
                self.cast,
                spans,
                fast_path=path != "ordinary",
                **self.settings,
            ) as stage,
            trio.open_nursery() as beside,
        ):
            if path == "disturbed":
                beside.start_soon(disturb, stage, random.Random(seed))
            with trio.fail_after(100):
                for number, act in enumerate(acts):
                    try:
                        await act(stage, random.Random(f"{seed} {number}"))
                        await stage.settled()
                    except trio.TooSlowError:
                        ends = [
                            repr(end.seen())[-1500:]
                            for end in (*stage.clients[-1:], *stage.servers[-2:])
                        ]
                        raise AssertionError(
                            f"act {number} does not end ({shape}, {path}, {act}); last heard:"
                            f" {ends}"
                        ) from None
                await stage.clear()
            beside.cancel_scope.cancel()
            left.clients = [(end.seen(), end.ended) for end in stage.clients]
            left.servers = [(end.seen(), end.ended is None) for end in stage.servers]
            for number, app in enumerate(stage.apps):
                left.metrics |= _counted(number, app.render())
                left.finished += (
                    app.metrics.registry.get_sample_value(
                        "isthmus_fast_path_exchanges_total", {"end": "finished"}
                    )
                    or 0
                )
        self._read_log(left)
        left.spans = sorted(_shown(record) for record in spans if isinstance(record, HttpRecord))
        return left

    def _read_log(self, left: Left) -> None:
        for record in self.log.records:
            line: Any = getattr(record, "line", None)
            if line is not None:
                kept = replace(
                    line,
                    peer="",
                    upstream=line.upstream and "yes",
                    seconds=0.0,
                    words=_PORT.sub("", line.words),
                )
                if record.name == "isthmus.access":
                    left.requests.append(
                        _PORT.sub(
                            "", repr(replace(kept, span_id=b"", trace_id=bool(line.trace_id)))
                        )
                    )
                else:
                    counted = (
                        {} if self.cast.protocol == "http1" else {"read": 0, "written": 0}
                    )  # where frames end does not matter
                    left.connections.append(repr(replace(kept, destination="", **counted)))
            elif record.levelno >= logging.ERROR:
                left.faults.append(record.getMessage())
        left.requests.sort()
        left.connections.sort()


_PORT = re.compile(r":\d{4,5}\b")
_DRAWN = re.compile(
    rb"(?i)(?<=\ndate: )[^\r]*|-[0-9a-f]{16}(?=-[01]|\r)|:[0-9a-f]{16}(?=:)|(?<=\d\.\d):\d{4,5}\b"
)
_NOT_COMPARED = re.compile(
    r"isthmus_\w+_seconds(_bucket|_sum)?[{"
    r" ]|python_|process_|isthmus_build_info|isthmus_fast_path|\w+_created"
)


def masked(received: bytes | bytearray) -> bytes:
    """Without random values and ports."""
    return _DRAWN.sub(b"*", bytes(received))


def _counted(number: int, metrics: bytes) -> dict[str, float]:
    """All series except times. Of histograms of times, only their counts."""
    lines = [
        line
        for line in metrics.decode().splitlines()
        if not line.startswith("#") and not _NOT_COMPARED.match(line)
    ]
    return {
        f"{number} {series}": float(value)
        for series, value in (line.rsplit(" ", 1) for line in lines)
    }


def _shown(record: HttpRecord) -> str:
    assert record.started <= (record.head_at or record.ended) <= record.ended
    peer = record.peer and Address(record.peer.host, 0)
    destination = record.destination and Address(record.destination.host, 0)
    same = replace(
        record,
        started=0,
        ended=0,
        head_at=0,
        span_id=b"",
        follows=b"*" if record.follows else b"",
        tls=None,
    )
    kept = record.parent if record.parent == SPAN else b""
    same = replace(same, peer=peer, destination=destination, parent=kept)
    return _PORT.sub("", f"{same!r} tls={record.tls is not None}")


def same(ordinary: Left, other: Left, names: tuple[str, ...] = ALL) -> None:
    assert not ordinary.faults
    assert not other.faults
    for name in names:
        there, here = getattr(ordinary, name), getattr(other, name)
        if isinstance(there, dict):
            there, here = sorted(there.items()), sorted(here.items())
        for number, (a, b) in enumerate(
            zip_longest(map(str, there), map(str, here), fillvalue="nothing")
        ):
            at = next((n for n in range(min(len(a), len(b))) if a[n] != b[n]), min(len(a), len(b)))
            part = slice(max(0, at - 300), at + 150)
            assert a == b, (
                f"{name}, {number}: {a[part]!r} on the ordinary path, {b[part]!r} on the fast"
            )


TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
