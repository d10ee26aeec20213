"""Converts records of requests, responses and connections to spans.

The spans follow OpenTelemetry's semantic conventions for HTTP, RPC, TLS and networks. The data path
only fills a record with a few references and numbers. The expensive work is done here, later, in
the exporter's thread: a pure function from a record to a name, attributes, events and a status.

Span names have few values: `GET` without the path, which has too many values (the conventions
forbid it); but the full name of a gRPC method. A span has nothing that may be secret. It has no
header except User-Agent, and no user information of a URL. It has a query only if configured, and
then without the values of signatures. It has no text of a peer except in the attributes below. The
mesh's own attributes begin with `isthmus.`; docs/tracing.md lists all.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol

from tracing.attributes import GRPC_CODES, METHODS, SECRET_PARAMETERS, SERVER_ERRORS, Name

Value = str | int | float | bool
Kind = Literal["server", "client"]

# Spans are read by people: longer values are cut.
LONGEST = 1024


class Address(Protocol):
    """One end of a connection."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


class TLS(Protocol):
    """What was agreed on with a peer in the TLS handshake."""

    @property
    def version(self) -> str: ...
    @property
    def cipher(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def alpn(self) -> bytes: ...
    @property
    def resumed(self) -> bool: ...


@dataclass(slots=True)
class Record:
    """The common part of all records. Times in nanoseconds since 1970.

    What is known at the start is passed by position, which is faster than by keyword.
    """

    kind: Kind
    trace_id: bytes
    span_id: bytes
    parent: bytes = b""
    state: tuple[bytes, ...] = ()
    started: int = 0
    direction: str = ""
    destination: Address | None = None  # the original destination of the connection
    _: KW_ONLY
    peer: Address | None = None
    tls: TLS | None = None
    identity: str | None = None  # of the peer, verified
    ended: int = 0
    remote: bool = True  # the parent is a span of another process
    follows: bytes = b""  # the span of the previous attempt
    service: str | None = None  # the destination: "namespace/name", or "cluster/namespace/name"
    chosen: str | None = None  # the backend of a split, or the service that is used instead
    failure: str | None = None  # a reason of this proxy
    words: str = ""
    loop: str | None = None  # the kind of the loop
    cycle: str = ""  # the path of the loop


@dataclass(slots=True)
class HttpRecord(Record):
    """One exchange, or one attempt of it."""

    method: bytes = b""
    target: bytes = b""
    authority: bytes | None = None
    version: bytes = b""
    _: KW_ONLY
    grpc: bool = False
    agent: bytes | None = None
    status: int = 0
    head_at: int = 0  # when the response's head arrived; 0: never
    grpc_status: bytes | None = None
    proxy_status: bytes | None = None
    attempt: int = 0
    request_bytes: int = 0
    response_bytes: int = 0


@dataclass(slots=True)
class StreamRecord(Record):
    """One connection whose bytes are relayed."""

    protocol: str = ""  # by detection from the first bytes
    read: int = 0
    written: int = 0


@dataclass(slots=True)
class Described:
    """A record in OpenTelemetry's terms. `error`: the status description; None: status unset."""

    name: str
    attributes: dict[str, Value]
    error: str | None = None
    events: list[tuple[str, int, dict[str, Value]]] = field(default_factory=list)


def describe(record: Record, *, query: bool = False) -> Described:
    """Convert a record. `query`: whether query strings may be shown."""
    attributes: dict[str, Value] = {Name.TRANSPORT: "tcp", Name.DIRECTION: record.direction}
    _network(record, attributes)
    if isinstance(record, HttpRecord):
        described = (
            _rpc(record, attributes) if record.grpc else _http(record, attributes, query=query)
        )
        _exchange(record, described)
    else:
        described = Described("TCP", attributes)
        if isinstance(record, StreamRecord):
            attributes |= {Name.READ: record.read, Name.WRITTEN: record.written}
            if record.protocol:
                attributes[Name.DETECTED] = record.protocol
    if record.failure is not None:
        attributes[Name.ERROR] = record.failure
        described.error = _words(record)
    if record.loop is not None:
        loop: dict[str, Value] = {
            Name.LOOP_KIND: record.loop,
            Name.LOOP_CYCLE: _text(record.cycle or record.words),
        }
        attributes[Name.LOOP_KIND] = record.loop
        described.events.append((Name.LOOP_EVENT, record.ended, loop))
    return described


# Reasons whose message is written by the proxy and the directory only: addresses, identities,
# limits. The messages of other reasons may quote a peer.
_OWN_WORDS = re.compile(
    r"(connect_|tls_|loop|no_endpoint|pool_|identity_|upstream_timeout|request_timeout|.*budget|.*breaker)"
)


def _words(record: Record) -> str:
    return (
        _text(record.words)
        if record.failure is not None and _OWN_WORDS.match(record.failure)
        else ""
    )


def _network(record: Record, attributes: dict[str, Value]) -> None:
    if record.peer is not None:
        attributes |= {Name.PEER_ADDRESS: record.peer.host, Name.PEER_PORT: record.peer.port}
        if record.kind == "server":
            attributes |= {
                Name.CLIENT_ADDRESS: record.peer.host,
                Name.CLIENT_PORT: record.peer.port,
            }
    if record.destination is not None:
        attributes[Name.DESTINATION] = _authority(record.destination)
    if record.identity:
        attributes[Name.IDENTITY] = record.identity
    tls = record.tls
    attributes[Name.TLS] = tls is not None
    if tls is not None:
        attributes |= {
            Name.TLS_NAME: "tls",
            Name.TLS_VERSION: tls.version.removeprefix("TLSv"),
            Name.TLS_CIPHER: tls.cipher,
            Name.TLS_GROUP: tls.group,
            Name.TLS_RESUMED: tls.resumed,
        }
        if tls.alpn:
            attributes[Name.TLS_ALPN] = tls.alpn.decode("ascii", "replace")
    if record.service is not None:
        attributes[Name.SERVICE] = record.service
    if record.chosen is not None:
        cluster, slash, _ = (
            record.chosen.partition("/") if record.chosen.count("/") > 1 else ("", "", "")
        )
        if record.chosen != record.service:
            attributes[Name.BACKEND] = record.chosen
        if slash:
            attributes |= {Name.CLUSTER: cluster, Name.GATEWAY: True}


def _exchange(record: HttpRecord, described: Described) -> None:
    """Add what HTTP and RPC have in common."""
    attributes = described.attributes
    host, port = _host_port(record)
    if host:
        attributes[Name.SERVER_ADDRESS] = host
    if port is not None:
        attributes[Name.SERVER_PORT] = port
    if version := _version(record):
        attributes |= {Name.PROTOCOL: "http", Name.PROTOCOL_VERSION: version}
    attributes |= {
        Name.REQUEST_SIZE: record.request_bytes,
        Name.RESPONSE_SIZE: record.response_bytes,
    }
    if record.attempt:
        attributes[Name.RESEND_COUNT] = record.attempt
    if record.agent is not None and record.kind == "server":
        attributes[Name.USER_AGENT] = _text(record.agent)
    if record.proxy_status is not None:
        attributes[Name.PROXY_STATUS] = _text(record.proxy_status)
    if record.head_at:
        described.events.append((Name.HEAD_EVENT, record.head_at, {Name.STATUS: record.status}))


_ALPN = {b"http/1.1": "1.1", b"h2": "2"}


def _version(record: HttpRecord) -> str:
    """The HTTP version of the span's connection; the next hop may use another than the client."""
    agreed = (
        _ALPN.get(record.tls.alpn) if record.kind == "client" and record.tls is not None else None
    )
    return agreed or _text(record.version)


def _http(record: HttpRecord, attributes: dict[str, Value], *, query: bool) -> Described:
    method = _text(record.method)
    known = method in METHODS
    attributes |= {Name.METHOD: method if known else "_OTHER", Name.SCHEME: "http"}
    if not known:
        attributes[Name.METHOD_ORIGINAL] = method
    path, parameters = _path(record.target)
    if record.kind == "server":
        attributes[Name.PATH] = path
        if query and parameters:
            attributes[Name.QUERY] = redacted(parameters)
    elif path.startswith("/"):
        host, port = _host_port(record)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}{'' if port in (None, 80) else f':{port}'}{path}"
        attributes[Name.URL] = url + (f"?{redacted(parameters)}" if query and parameters else "")
    error = None
    if record.status:
        attributes[Name.STATUS] = record.status
        if record.status >= (400 if record.kind == "client" else 500):
            attributes[Name.ERROR] = str(record.status)
            error = ""  # the status code is enough
    return Described(method if known else "HTTP", attributes, error)


def _rpc(record: HttpRecord, attributes: dict[str, Value]) -> Described:
    path, _ = _path(record.target)
    method = path.removeprefix("/")
    attributes[Name.RPC_SYSTEM] = "grpc"
    code = _grpc_code(record)
    if code == "UNIMPLEMENTED":  # the method does not exist, so its name may be any text
        attributes |= {Name.RPC_METHOD: "_OTHER", Name.RPC_METHOD_ORIGINAL: method}
        name = "grpc"
    else:
        attributes[Name.RPC_METHOD] = method
        name = method or "grpc"
    if record.status not in (0, 200):
        attributes[Name.STATUS] = record.status  # gRPC answers 200: an intermediary sent this
    error = None
    if code is not None:
        attributes[Name.RPC_STATUS] = code
        if code != "OK" and (record.kind == "client" or code in SERVER_ERRORS):
            attributes[Name.ERROR] = code
            error = ""
    return Described(name, attributes, error)


def _grpc_code(record: HttpRecord) -> str | None:
    if record.grpc_status is None:
        return None
    text = record.grpc_status.decode("ascii", "replace")
    return (
        GRPC_CODES[int(text)]
        if text.isdecimal() and len(text) < 3 and int(text) < len(GRPC_CODES)
        else "UNKNOWN"
    )


def _path(target: bytes) -> tuple[str, str]:
    """The path and the query of a request target in any form.

    The authority of an absolute-form target (which may have user information) or of CONNECT is not
    included.
    """
    text = _text(target)
    if "://" in text.partition("?")[0]:
        rest = text.partition("://")[2]
        cut = min((rest.find(c) for c in "/?#" if c in rest), default=len(rest))
        text = rest[cut:] or "/"
    elif not text.startswith(("/", "*")):
        return "", ""
    path, _, query = text.partition("#")[0].partition("?")
    return path or "/", query


def redacted(query: str) -> str:
    """A query string with the values of known signatures and keys replaced."""
    parts = [part.partition("=") for part in query.split("&")]
    return "&".join(
        f"{key}=REDACTED" if key in SECRET_PARAMETERS else key + equals + value
        for key, equals, value in parts
    )


_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:@\[\]]*))(?::([0-9]{1,5}))?\Z")


def _host_port(record: HttpRecord) -> tuple[str, int | None]:
    """The host and port in the request; otherwise the original destination. No user information."""
    authority = _text(record.authority or b"").rpartition("@")[2]
    match = _HOST_PORT.match(authority)
    if match is not None and (match[1] or match[2]):
        return match[1] or match[2], int(match[3]) if match[3] else 80
    if record.destination is not None:
        return record.destination.host, record.destination.port
    return "", None


def _authority(address: Address) -> str:
    return (
        f"[{address.host}]:{address.port}"
        if ":" in address.host
        else f"{address.host}:{address.port}"
    )


def _text(raw: bytes | str) -> str:
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    return text[:LONGEST]
