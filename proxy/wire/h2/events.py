"""The events of an HTTP/2 connection, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.wire.messages import Headers, RequestHead, ResponseHead


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """Limits in bytes, except `streams`: the number of streams that the peer may have open.

    The windows must be at least 65535, the default of HTTP/2: a peer may send this much before it
    has received our SETTINGS.
    """

    streams: int = 256
    head: int = 65536
    stream_window: int = 256 * 1024
    connection_window: int = 1024 * 1024


@dataclass(slots=True)
class HeadReceived:
    """The head of a request or a response. The response may be informational."""

    stream: int
    head: RequestHead | ResponseHead
    ended: bool  # no body follows


@dataclass(slots=True)
class DataReceived:
    """A piece of a body.

    `credit`: bytes of the flow control windows (the data and its padding). The receiver must return
    them by `consumed`.
    """

    stream: int
    data: bytes
    credit: int
    ended: bool


@dataclass(slots=True)
class TrailersReceived:
    """The end of a body with trailers."""

    stream: int
    trailers: Headers


@dataclass(slots=True)
class StreamBroken:
    """The stream ended before its message.

    The peer reset it (`by_peer`), or we did because of an error of the peer.
    """

    stream: int
    code: int
    by_peer: bool
    words: str


@dataclass(slots=True)
class GoingAway:
    """The peer accepts no streams above `last`. Those up to `last` continue."""

    last: int
    code: int


@dataclass(slots=True)
class WindowOpened:
    """More may be sent on `stream`; 0: on all. Also sent if the peer raises its stream limit."""

    stream: int


@dataclass(slots=True)
class PingAnswered:
    """The peer has answered our PING."""

    payload: bytes


@dataclass(slots=True)
class Exhausted:
    """The peer has used up its frame budget.

    GOAWAY has been sent: it may open no new streams. The open ones continue.
    """

    words: str


Event = (
    HeadReceived
    | DataReceived
    | TrailersReceived
    | StreamBroken
    | GoingAway
    | WindowOpened
    | PingAnswered
    | Exhausted
)


class HeadTooLarge(Exception):
    """A header list exceeds the peer's SETTINGS_MAX_HEADER_LIST_SIZE. Nothing has been sent."""


class StreamGone(Exception):
    """The stream on which something was to be sent has ended."""
