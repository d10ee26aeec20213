"""The admin listener of the control plane: /live, /ready and /metrics over HTTP/1.1.

It runs in the same trio loop as everything else, so /live answers only if the loop runs. Each
connection gets one request. The number of connections and their time are limited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import h11
import trio

from proxy.metric_families import CONTENT_TYPE
from proxy.settings.declare import Section, number, octets, seconds

_TEXT = "text/plain; charset=utf-8"


class AdminLimits(Section, frozen=True):
    """The admin listener."""

    max_connections: Annotated[
        int, number(1, 100_000, "maximum open connections; above: new ones are closed")
    ] = 64
    timeout: Annotated[float, seconds(0.1, 300, "maximum time for a request and its response")] = (
        5.0
    )
    max_head_bytes: Annotated[
        int, octets(2**10, 2**20, "maximum size of the head of a request")
    ] = 8 * 1024


class Admin:
    """`not_ready` returns why this replica is not ready, or "". `metrics` returns their text."""

    def __init__(
        self,
        not_ready: Callable[[], str],
        metrics: Callable[[], bytes],
        limits: AdminLimits | None = None,
    ) -> None:
        self._limits = limits or AdminLimits()
        self._not_ready = not_ready
        self._metrics = metrics
        self._open = 0

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Serve until cancelled. Closes `listeners`."""
        if listeners:
            await trio.serve_listeners(self.answer, list(listeners))

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Answer one request. Closes `stream`."""
        self._open += 1
        try:
            if self._open <= self._limits.max_connections:
                with trio.move_on_after(self._limits.timeout):
                    await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            pass  # the client has closed the connection, or does not speak HTTP
        finally:
            self._open -= 1
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.abc.Stream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.max_head_bytes)
        while not isinstance(event := http.next_event(), h11.Request):
            if event is not h11.NEED_DATA:
                return
            http.receive_data(bytes(await stream.receive_some(4096)))
        code, kind, body = self._page(event.method, event.target.partition(b"?")[0])
        headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        sent = http.send(h11.Response(status_code=code, headers=headers))
        if event.method != b"HEAD":
            sent += http.send(h11.Data(data=body))
        await stream.send_all(sent)

    def _page(self, method: bytes, path: bytes) -> tuple[int, str, bytes]:
        if method not in (b"GET", b"HEAD"):
            return 405, _TEXT, b"only GET and HEAD\n"
        if path == b"/live":
            return 200, _TEXT, b"live\n"
        if path == b"/ready":
            reason = self._not_ready()
            return (
                (503, _TEXT, f"not ready: {reason}\n".encode())
                if reason
                else (200, _TEXT, b"ready\n")
            )
        if path == b"/metrics":
            return 200, CONTENT_TYPE, self._metrics()
        return 404, _TEXT, b"/live, /ready, /metrics\n"
