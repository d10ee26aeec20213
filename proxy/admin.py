"""The administration listener: /live, /ready and /metrics, served by the same server that serves the traffic.

/live says that the process answers. /ready says whether it should be sent traffic, and if not, why. Neither says anything about the
application, which has probes of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from email.utils import formatdate

from proxy.exchange.exchange import Exchange, Facts, Whole, stack
from proxy.exchange.layers import deadline, rescue
from proxy.exchange.server import Drain, Http1Server, ServerSettings
from proxy.metrics import CONTENT_TYPE
from proxy.net.accept import Connection
from proxy.wire.messages import Headers, ResponseHead

_TEXT = b"text/plain; charset=utf-8"

# Probes and scrapers are many and short-lived, and slow ones are of no use.
_SETTINGS = ServerSettings(idle_timeout=60.0, head_timeout=5.0, body_timeout=5.0, write_timeout=10.0)


async def _nothing() -> None:
    """What is answered here is known here."""


def admin(
    not_ready: Callable[[], list[str]],
    metrics: Callable[[], bytes],
    look: Callable[[], Awaitable[None]] = _nothing,
    not_alive: Callable[[], list[str]] = list,
) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the admin listeners' connections. `not_ready` gives the reasons why traffic should not come, `metrics` the text,
    `not_alive` the reasons why the process is beyond help; `look` is awaited before each answer, where others have to be asked."""

    def probe(word: str, reasons: list[str]) -> tuple[int, bytes, bytes]:
        if reasons:
            return 503, _TEXT, f"not {word}: {'; '.join(reasons)}\n".encode()
        return 200, _TEXT, f"{word}\n".encode()

    pages: dict[bytes, Callable[[], tuple[int, bytes, bytes]]] = {
        b"/live": lambda: probe("live", not_alive()),
        b"/ready": lambda: probe("ready", not_ready()),
        b"/metrics": lambda: (200, CONTENT_TYPE.encode(), metrics()),
    }

    async def answer(exchange: Exchange) -> None:
        page = pages.get(exchange.request.target.partition(b"?")[0])
        if page is None:
            status, kind, text = 404, _TEXT, b"there are /live, /ready and /metrics\n"
        elif exchange.request.method not in (b"GET", b"HEAD"):
            status, kind, text = 405, _TEXT, b"only GET and HEAD\n"
        else:
            await look()
            status, kind, text = page()
        headers = Headers(
            [
                (b"Date", formatdate(usegmt=True).encode("ascii")),
                (b"Content-Type", kind),
                (b"Content-Length", b"%d" % len(text)),
            ]
        )
        if status == 405:
            headers.add(b"Allow", b"GET, HEAD")
        reason = {200: b"OK", 404: b"Not Found", 405: b"Method Not Allowed", 503: b"Service Unavailable"}[status]
        await exchange.respond(ResponseHead(status, headers, reason), Whole(text))

    handler = stack(rescue(lambda _: b"isthmus", lambda _: False), deadline, endpoint=answer)
    drain = Drain()

    async def accept(connection: Connection) -> None:
        about = Facts("inbound", connection.peer, connection.local)
        await Http1Server(connection.stream, about, _SETTINGS, drain).run(handler)

    return accept
