"""The settings of HTTP: messages, HTTP/2 connections, and the loop guard."""

from __future__ import annotations

from typing import Annotated

from proxy.settings.declare import Section, number, octets, seconds

_HOUR, _DAY = 3600, 86400


# idle_timeout is longer than the idle timeout of common client pools (Go: 90 s). So the client
# closes first, and no request is sent on a closing connection. For clients without an identity this
# is too long, because any host that can connect could hold a slot for that time. Their timeout is
# three times that of common servers (Node.js: 5 s). body_min_rate ends a body that trickles in
# order to hold a connection.
class HttpConfig(Section, frozen=True):
    """Limits of HTTP messages, on both sides of the proxy."""

    max_head_bytes: Annotated[
        int,
        octets(
            1024, 2**20, "maximum size of the start line and the header fields together; above: 431"
        ),
    ] = 64 * 1024
    max_target_bytes: Annotated[
        int, octets(256, 2**16, "maximum size of the request target; above: 414")
    ] = 16 * 1024
    max_headers: Annotated[
        int, number(8, 10_000, "maximum number of header fields in a head; above: 431")
    ] = 200
    head_timeout: Annotated[
        float,
        seconds(
            0.1, _HOUR, "maximum time from the first byte of a request head to its end; above: 408"
        ),
    ] = 10.0
    idle_timeout: Annotated[
        float, seconds(1, _DAY, "maximum idle time of a client connection between requests")
    ] = 120.0
    plain_idle_timeout: Annotated[
        float,
        seconds(
            1,
            _DAY,
            "the same for clients outside the pod that presented no client certificate, if it is"
            " shorter",
        ),
    ] = 15.0
    body_timeout: Annotated[
        float, seconds(0.1, _DAY, "maximum pause within a request body; above: 408")
    ] = 60.0
    body_min_rate: Annotated[
        int,
        number(
            0,
            2**30,
            "minimum average rate of a request body, checked after `body_timeout`; 0: no minimum",
            "bytes/s",
        ),
    ] = 16
    write_timeout: Annotated[
        float,
        seconds(
            1, _DAY, "maximum time in which a client reads none of the data that the proxy sends"
        ),
    ] = 300.0
    linger_timeout: Annotated[
        float,
        seconds(
            0.1,
            300,
            "how long the proxy reads and discards the rest of a request that was answered early;"
            " above 1 MiB: at 4 MiB/s; it stops when nothing has arrived for 2 s",
        ),
    ] = 10.0
    response_timeout: Annotated[
        float,
        seconds(
            0.1,
            _DAY,
            "maximum time from the end of a request to the head of its response; above: 504",
        ),
    ] = 300.0
    response_body_timeout: Annotated[
        float, seconds(1, _DAY, "maximum pause within a response body (event streams have pauses)")
    ] = 3600.0


# The stream window is how far a sender may be ahead of a slow consumer. The connection window holds
# several stream windows. A connection ends after max_age, so that new endpoints get their share and
# connections from a burst are closed.
class Http2Config(Section, frozen=True):
    """HTTP/2 connections. Many requests share one connection."""

    max_streams: Annotated[
        int, number(1, 100_000, "maximum concurrent streams of a client on one connection")
    ] = 256
    stream_window: Annotated[
        int,
        octets(
            65536,
            2**30,
            "flow-control window of one stream: bytes that may wait for a slow consumer",
        ),
    ] = 256 * 1024
    connection_window: Annotated[
        int,
        octets(
            65536,
            2**30,
            "flow-control window of a connection: bytes of all its streams that may wait",
        ),
    ] = 4 * 1024 * 1024
    idle_timeout: Annotated[
        float, seconds(1, _DAY, "maximum idle time of a connection to an endpoint")
    ] = 60.0
    frame_budget: Annotated[
        int,
        number(
            100,
            10**9,
            "budget of a peer for resets of new streams (2 each), PING, empty DATA and similar"
            " frames",
            "frames",
        ),
    ] = 1000
    mesh_frame_budget: Annotated[
        int,
        number(
            100,
            10**9,
            "frame budget of a peer with a verified identity; its connection carries the requests"
            " of many clients",
            "frames",
        ),
    ] = 20_000
    reset_rate: Annotated[
        int,
        number(
            1,
            10**6,
            "stream resets per second that are sent to a server without delay, with bursts of four"
            " times as many; more are delayed",
            "streams/s",
        ),
    ] = 25
    ping_interval: Annotated[
        float,
        seconds(
            1,
            _DAY,
            "time without data after which the proxy sends a PING to a peer that owes a response",
        ),
    ] = 20.0
    ping_timeout: Annotated[float, seconds(0.1, _HOUR, "maximum time for the answer to a PING")] = (
        10.0
    )


# Reverse proxies copy the tokens. Programs that answer from their own state do not. So a request
# that returns is nearly always a loop. Four returns are allowed for applications that call
# themselves on purpose. Few requests pass more than a dozen proxies.
class LoopsConfig(Section, frozen=True):
    """Limits of the loop guard."""

    max_returns: Annotated[
        int,
        number(
            0,
            1000,
            "how often the same request may return to a sidecar (an application may call itself);"
            " above: 508",
            "times",
        ),
    ] = 4
    max_hops: Annotated[
        int,
        number(
            4,
            255,
            "maximum proxies that a request may pass; both sides of a sidecar count; above: 508",
            "proxies",
        ),
    ] = 64

    max_nesting: Annotated[
        int,
        number(
            0,
            100,
            "how often a connection that the proxy opened may return to it; above: refused",
            "times",
        ),
    ] = 2
    max_self_calls: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum concurrent calls of the pod to one of its own ports that wait for a response;"
            " above: 508",
            "calls",
        ),
    ] = 256
