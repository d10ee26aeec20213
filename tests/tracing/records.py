"""Records as the data path makes them, for the tests of the exporters."""

from __future__ import annotations

from typing import Any, NamedTuple

from tracing.spans import HttpRecord, StreamRecord

TRACE, SPAN, PARENT = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7", b"b7ad6b7169203331"


class At(NamedTuple):
    host: str
    port: int


class Agreed(NamedTuple):
    version: str = "TLSv1.3"
    cipher: str = "TLS_AES_128_GCM_SHA256"
    group: str = "X25519MLKEM768"
    alpn: bytes = b"h2"
    resumed: bool = False


def http(kind: str = "server", **changes: Any) -> HttpRecord:
    """A good GET, with changes."""
    record = HttpRecord(kind, TRACE, SPAN, PARENT)  # type: ignore[arg-type]
    record.direction = "inbound" if kind == "server" else "outbound"
    record.started, record.head_at, record.ended = 1_000, 2_000, 3_000
    record.peer, record.destination = At("10.0.0.1", 40000), At("10.0.0.2", 8080)
    record.method, record.target, record.authority, record.version, record.status = (
        b"GET",
        b"/a",
        b"shop:8080",
        b"1.1",
        200,
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def grpc(kind: str = "server", **changes: Any) -> HttpRecord:
    given = {
        "method": b"POST",
        "target": b"/shop.Stock/Get",
        "version": b"2",
        "grpc": True,
        "grpc_status": b"0",
    }
    return http(kind, **(given | changes))


def connection(**changes: Any) -> StreamRecord:
    record = StreamRecord("server", TRACE, SPAN)
    record.direction, record.peer, record.destination = (
        "inbound",
        At("::1", 40000),
        At("fd00::2", 5432),
    )
    record.started, record.ended, record.protocol, record.read, record.written = (
        1,
        2,
        "silent",
        10,
        20,
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record
