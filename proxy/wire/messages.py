"""Requests and responses, independent of the HTTP version.

The canonical form is that of HTTP/1: a method, a request target, and an ordered list of fields. The
authority is the Host field (RFC 9110 §7.2). Names keep the case in which they arrived, because a
sidecar should change as little as possible. Comparisons use lower case.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

Field = tuple[bytes, bytes]

# uri-host [":" port] (RFC 3986 §3.2.2, §3.2.3): the authority in a Host field or an absolute-form
# target. User information is not allowed: it can make two readers see two different hosts in one
# name (RFC 9110 §4.2.4). There are no capturing groups, because other expressions include these.
HOST = rb"(?:\[[0-9A-Za-z:.%]+\]|[-0-9A-Za-z._~%!$&'()*+,;=]*)"
AUTHORITY = HOST + rb"(?::[0-9]{0,5})?"
_HOST_FIRST = (b"Host: ", b"host: ")  # the usual first line
_ABSOLUTE = re.compile(rb"[A-Za-z][-+.0-9A-Za-z]*://(" + AUTHORITY + rb")(?:[/?#].*)?", re.DOTALL)


class ProtocolError(Exception):
    """The peer violated the protocol. The message says what is wrong, and where.

    `status`: the status code with which a server answers (RFC 9110 §15).
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Signal(Enum):
    """Returned by a reader that has no event."""

    NEED_DATA = "need data"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for the head and the trailers of one message: in bytes, except `fields` (a count)."""

    head: int = 65536
    target: int = 16384
    fields: int = 128


class Headers:
    """Ordered fields. Lookups take the name in lower case.

    The fields of a head that h1/fast_head.py has accepted stay in `block`, the lines as they
    arrived, until they are needed separately. Most heads are forwarded as these bytes, with a line
    or two added. A request block has exactly one Host. No block has Upgrade, TE or Expect.
    `clean`: no field here is hop-by-hop, so nothing needs to be stripped.
    """

    __slots__ = ("_ending", "_items", "block", "clean")

    def __init__(self, items: Iterable[Field] = ()) -> None:
        self.block: bytes | None = None
        self._items: list[Field] = list(items) if items else []
        self.clean = False
        self._ending: Sequence[bytes] = ()

    @classmethod
    def canonical(cls, block: bytes, ending: Sequence[bytes]) -> Headers:
        """Create from lines `name: value CRLF` that h1/fast_head.py has accepted.

        `ending`: the hop-by-hop lines among them, each including its CR.
        """
        headers = cls()
        headers.block, headers._ending, headers.clean = block, ending, not ending
        return headers

    @property
    def items(self) -> list[Field]:
        if self.block is not None:
            lines = self.block[:-2].split(b"\r\n") if self.block else ()
            self._items = [tuple(line.split(b": ", 1)) for line in lines]  # type: ignore[misc]  # two parts by the grammar
            self.block = None
        return self._items

    @items.setter
    def items(self, items: list[Field]) -> None:
        self.block, self._items = None, items

    def encode(self) -> bytes:
        """Encode as the lines of an HTTP/1 head. Nothing is checked."""
        if self.block is not None:
            return self.block
        return b"".join([b"%b: %b\r\n" % item for item in self._items])

    def strip_block(self) -> bool:
        """Strip the hop-by-hop fields if this needs no split into lines.

        Return whether it is done.
        """
        if self.block is not None and not self.clean:
            lines = b"\n" + self.block
            for line in self._ending:
                lines = lines.replace(b"\n" + line, b"", 1)
            self.block, self.clean = lines[1:], True
        return self.clean

    def onward(self) -> Headers:
        """Return a copy of the `block` without the hop-by-hop lines."""
        copy = Headers.canonical(self.block or b"", self._ending)
        copy.strip_block()
        return copy

    def append(self, name: bytes, value: bytes) -> None:
        """Append a field. It must not be hop-by-hop, unless the fields are already stripped."""
        if self.block is not None:
            self.block = b"%b%b: %b\r\n" % (self.block, name, value)
        else:
            self._items.append((name, value))

    def __iter__(self) -> Iterator[Field]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, name: bytes) -> bool:
        if self.block is not None:
            lower = self.block.lower()
            return lower.startswith(name + b":") or b"\n%b:" % name in lower
        return any(n.lower() == name for n, _ in self.items)

    def __eq__(self, other: object) -> bool:
        """Equal for a recipient: the same names in any case, the same values, in the same order."""
        if not isinstance(other, Headers):
            return NotImplemented
        return [(n.lower(), v) for n, v in self.items] == [(n.lower(), v) for n, v in other.items]

    __hash__ = None  # type: ignore[assignment]  # mutable: the documented way to make it unhashable

    def __repr__(self) -> str:
        return f"Headers({self.items!r})"

    def get(self, name: bytes) -> bytes | None:
        """The first value of the field, or None."""
        if self.block is not None:
            start = place(self.block.lower(), b"\n%b: " % name)
            return self.block[start : self.block.index(b"\r", start)] if start else None
        for n, value in self.items:
            if n.lower() == name:
                return value
        return None

    def all(self, name: bytes) -> list[bytes]:
        return [value for n, value in self.items if n.lower() == name]

    def tokens(self, name: bytes) -> list[bytes]:
        """The members of a comma-separated field over all its lines (RFC 9110 §5.6.1).

        They are trimmed and in lower case; empty members are omitted.
        """
        found = [t.strip(b" \t").lower() for value in self.all(name) for t in value.split(b",")]
        return [t for t in found if t]

    def add(self, name: bytes, value: bytes) -> None:
        self.clean = False
        self.items.append((name, value))

    def remove(self, *names: bytes) -> None:
        self.items = _others(self.items, names)

    def replace(self, name: bytes, value: bytes) -> None:
        """Replace the first such field and remove the others. Append the field if there is none."""
        lower = name.lower()
        for index, (n, _) in enumerate(self.items):
            if n.lower() == lower:
                self.items[index:] = [(n, value), *_others(self.items[index + 1 :], (lower,))]
                return
        self.items.append((name, value))

    def copy(self) -> Headers:
        return Headers(self.items)

    def write_length(self) -> None:
        """Remove leading zeros from a numeric Content-Length.

        The grammar allows them (1*DIGIT, RFC 9110 §8.6), but some readers parse such a number as
        octal.
        """
        for index, (name, value) in enumerate(self.items):
            if value[:1] == b"0" != value and name.lower() == b"content-length":
                self.items[index] = (name, b"%d" % int(value))


def _others(items: list[Field], names: Container[bytes]) -> list[Field]:
    """The fields with all other names.

    The result has the same tuple objects. An item can be an instance of a subclass
    (NeverIndexedField in h2/fields.py). A compiled loop would replace it by a plain tuple.
    """
    return list(filter(lambda item: item[0].lower() not in names, items))


def place(lower: bytes, mark: bytes) -> int:
    """Return the offset at which the value of a field begins in `lower`; 0 if there is none.

    `lower`: canonical lines of a head in lower case. `mark`: newline, name, colon and space. If the
    field occurs several times, the first one counts.
    """
    if lower.startswith(mark[1:]):
        return len(mark) - 1
    at = lower.find(mark)
    return at + len(mark) if at >= 0 else 0


# mypyc does not compile the generated __init__ of a dataclass (docs/decisions/30-compiled.md), and
# these two objects are created for every request. So __init__ is explicit.
@dataclass(slots=True, init=False)
class RequestHead:
    """The head of a request. `target` is as on the wire (RFC 9112 §3.2).

    It is in origin-form, absolute-form, authority-form (CONNECT) or `*`.
    """

    method: bytes
    target: bytes
    headers: Headers
    version: bytes
    protocol: bytes | None  # of an extended CONNECT (RFC 8441), for a WebSocket in HTTP/2

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        version: bytes = b"1.1",
        protocol: bytes | None = None,
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.version = version
        self.protocol = protocol

    @property
    def authority(self) -> bytes | None:
        """The authority in the request: the target's, otherwise Host (RFC 9112 §3.2.2)."""
        if self.method == b"CONNECT" and self.protocol is None:
            return self.target
        if not self.target.startswith((b"/", b"*")):
            return absolute_authority(self.target)
        block = self.headers.block
        if block is not None and block.startswith(_HOST_FIRST):
            return block[6 : block.index(b"\r")]
        return self.headers.get(b"host")


@dataclass(slots=True, init=False)
class ResponseHead:
    """The head of a response. `version`: the HTTP version of the connection on which it arrived."""

    status: int
    headers: Headers
    reason: bytes
    version: bytes

    def __init__(
        self,
        status: int,
        headers: Headers | None = None,
        reason: bytes = b"",
        version: bytes = b"1.1",
    ) -> None:
        self.status = status
        self.headers = Headers() if headers is None else headers
        self.reason = reason
        self.version = version

    @property
    def informational(self) -> bool:
        """Whether this is an interim response, which another one follows.

        101 is not interim: it ends HTTP on the connection (RFC 9110 §15.2.2).
        """
        return 100 <= self.status < 200 and self.status != 101


@dataclass(frozen=True, slots=True)
class EndOfMessage:
    """The end of a body, with its trailers."""

    trailers: Headers = field(default_factory=Headers)


# All ends without trailers are equal, so they share one object.
END = EndOfMessage()


def absolute_authority(target: bytes) -> bytes | None:
    """The authority of an absolute-form target.

    None: there is no authority, or it is not a host and port (for example with user information).
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None or match[1].startswith(b":"):
        return None
    return match[1] or None


def origin_form(request: RequestHead) -> bytes:
    """The target without scheme and authority (RFC 9112 §3.2.1, §3.2.4)."""
    target = request.target
    if target[:1] in (b"/", b"*"):
        return target
    rest = target.partition(b"//")[2]
    begins = min((at for mark in (b"/", b"?") if (at := rest.find(mark)) >= 0), default=len(rest))
    path = rest[begins:]
    if not path:
        return b"*" if request.method == b"OPTIONS" else b"/"
    return path if path.startswith(b"/") else b"/" + path


# Fields for one connection only (RFC 9110 §7.6.1; Keep-Alive is from RFC 2068, and Proxy-Connection
# is a de facto field). Two of them are written anew for the next connection: Transfer-Encoding if
# its framing needs it, and `TE: trailers` if it can carry trailers.
_CONNECTION_FIELDS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"}
)

# The verified identity of the client. Each proxy writes this field for the next hop, or omits it. A
# field that arrives is removed, because any client can write it. Linkerd's field with the same
# meaning is removed too. So is every spelling that a server could confuse with these names: a
# CGI-like server turns field names into variable names (RFC 3875 §4.1.18). lighttpd replaces each
# character that is not a letter or a digit by an underscore. So each such character that a name may
# have (RFC 9110 §5.6.2) is treated like a dash.
CALLER = b"isthmus-client-id"
_DASHES = b"!#$%&'*+-.^_`|~"
CALLER_FIELDS = frozenset(
    b"%b%cclient%cid" % (proxy, one, two)
    for proxy in (b"isthmus", b"l5d")
    for one in _DASHES
    for two in _DASHES
)
# A pattern for these names. Use it case-insensitively.
CALLER_PATTERN = rb"(?:isthmus|l5d)[%b]client[%b]id" % (re.escape(_DASHES), re.escape(_DASHES))

# Limits that a client requests from the first proxy (proxy/routing/request_overrides.py). The first
# proxy removes them, whether it applies them or not.
OVERRIDES = frozenset(
    {b"isthmus-timeout", b"isthmus-response-timeout", b"isthmus-attempt-timeout"}
    | {b"isthmus-retry-limit", b"isthmus-retry-statuses", b"isthmus-retry-grpc"}
)

# Why the last proxy answers a request itself: one of the reasons in errors.py. A proxy sends this
# field only to peers with a verified identity, and accepts it only from them
# (proxy/exchange/reports.py). It removes the field if an application sends it, and never forwards
# it.
FAILURE = b"isthmus-failure"

# All fields that end at each hop.
HOP_BY_HOP = _CONNECTION_FIELDS | CALLER_FIELDS | OVERRIDES | {FAILURE}

# The prefix of all our own field names.
OWN = b"isthmus-"

# A Connection option may name any field. But removing one of these would change the meaning of the
# message, its destination, or what earlier proxies have said about it. Our own fields are not
# removed either: otherwise a client could remove the tokens of the loop guard.
NEVER_NOMINATED = frozenset(
    {
        b"host",
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"content-range",
        b"range",
        b"location",
        b"authorization",
    }
    | {
        b"cookie",
        b"set-cookie",
        b"date",
        b"cache-control",
        b"max-forwards",
        b"forwarded",
        b"via",
        b"x-real-ip",
    }
    | {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port"}
    | {b"traceparent", b"tracestate", b"grpc-trace-bin", b"b3", b"uber-trace-id", b"grpc-timeout"}
    | {b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"}
)

# Connection options that require no further removal.
_NOTHING_MORE = NEVER_NOMINATED | HOP_BY_HOP | {b"close"}

# Fields that must not be trailers (RFC 9110 §6.5.1, and the list of RFC 7230 §4.1.2). A recipient
# that merges trailers into the head would change framing, routing, authorisation or the meaning of
# the message. They are dropped, because a recipient may ignore trailers.
_NO_TRAILERS = (
    _CONNECTION_FIELDS
    | CALLER_FIELDS
    | {
        b"content-length",
        b"trailer",
        b"host",
        b"via",
        b"forwarded",
        b"proxy-status",
        b"proxy-authenticate",
        b"proxy-authorization",
    }
    | {
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-forwarded-port",
        b"x-real-ip",
    }
    | {
        b"authorization",
        b"www-authenticate",
        b"authentication-info",
        b"proxy-authentication-info",
        b"cookie",
        b"set-cookie",
    }
    | {
        b"cache-control",
        b"expect",
        b"max-forwards",
        b"pragma",
        b"range",
        b"age",
        b"date",
        b"expires",
        b"location",
        b"retry-after",
    }
    | {
        b"vary",
        b"warning",
        b"if-match",
        b"if-none-match",
        b"if-modified-since",
        b"if-unmodified-since",
        b"if-range",
    }
    | {b"content-encoding", b"content-type", b"content-range"}
)


def may_trail(name: bytes) -> bool:
    """Whether a field of this name (in lower case) may be forwarded in a trailer section."""
    return name not in _NO_TRAILERS and not name.startswith(OWN)


def strip_hop_by_hop(headers: Headers) -> None:
    """Remove hop-by-hop fields in place, also those that Connection names (RFC 9110 §7.6.1)."""
    if headers.clean or headers.strip_block():
        return
    named = [
        name
        for name in headers.tokens(b"connection")
        if name not in _NOTHING_MORE and not name.startswith(OWN)
    ]
    headers.items = _others(headers.items, HOP_BY_HOP.union(named) if named else HOP_BY_HOP)


def wants_trailers(headers: Headers) -> bool:
    """Whether the client sent `TE: trailers` (RFC 9110 §10.1.4)."""
    return not headers.clean and any(
        token.split(b";")[0].strip() == b"trailers" for token in headers.tokens(b"te")
    )


_CARRY_HTTP = frozenset({b"h2c", b"h2", b"http", b"tls"})


def upgrade_offer(headers: Headers) -> bytes | None:
    """The value of Upgrade, if Connection names it as required (RFC 9110 §7.8). None: no offer.

    Protocols that carry HTTP are removed from the offer: `h2c` (retired by RFC 9113 §3.1) and TLS
    (RFC 2817). After such an upgrade, this proxy could not see or check the single requests. A
    proxy may ignore an offer.
    """
    if headers.clean or b"upgrade" not in headers.tokens(b"connection"):
        return None
    offers = [value for value in headers.all(b"upgrade") if value]
    names = [name.strip() for value in offers for name in value.split(b",")]
    return (
        b", ".join([n for n in names if n and n.lower().partition(b"/")[0] not in _CARRY_HTTP])
        or None
    )
