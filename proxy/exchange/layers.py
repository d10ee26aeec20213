"""The layers around every exchange. Each layer is a function from handler to handler. A flow stacks
them from the outermost to the innermost.

    measure   outermost: counts, times and logs every request, including failed and unreadable ones
    rescue    the only place where an error becomes a response
    admit     refuses requests when memory is short
    deadline  gives the exchange its timer
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from email.utils import formatdate

import trio

from proxy.errors import (
    INTERNAL,
    ClientGone,
    ErrorAnswer,
    IsthmusError,
    LoopDetected,
    MemoryShort,
    NotAuthorised,
    UpstreamReset,
    broken_off,
    describe,
)
from proxy.exchange.exchange import Exchange, Handler, Layer, Whole
from proxy.exchange.reports import report
from proxy.exchange.timer import NO_TIMER, ExchangeTimer
from proxy.net.exceptions import release_frames
from proxy.wire.messages import Headers, ResponseHead

_log = logging.getLogger("isthmus.exchange")

# RFC 8941 §3.3.4.
_TOKEN = re.compile(rb"[A-Za-z*][-!#$%&'*+.^_`|~0-9A-Za-z:/]*")

# Seconds for sending an error response of a few hundred bytes.
_ANSWER_SECONDS = 5.0

# Characters of an error text in a response. An error may quote input of the peer, so the length is
# limited.
_DETAIL = 512

_REASONS = {
    400: b"Bad Request", 403: b"Forbidden", 404: b"Not Found", 408: b"Request Timeout",
    414: b"URI Too Long", 431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
    501: b"Not Implemented", 502: b"Bad Gateway", 503: b"Service Unavailable",
    504: b"Gateway Timeout", 505: b"HTTP Version Not Supported", 508: b"Loop Detected",
}  # fmt: skip


def never(_: Exchange) -> bool:
    """The default `reports`, for a flow whose clients are not proxies of the mesh."""
    return False


def measure(account: Callable[[Exchange], AbstractContextManager[object]]) -> Layer:
    """Open an account for each exchange. It closes once, however the exchange ends."""

    def layer(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            with exchange.account or account(exchange):
                await handler(exchange)

        return handle

    return layer


def admit(handler: Handler) -> Handler:
    """Refuse requests on open connections when memory is short. Streams are refused where they are
    opened."""

    async def handle(exchange: Exchange) -> None:
        if (
            not exchange.underway
            and exchange.request.version != b"2"
            and exchange.facts.share.refuses("request")
        ):
            raise MemoryShort("the proxy is short of memory")
        await handler(exchange)

    return handle


def rescue(
    name: Callable[[Exchange], bytes],
    open_to: Callable[[Exchange], bool],
    reports: Callable[[Exchange], bool] = never,
) -> Layer:
    """Turn errors into responses. `name`: the name of this proxy in Proxy-Status. `open_to`:
    whether the client may see details; other clients only see the kind of the error, not the
    addresses behind the proxy. `reports`: whether the client is a proxy that gets the reason in a
    field (reports.py)."""

    def layer(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            try:
                if exchange.malformed is not None:
                    raise exchange.malformed
                await handler(exchange)
            # `describe` knows our errors; any other is a bug, which is logged with its traceback
            # and answered with 500
            except Exception as error:
                answer = describe(error)
                exchange.failure, exchange.failure_words = answer.reason, str(error)
                if isinstance(error, LoopDetected):
                    exchange.loop, exchange.cycle = error.kind, error.cycle
                if answer is INTERNAL:
                    _log.error("internal error while handling a request", exc_info=error)
                if isinstance(error, NotAuthorised):
                    exchange.retire()  # later requests on this connection would be refused too
                detail = str(error) if open_to(exchange) else ""
                if isinstance(error, ClientGone):
                    exchange.abort()  # no client is left to receive a response
                elif isinstance(error, UpstreamReset) and exchange.request.version == b"2":
                    # pass on the server's error code, which the client understands
                    exchange.abort(error.code)
                elif exchange.response is not None:
                    exchange.abort(
                        trailers=(
                            grpc_status(broken_off(answer), detail) if exchange.is_grpc else None
                        )
                    )
                else:
                    made = grpc_error_response if exchange.is_grpc else error_response
                    head, body = made(answer, name(exchange), detail)
                    # the proxy nearest to the origin comes first (RFC 9209 §2)
                    if detail and isinstance(error, IsthmusError) and error.received_status:
                        head.headers.replace(
                            b"Proxy-Status",
                            b"%b, %b"
                            % (error.received_status, head.headers.get(b"proxy-status") or b""),
                        )
                    if reports(exchange):
                        report(answer, head)
                    await _answer(exchange, head, body)
                release_frames(error)

        return handle

    return layer


async def _answer(exchange: Exchange, head: ResponseHead, body: Whole) -> None:
    with trio.move_on_after(_ANSWER_SECONDS) as scope:
        try:
            await exchange.respond(head, body)
        except ClientGone:
            exchange.abort()
    if scope.cancelled_caught:
        exchange.abort()


def error_response(answer: ErrorAnswer, name: bytes, detail: str) -> tuple[ResponseHead, Whole]:
    """Create a response of the proxy itself, with Proxy-Status (RFC 9209)."""
    detail = detail[:_DETAIL]
    status = _member(name) + b";error=" + answer.proxy_status.encode("ascii")
    if detail:
        status += b";details=" + sf_string(detail)
    text = f"{answer.proxy_status}: {detail}\n" if detail else f"{answer.proxy_status}\n"
    headers = Headers(
        [
            (b"Date", formatdate(usegmt=True).encode("ascii")),
            (b"Content-Type", b"text/plain; charset=utf-8"),
            (b"Proxy-Status", status),
        ]
    )
    return ResponseHead(answer.status, headers, _REASONS.get(answer.status, b"")), Whole(
        text.encode("utf-8", "replace")
    )


def _member(name: bytes) -> bytes:
    """Encode a proxy name for Proxy-Status (RFC 9209 §2): as a token if possible, otherwise as a
    string. Kubernetes names may begin with a digit, tokens may not."""
    return name if _TOKEN.fullmatch(name) else sf_string(name.decode("latin-1"))


def grpc_status(answer: ErrorAnswer, detail: str) -> Headers:
    """Create the status fields of a gRPC call. The message is percent-encoded
    (github.com/grpc/grpc, PROTOCOL-HTTP2.md)."""
    text = f"{answer.proxy_status}: {detail[:_DETAIL]}" if detail else answer.proxy_status
    message = "".join(
        (
            c
            if " " <= c <= "~" and c != "%"
            else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "replace"))
        )
        for c in text
    )
    return Headers(
        [(b"grpc-status", b"%d" % answer.grpc_status), (b"grpc-message", message.encode("ascii"))]
    )


def grpc_error_response(
    answer: ErrorAnswer, name: bytes, detail: str
) -> tuple[ResponseHead, Whole]:
    """Create a gRPC error response of the proxy itself: HTTP status 200, and a head that is also
    the trailers."""
    head, _ = error_response(answer, name, detail)
    kept = [item for item in head.headers.items if item[0] in (b"Date", b"Proxy-Status")]
    return (
        ResponseHead(
            200,
            Headers([(b"content-type", b"application/grpc"), *kept, *grpc_status(answer, detail)]),
        ),
        Whole(),
    )


def sf_string(text: str) -> bytes:
    """Encode a string of a structured field (RFC 8941 §3.3.3): quoted ASCII. Other characters are
    replaced, so no text can end the field early."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return b'"' + plain.replace("\\", "\\\\").replace('"', '\\"').encode("ascii") + b'"'


def deadline(handler: Handler) -> Handler:
    """Give the exchange its timer. Raises the error of a step that timed out."""

    async def handle(exchange: Exchange) -> None:
        with trio.CancelScope() as scope:
            exchange.timer = timer = ExchangeTimer(scope)
            if exchange.left:
                exchange.give_up()
            try:
                await handler(exchange)
            finally:
                exchange.timer = NO_TIMER
                late = timer.end()
        if scope.cancelled_caught and late is not None:
            raise late()

    return handle
