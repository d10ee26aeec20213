"""A well-behaved member beside a flood, as a process: `python -m tests.kit.flood_member PORT
ADMIN`.

Sends requests through its own sidecar (PORT), on kept and on new connections, and probes the
flooded proxy (ADMIN), until its input ends. Then it prints the number of requests, how long the
slowest responses took (seconds), and what failed, as JSON."""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

PAUSE = 0.01
PATIENCE = 30.0


class RequestStats:
    """Requests of one kind. `kept`: on one connection."""

    def __init__(self, port: int, path: str, *, kept: bool) -> None:
        self.port, self.path, self.kept = port, path, kept
        self.seconds: list[float] = []
        self.failed: list[str] = []
        self._connection: http.client.HTTPConnection | None = None

    def ask(self) -> None:
        began = time.monotonic()
        connection = self._connection or http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE
        )
        self._connection = None
        try:
            connection.request("GET", self.path)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                self.failed.append(f"{response.status} {body[:200]!r}")
            if self.kept:
                self._connection = connection
            else:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            self.failed.append(repr(error))
        self.seconds.append(time.monotonic() - began)

    def summary(self) -> dict[str, object]:
        return {
            "count": len(self.seconds),
            "slowest": max(self.seconds, default=0.0),
            "failed": self.failed[:10],
        }


def main(port: int, admin: int) -> None:
    asked = {
        "kept": RequestStats(port, "/", kept=True),
        "new": RequestStats(port, "/", kept=False),
        "live": RequestStats(admin, "/live", kept=False),
    }
    first = True
    while True:
        for one in asked.values():
            one.ask()
        if first:
            print("ready", flush=True)
            first = False
        if select.select([sys.stdin], [], [], PAUSE)[0]:
            break
    print(json.dumps({name: one.summary() for name, one in asked.items()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
