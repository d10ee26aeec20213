"""What an HTTP/2 connection tells of its streams, and the limits it is given."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.wire.messages import Headers, RequestHead, ResponseHead


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """Bytes, but for `streams`, which is a count: how many the peer may have open at once.

    The windows must not be smaller than 65535, HTTP/2's own: that much a peer may send before it has read what we allow.
    """

    streams: int = 256
    head: int = 65536
    stream_window: int = 256 * 1024
    connection_window: int = 1024 * 1024


@dataclass(slots=True)
class HeadReceived:
    """A request, or a response, also an informational one."""

    stream: int
    head: RequestHead | ResponseHead
    ended: bool  # no body follows


@dataclass(slots=True)
class DataReceived:
    """`credit` bytes of the windows are given back with `consumed`: the data and its padding."""

    stream: int
    data: bytes
    credit: int
    ended: bool


@dataclass(slots=True)
class TrailersReceived:
    """The end of a body, with fields behind it."""

    stream: int
    trailers: Headers


@dataclass(slots=True)
class StreamBroken:
    """The stream ended before its message did: reset by the peer (`by_peer`), or by us because of what the peer sent."""

    stream: int
    code: int
    by_peer: bool
    words: str


@dataclass(slots=True)
class GoingAway:
    """The peer takes no streams above `last`; those up to it go on."""

    last: int
    code: int


@dataclass(slots=True)
class WindowOpened:
    """More may be sent on `stream`; 0: on all. Also told when the peer may take more streams than before."""

    stream: int


@dataclass(slots=True)
class PingAnswered:
    """The peer has answered a PING of ours."""

    payload: bytes


@dataclass(slots=True)
class Exhausted:
    """The peer has used up its frame budget. GOAWAY has been sent: it may open no new streams, and those that are open go on."""

    words: str


Event = HeadReceived | DataReceived | TrailersReceived | StreamBroken | GoingAway | WindowOpened | PingAnswered | Exhausted


class HeadTooLarge(Exception):
    """A header list was to be sent that is larger than the peer takes (SETTINGS_MAX_HEADER_LIST_SIZE). Nothing has been sent."""


class StreamGone(Exception):
    """Something was to be sent on a stream that has ended."""
