"""Requests under which things are done to a mesh, each of them accounted for.

A bounded number of clients in a pod, each with one kept connection and one request at a time. Clients open a new connection when the old
one was ended with notice (Connection: close, or an end between two requests); every other irregularity is an outcome of its own.
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
MOST_SAMPLES = 200_000  # of which the times are kept; all are counted
MOST_BODY = 4096  # bytes of a response that are looked at


def proxy_error(status: str) -> str:
    """The error type of a Proxy-Status field (RFC 9209); empty if it names none."""
    return next((part[6:] for part in status.split(";") if part.startswith("error=")), "")


class Sample(NamedTuple):
    """One request: when it ended (seconds of time.monotonic), how long it took (seconds), and what came of it."""

    when: float
    seconds: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a number of requests came to. `p50` and `p99` in seconds, of those that were answered by 200; 0 if there was none."""

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
        return f"{self.requests} requests, {self.errors} errors, p50 {self.p50 * 1000:.1f} ms, p99 {self.p99 * 1000:.1f} ms"


@dataclass(slots=True)
class _Answer:
    """What has come of a response so far."""

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
        """The name that the server gave itself (lab/apps/web.py), if it gave one."""
        if self.outcome != "200":
            return []
        try:
            said = json.loads(self.body)
        except ValueError:
            return []
        return [said["name"]] if isinstance(said, dict) and "name" in said else []


class Load:
    """`async with Load(pod, host, port) as load: ...`; afterwards `outcomes` counts what the clients saw.

    "200" and other statuses are answers ("502 connection_refused" one that a proxy made up), "connect" a connection that could not be
    made, "cut" one that ended within an exchange, "silent" one on which no answer came within PATIENCE seconds.
    """

    def __init__(self, pod: Pod, host: str, port: int, *, clients: int = 6, authority: str = "shop") -> None:
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # how many requests each server has answered, by the name that it gave itself
        self.samples: list[Sample] = []
        self.connections = 0
        self.raced = 0  # connections that ended just as a request was sent: not answered, so safe to send again
        self._target = (pod, host, port)
        self.body = b""  # if there is one, it is posted
        self._authority = authority
        self._clients = clients
        self._stop = False
        self._done = trio.Event()
        self._running = 0
        self._told = ""  # what the last answer that was not 200 said
        self._begun = 0  # requests
        self._under_way: set[int] = set()  # of these, by number

    @property
    def good(self) -> int:
        return self.outcomes["200"]

    def summary(self, since: float = 0.0, until: float = float("inf")) -> Summary:
        """What the requests that ended between two moments (time.monotonic) came to."""
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

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with trio.move_on_after(PATIENCE + 2, shield=True):
            await self.stop()

    async def stop(self) -> None:
        """Let the requests that are on their way finish."""
        self._stop = True
        with trio.move_on_after(PATIENCE + 1, shield=True):
            await self._done.wait()

    async def more(self, number: int, outcome: str = "200", timeout: float = 60.0) -> None:
        """Wait for `number` more of this outcome."""
        goal = self.outcomes[outcome] + number
        with trio.move_on_after(timeout):
            while self.outcomes[outcome] < goal:  # noqa: ASYNC110  # one reader, several writers, and a moment's delay harms nobody
                await trio.sleep(0.02)
            return
        raise LabError(f"not {number} more {outcome!r} within {timeout:g} s: {dict(self.outcomes)}; the last said {self._told!r}")

    async def settle(self, timeout: float = 60.0) -> None:
        """Wait until the requests that are under way now have ended: what is counted from then on knows of everything done before."""
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

    async def _request(self, stream: trio.SocketStream, connection: h11.Connection, *, first: bool) -> str:
        self._begun += 1
        number = self._begun
        self._under_way.add(number)
        try:
            return await self._exchange(stream, connection, first=first)
        finally:
            self._under_way.remove(number)

    def _message(self, connection: h11.Connection) -> bytes:
        """A request. Each has its length, so that it is one write."""
        headers = [("Host", self._authority)] + ([("Content-Length", str(len(self.body)))] if self.body else [])
        parts = [h11.Request(method="POST" if self.body else "GET", target="/", headers=headers), h11.Data(self.body), h11.EndOfMessage()]
        return b"".join(connection.send(part) or b"" for part in parts if part is not parts[1] or self.body)

    async def _exchange(self, stream: trio.SocketStream, connection: h11.Connection, *, first: bool) -> str:
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
            self._told = answer.body[:300].decode(errors="replace")
        return answer.outcome or "cut"
