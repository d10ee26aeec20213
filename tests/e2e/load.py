"""Requests under which things are done to a mesh, each of them accounted for.

A bounded number of clients in a pod, each with one kept connection and one request at a time. Clients open a new connection when the old
one was ended with notice (Connection: close, or an end between two requests); every other irregularity is an outcome of its own.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Self

import h11
import trio

from lab.pod import Pod
from tests.e2e.stage import proxy_error

_GONE = (OSError, trio.BrokenResourceError, h11.RemoteProtocolError)


class Load:
    """`async with Load(pod, host, port) as load: ...`; afterwards `outcomes` counts what the clients saw.

    "200" and other statuses are answers ("502 connection_refused" one that a proxy made up), "connect" a connection that could not be
    made, "cut" one that ended within an exchange, "silent" one on which no answer came within `patience` seconds.
    """

    def __init__(self, pod: Pod, host: str, port: int, *, clients: int = 6, pause: float = 0.004, patience: float = 30.0) -> None:
        self.outcomes: Counter[str] = Counter()
        self.connections = 0
        self.raced = 0  # connections that ended just as a request was sent: not answered, so safe to send again
        self._target = (pod, host, port)
        self._clients = clients
        self._pause = pause
        self._patience = patience
        self._stop = False
        self._done = trio.Event()
        self._running = 0

    @property
    def good(self) -> int:
        return self.outcomes["200"]

    @property
    def bad(self) -> dict[str, int]:
        return {outcome: number for outcome, number in self.outcomes.items() if outcome != "200"}

    async def __aenter__(self) -> Self:
        nursery = self._target[0].cluster.lab.nursery
        for _ in range(self._clients):
            self._running += 1
            nursery.start_soon(self._client)
        await self.more(self._clients)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with trio.move_on_after(self._patience + 2, shield=True):
            await self.stop()

    async def stop(self) -> None:
        """Let the requests that are on their way finish."""
        self._stop = True
        with trio.move_on_after(self._patience + 1, shield=True):
            await self._done.wait()

    async def more(self, number: int, outcome: str = "200", timeout: float = 60.0) -> None:
        """Wait for `number` more of this outcome."""
        goal = self.outcomes[outcome] + number
        with trio.move_on_after(timeout):
            while self.outcomes[outcome] < goal:  # noqa: ASYNC110  # one reader, several writers, and a moment's delay harms nobody
                await trio.sleep(0.02)
            return
        raise AssertionError(f"not {number} more {outcome!r} within {timeout:g} s: {dict(self.outcomes)}")

    async def _client(self) -> None:
        try:
            while not self._stop:
                await self._connection()
        finally:
            self._running -= 1
            if not self._running:
                self._done.set()

    async def _connection(self) -> None:
        pod, host, port = self._target
        try:
            with trio.fail_after(self._patience):
                stream = await pod.connect(host, port)
        except (OSError, trio.TooSlowError):
            self.outcomes["connect"] += 1
            await trio.sleep(0.05)
            return
        self.connections += 1
        connection = h11.Connection(h11.CLIENT)
        first = True
        async with stream:
            while not self._stop:
                outcome = await self._request(stream, connection, first=first)
                if outcome == "raced":
                    self.raced += 1
                    return
                self.outcomes[outcome] += 1
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    await trio.sleep(0.02)
                    return
                connection.start_next_cycle()
                first = False
                await trio.sleep(self._pause)

    async def _request(self, stream: trio.SocketStream, connection: h11.Connection, *, first: bool) -> str:
        answered = False
        outcome = ""
        try:
            with trio.fail_after(self._patience):
                await stream.send_all(connection.send(h11.Request(method="GET", target="/", headers=[("Host", "shop")])) or b"")
                connection.send(h11.EndOfMessage())
                while True:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        data = await stream.receive_some(65536)
                        answered = answered or bool(data)
                        connection.receive_data(data)
                    elif isinstance(event, h11.Response):
                        headers = dict(event.headers)
                        outcome = f"{event.status_code} {proxy_error(headers.get(b'proxy-status', b'').decode())}".strip()
                    elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                        return outcome or "cut"
        except trio.TooSlowError:
            return "silent"
        except _GONE:
            return "cut" if first or answered else "raced"
