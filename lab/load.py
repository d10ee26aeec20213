"""A load of requests during faults; the outcome of each request is counted.

A fixed number of clients in a pod, each with one kept-alive connection and one request at a time. A
client opens a new connection when the old one ended normally (Connection: close, or closed between
two requests). Every other end is an outcome of its own.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import h11
import trio

from lab.pod import Pod
from lab.process import LabError
from lab.report import percentile

_GONE = (OSError, trio.BrokenResourceError, h11.RemoteProtocolError)
PAUSE = 0.004  # seconds between the requests of a client
PATIENCE = 30.0  # seconds for one request
MOST_SAMPLES = 200_000  # samples whose times are kept; all are counted
MOST_BODY = 4096  # bytes of a response that are examined


def proxy_error(status: str) -> str:
    """The error type of a Proxy-Status field (RFC 9209); empty if it names none."""
    return next((part[6:] for part in status.split(";") if part.startswith("error=")), "")


class Sample(NamedTuple):
    """One request: its end (seconds of time.monotonic), its duration (seconds), and its outcome."""

    when: float
    seconds: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of requests. `p50` and `p99` in seconds, of those answered with 200; 0 if there
    were none.
    """

    requests: int
    errors: int
    p50: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Summary":
        """The summary of some samples."""
        taken = list(samples)
        good = sorted(sample.seconds for sample in taken if sample.outcome == "200")
        p50, p99 = (percentile(good, 0.5), percentile(good, 0.99)) if good else (0.0, 0.0)
        return cls(len(taken), len(taken) - len(good), p50, p99)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.errors} errors, p50 {self.p50 * 1000:.1f} ms, p99"
            f" {self.p99 * 1000:.1f} ms"
        )


@dataclass(slots=True)
class _Answer:
    """The response received so far."""

    outcome: str = ""
    began: bool = False
    ended: bool = False
    body: bytearray = field(default_factory=bytearray)

    def take(self, event: object) -> None:
        if isinstance(event, h11.Response):
            status = dict(event.headers).get(b"proxy-status", b"").decode()
            self.outcome = f"{event.status_code} {proxy_error(status)}".strip()
        elif isinstance(event, h11.Data):
            self.body += event.data[: MOST_BODY - len(self.body)]
        self.ended = isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed))

    def server(self) -> list[str]:
        """The server's own name (lab/apps/web.py), if it sent one."""
        if self.outcome != "200":
            return []
        try:
            said = json.loads(self.body)
        except ValueError:
            return []
        return [said["name"]] if isinstance(said, dict) and "name" in said else []


class Load:
    """`async with Load(pod, host, port) as load: ...`; afterwards `outcomes` counts what the
    clients saw.

    "200" and other statuses are responses ("502 connection_refused": made by a proxy), "connect": a
    connection that could not be opened, "cut": one that ended during an exchange, "silent": no
    answer within PATIENCE seconds.
    """

    def __init__(
        self, pod: Pod, host: str, port: int, *, clients: int = 6, authority: str = "shop"
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # answered requests by the server's own name
        self.samples: list[Sample] = []
        self.connections = 0
        # connections closed just as a request was sent: not answered, so safe to retry
        self.raced = 0
        self._target = (pod, host, port)
        self.body = b""  # posted, if not empty
        self._authority = authority
        self._clients = clients
        self._stop = False
        self._done = trio.Event()
        self._running = 0
        self._last_error_body = ""  # the last answer that was not 200
        self._started = 0  # started requests
        self._under_way: set[int] = set()  # numbers of the requests in flight

    @property
    def succeeded(self) -> int:
        return self.outcomes["200"]

    def summary(self, since: float = 0.0, until: float = float("inf")) -> Summary:
        """A summary of the requests that ended between two times (time.monotonic)."""
        return Summary.of(sample for sample in self.samples if since <= sample.when < until)

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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.move_on_after(PATIENCE + 2, shield=True):
            await self.stop()

    async def stop(self) -> None:
        """Let the requests in flight finish."""
        self._stop = True
        with trio.move_on_after(PATIENCE + 1, shield=True):
            await self._done.wait()

    async def more(self, number: int, outcome: str = "200", timeout: float = 60.0) -> None:
        """Wait for `number` more requests with this outcome."""
        goal = self.outcomes[outcome] + number
        with trio.move_on_after(timeout):
            while self.outcomes[outcome] < goal:  # noqa: ASYNC110  # one reader, several writers, and a small delay is harmless
                await trio.sleep(0.02)
            return
        raise LabError(
            f"not {number} more {outcome!r} within {timeout:g} s: {dict(self.outcomes)}; the last"
            f" said {self._last_error_body!r}"
        )

    async def settle(self, timeout: float = 60.0) -> None:
        """Wait until the requests now in flight have ended: later counts then reflect everything
        done before.
        """
        old = set(self._under_way)
        with trio.move_on_after(timeout):
            while old & self._under_way:  # noqa: ASYNC110  # as in `more`
                await trio.sleep(0.02)
            return
        raise LabError(f"{len(old & self._under_way)} requests have not ended within {timeout:g} s")

    async def _client(self) -> None:
        try:
            while not self._stop:
                await self._connection()
        finally:
            self._running -= 1
            if not self._running:
                self._done.set()

    def _note(self, outcome: str, began: float) -> None:
        now = time.monotonic()
        self.outcomes[outcome] += 1
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append(Sample(now, now - began, outcome))

    async def _connection(self) -> None:
        pod, host, port = self._target
        began = time.monotonic()
        try:
            with trio.fail_after(PATIENCE):
                stream = await pod.connect(host, port)
        except (OSError, trio.TooSlowError):
            self._note("connect", began)
            await trio.sleep(0.05)
            return
        self.connections += 1
        connection = h11.Connection(h11.CLIENT)
        first = True
        async with stream:
            while not self._stop:
                began = time.monotonic()
                outcome = await self._request(stream, connection, first=first)
                if outcome == "raced":
                    self.raced += 1
                    return
                self._note(outcome, began)
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    await trio.sleep(0.02)
                    return
                connection.start_next_cycle()
                first = False
                await trio.sleep(PAUSE)

    async def _request(
        self, stream: trio.SocketStream, connection: h11.Connection, *, first: bool
    ) -> str:
        self._started += 1
        number = self._started
        self._under_way.add(number)
        try:
            return await self._exchange(stream, connection, first=first)
        finally:
            self._under_way.remove(number)

    def _message(self, connection: h11.Connection) -> bytes:
        """A request. It has its length, so that it is one write."""
        headers = [("Host", self._authority)] + (
            [("Content-Length", str(len(self.body)))] if self.body else []
        )
        parts = [
            h11.Request(method="POST" if self.body else "GET", target="/", headers=headers),
            h11.Data(self.body),
            h11.EndOfMessage(),
        ]
        return b"".join(
            connection.send(part) or b"" for part in parts if part is not parts[1] or self.body
        )

    async def _exchange(
        self, stream: trio.SocketStream, connection: h11.Connection, *, first: bool
    ) -> str:
        answer = _Answer()
        try:
            with trio.fail_after(PATIENCE):
                await stream.send_all(self._message(connection))
                while not answer.ended:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        data = await stream.receive_some(65536)
                        answer.began = answer.began or bool(data)
                        connection.receive_data(data)
                    else:
                        answer.take(event)
        except trio.TooSlowError:
            return "silent"
        except _GONE:
            return "cut" if first or answer.began else "raced"
        self.answered.update(answer.server())
        if answer.outcome != "200":
            self._last_error_body = answer.body[:300].decode(errors="replace")
        return answer.outcome or "cut"
