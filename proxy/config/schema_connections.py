"""The settings of connections: sockets, pools, and the memory for all of them."""

from __future__ import annotations

from typing import Annotated

from proxy.settings.declare import Section, number, octets, seconds

_HOUR, _WEEK = 3600, 7 * 86400


# connect_timeout allows one retransmission of a lost SYN (after 1 s) and leaves time for another
# endpoint.
class TcpConfig(Section, frozen=True):
    """Sockets, and connections that are relayed byte for byte."""

    connect_timeout: Annotated[float, seconds(0.01, 300, "maximum time to open a connection")] = 2.0
    handshake_timeout: Annotated[float, seconds(0.05, 300, "maximum time for a TLS handshake")] = (
        5.0
    )
    idle_timeout: Annotated[
        float,
        seconds(1, _WEEK, "maximum time without data in both directions of a relayed connection"),
    ] = 3600.0
    keepalive: Annotated[
        float,
        seconds(0, 2 * _HOUR, "idle time before the first TCP keep-alive probe; 0: no probes"),
    ] = 10.0
    user_timeout: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "maximum time in which a peer acknowledges neither data nor keep-alive probes; 0: the"
            " default of the system",
        ),
    ] = 30.0


# idle_timeout is below the 5 s of Node.js, the shortest timeout of common servers. So the server
# rarely closes a connection at the moment when it is reused.
class PoolConfig(Section, frozen=True):
    """Pooled connections to endpoints."""

    max_connections_per_endpoint: Annotated[
        int, number(1, 100_000, "maximum open connections to one endpoint")
    ] = 1024
    max_idle_per_endpoint: Annotated[
        int,
        number(
            0, 100_000, "maximum idle connections to one endpoint; 0: connections are not reused"
        ),
    ] = 128
    idle_timeout: Annotated[
        float,
        seconds(
            0.1,
            _HOUR,
            "maximum idle time of a pooled connection; must be shorter than the keep-alive timeout"
            " of the servers",
        ),
    ] = 3.0
    max_age: Annotated[
        float, seconds(1, _WEEK, "maximum age of a connection; an older connection is not reused")
    ] = 600.0
    max_waiting_per_endpoint: Annotated[
        int,
        number(0, 100_000, "maximum requests that wait for a connection or a stream; above: 503"),
    ] = 10_000
    wait_timeout: Annotated[
        float,
        seconds(
            0.01,
            _HOUR,
            "maximum wait of a request without a deadline while no waiting request is served;"
            " above: 503",
        ),
    ] = 3.0


# The base was measured: 52 MiB after the start, plus what the allocator keeps for itself under
# load. A quarter of the budget, and of the streams, is reserved for members.
class MemoryConfig(Section, frozen=True):
    """How much data the proxy may buffer, for all connections together."""

    budget: Annotated[
        int | None,
        octets(
            16 * 2**20,
            2**44,
            "maximum bytes that one process may buffer; none: derived from the memory limit of the"
            " cgroup",
        ),
    ] = None
    base: Annotated[
        int,
        octets(
            0,
            2**40,
            "bytes per process that are not part of a derived budget; they are for the process"
            " itself",
        ),
    ] = 88 * 2**20
    patience: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "how long a connection may hold more than its share before the proxy closes it",
        ),
    ] = 10.0
    max_streams: Annotated[
        int, number(1, 10_000_000, "maximum open HTTP/2 streams of all clients together", "streams")
    ] = 10_000
