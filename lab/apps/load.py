"""A steady load of HTTP requests, with a few clients and kept-alive connections: `python -m
lab.apps.load FOLDER CLIENTS PAUSE URL...`.

The clients use the URLs in turn. FOLDER, which exists, gets a file `report.json` every half second
and at the end: how many requests there were, how many by answer (the value of `pod` in the answer's
JSON), the failures (the first 50 in full), and the longest time in seconds. The load ends on
SIGTERM, or when a file FOLDER/stop exists.

A request fails unless its answer is a complete 200. No request is repeated, except on a kept-alive
connection that the server has closed before the request: as every HTTP client does, by RFC 9112,
section 9.3.1. These are counted as `again`.
"""

import http.client
import json
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 20.0  # seconds for one request
MOST_FAILURES = 50  # that are reported in full; all are counted
INTERVAL = 0.5


class Tally:
    """What has happened so far. All clients share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by: Counter[str] = Counter()
        self._failures: list[str] = []
        self._counts: Counter[str] = Counter(requests=0, failed=0, again=0)
        self._longest = 0.0

    def good(self, who: str, seconds: float) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._by[who] += 1
            self._longest = max(self._longest, seconds)

    def failed(self, why: str) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._counts["failed"] += 1
            if len(self._failures) < MOST_FAILURES:
                self._failures.append(f"{time.strftime('%H:%M:%S')} {why}"[:500])

    def again(self) -> None:
        with self._lock:
            self._counts["again"] += 1

    def report(self) -> str:
        with self._lock:
            found = {**self._counts, "by": self._by, "failures": self._failures}
            return json.dumps({**found, "longest": self._longest})


def ask(connections: dict[str, http.client.HTTPConnection], url: str, tally: Tally) -> None:
    """One request."""
    parts = urlsplit(url)
    began = time.monotonic()
    try:
        for last in (False, True):
            fresh = parts.netloc not in connections
            connection = connections.setdefault(
                parts.netloc, http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
            )
            try:
                connection.request("GET", parts.path or "/")
                response = connection.getresponse()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                connection.close()
                del connections[parts.netloc]
                if fresh or last:
                    raise
                tally.again()
                continue
            body = response.read()
            if response.status != 200:
                said = response.headers.get("proxy-status", "")
                raise ValueError(f"{response.status} {said} {body[:200]!r}")
            tally.good(json.loads(body)["pod"], time.monotonic() - began)
            return
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        if (broken := connections.pop(parts.netloc, None)) is not None:
            broken.close()
        tally.failed(f"{url}: {type(error).__name__}: {error}")


def main(folder: Path, clients: int, pause: float, urls: list[str]) -> None:
    """Run until SIGTERM, or until the file `stop` exists."""
    tally, ended = Tally(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())

    def client(number: int) -> None:
        connections: dict[str, http.client.HTTPConnection] = {}
        while not ended.wait(pause):
            ask(connections, urls[number % len(urls)], tally)
            number += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while not ended.wait(INTERVAL):
        write(folder, tally)
        if (folder / "stop").exists():
            ended.set()
    for thread in threads:
        thread.join()
    write(folder, tally)


def write(folder: Path, tally: Tally) -> None:
    """Replace the report as a whole."""
    new = folder / "report.new"
    new.write_text(tally.report())
    new.replace(folder / "report.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
