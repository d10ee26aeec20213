"""An open-loop load: requests at a fixed rate, whether or not earlier ones have been answered.

    python -m perf.rate PORT RATE SECONDS [CONNECTIONS]

Requests are evenly spaced. A request's latency counts from its planned start. So a proxy that
pauses is charged for all requests planned in that time (otherwise: "coordinated omission"). Before
the clock starts, all connections have carried a request at the same time, so the proxies have as
many upstream connections: the cost of a new one is measured elsewhere, and sixteen of them would
dominate the last percent. Prints JSON: the number of answers, and percentiles in microseconds.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections import deque

from perf.pair import HOST

_REQUEST = b"GET / HTTP/1.1\r\nHost: perf.test\r\nUser-Agent: perf\r\nAccept: */*\r\n\r\n"
_PATIENCE = 10.0


class _Connection:
    """One request at a time. `due`: the planned start of the open request; None if there is
    none."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due: float | None = None
        self._seen = b""

    def send(self, due: float) -> None:
        self.due = due
        self._seen = b""
        self.socket.sendall(_REQUEST)

    def answered(self) -> bool:
        """Read the available data; returns whether the response is complete."""
        piece = self.socket.recv(65536)
        if not piece:
            raise SystemExit("a connection was closed")
        self._seen += piece
        head, blank, body = self._seen.partition(b"\r\n\r\n")
        if not blank:
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected answer: {head[:80]!r}")
        length = next(
            line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        return len(body) >= int(length.split(b":")[1])


def load(port: int, rate: float, seconds: float, count: int = 16) -> list[float]:
    """The latencies in seconds, sorted."""
    connections = {
        connection.socket.fileno(): connection
        for connection in (_Connection(port) for _ in range(count))
    }
    poller = select.epoll()
    for number in connections:
        poller.register(number, select.EPOLLIN)
    for connection in connections.values():
        connection.send(0.0)
    for connection in connections.values():
        while not connection.answered():
            pass
        connection.due = None
    free = deque(connections.values())
    waiting: deque[float] = deque()
    latencies: list[float] = []
    start = time.perf_counter() + 0.05
    total, planned = int(rate * seconds), 0
    while len(latencies) < total:
        now = time.perf_counter()
        if now > start + seconds + _PATIENCE:
            raise SystemExit(f"{total - len(latencies)} of {total} requests were not answered")
        while planned < total and start + planned / rate <= now:
            waiting.append(start + planned / rate)
            planned += 1
        while waiting and free:
            free.popleft().send(waiting.popleft())
        pause = max(0.0, start + planned / rate - time.perf_counter()) if planned < total else 1.0
        for number, _ in poller.poll(pause):
            connection = connections[number]
            if connection.answered() and connection.due is not None:
                latencies.append(time.perf_counter() - connection.due)
                connection.due = None
                free.append(connection)
    return sorted(latencies)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    port, rate, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    found = load(port, rate, seconds, *map(int, sys.argv[4:]))
    named = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    print(
        json.dumps(
            {
                "answers": len(found),
                **{name: percentile(found, share) * 1e6 for name, share in named.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
