"""Requests and responses, independent of the wire they came by.

The canonical form is HTTP/1's: a method, a request target, and an ordered list of fields in which the authority is the Host
field (RFC 9110 §7.2). Names keep the case they arrived in, because a sidecar that nobody asked for should change as little as it
can; comparisons are made in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

Field = tuple[bytes, bytes]

# uri-host [":" port] (RFC 3986 §3.2.2, §3.2.3): what a Host field and an absolute-form target may name. User information has no place in
# either, and is what lets two readers see two hosts in one name (RFC 9110 §4.2.4). No capturing groups: other expressions use these.
HOST = rb"(?:\[[0-9A-Za-z:.%]+\]|[-0-9A-Za-z._~%!$&'()*+,;=]*)"
AUTHORITY = HOST + rb"(?::[0-9]{0,5})?"
_HOST_FIRST = (b"Host: ", b"host: ")  # as nearly always
_ABSOLUTE = re.compile(rb"[A-Za-z][-+.0-9A-Za-z]*://(" + AUTHORITY + rb")(?:[/?#].*)?", re.DOTALL)


class ProtocolError(Exception):
    """The peer broke the protocol. `status` is what a server would answer it with (RFC 9110 §15); the message names what and where."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Signal(Enum):
    """What a reader says when it has no event."""

    NEED_DATA = "need data"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one message's head and trailers: bytes, but for `fields`, which is a count."""

    head: int = 65536
    target: int = 16384
    fields: int = 128


class Headers:
    """Ordered fields. Lookups take the name in lower case.

    Those of a head that the recogniser has accepted (h1/fast_head.py) stay the `block` of lines that they came as until somebody asks for
    more: most heads go on in their own bytes, with a line or two of ours behind them. A block has one Host, and no field that offers or
    frames anything. `clean`: it is known that no field in here belongs to the hop, so nobody has to look for one.
    """

    __slots__ = ("_ending", "_items", "block", "clean")

    def __init__(self, items: Iterable[Field] = ()) -> None:
        self.block: bytes | None = None
        self._items: list[Field] = list(items) if items else []
        self.clean = False
        self._ending: Sequence[bytes] = ()

    @classmethod
    def canonical(cls, block: bytes, ending: Sequence[bytes]) -> Headers:
        """Of lines `name: value CRLF` that the recogniser has accepted. `ending`: those of them that belong to the hop, to their CR."""
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
        """As they stand in an HTTP/1 head. Nothing is checked."""
        if self.block is not None:
            return self.block
        return b"".join([b"%b: %b\r\n" % item for item in self._items])

    def strip_block(self) -> bool:
        """Remove what ends at this hop, if that can be done without splitting; whether it could."""
        if self.block is not None and not self.clean:
            lines = b"\n" + self.block
            for line in self._ending:
                lines = lines.replace(b"\n" + line, b"", 1)
            self.block, self.clean = lines[1:], True
        return self.clean

    def onward(self) -> Headers:
        """A copy of the `block`, without the lines that end at this hop."""
        copy = Headers.canonical(self.block or b"", self._ending)
        copy.strip_block()
        return copy

    def append(self, name: bytes, value: bytes) -> None:
        """Put a field at the end, one that does not belong to the hop (or to the next one, when nobody strips any more)."""
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
        """Equal as a recipient would see them: the same names in any case, the same values, in the same order."""
        if not isinstance(other, Headers):
            return NotImplemented
        return [(n.lower(), v) for n, v in self.items] == [(n.lower(), v) for n, v in other.items]

    __hash__ = None  # type: ignore[assignment]  # mutable: the documented way to say so

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
        """The members of a comma-separated field over all its lines, trimmed, in lower case, without empty ones (RFC 9110 §5.6.1)."""
        found = [t.strip(b" \t").lower() for value in self.all(name) for t in value.split(b",")]
        return [t for t in found if t]

    def add(self, name: bytes, value: bytes) -> None:
        self.clean = False
        self.items.append((name, value))

    def remove(self, *names: bytes) -> None:
        self.items = _others(self.items, names)

    def replace(self, name: bytes, value: bytes) -> None:
        """Put `value` where the first such field stands (at the end if there is none) and drop the other ones."""
        lower = name.lower()
        for index, (n, _) in enumerate(self.items):
            if n.lower() == lower:
                self.items[index:] = [(n, value), *_others(self.items[index + 1 :], (lower,))]
                return
        self.items.append((name, value))

    def copy(self) -> Headers:
        return Headers(self.items)

    def write_length(self) -> None:
        """Write a Content-Length that is a number without its leading zeros. The grammar allows them (1*DIGIT, RFC 9110 §8.6), and some
        readers take such a number for an octal one."""
        for index, (name, value) in enumerate(self.items):
            if value[:1] == b"0" != value and name.lower() == b"content-length":
                self.items[index] = (name, b"%d" % int(value))


def _others(items: list[Field], names: Container[bytes]) -> list[Field]:
    """The fields of all other names: the same objects, since one may be more than its parts (fields2.Secret), which a compiled loop does
    not see."""
    return list(filter(lambda item: item[0].lower() not in names, items))


def place(lower: bytes, mark: bytes) -> int:
    """Where the value of a field begins in the canonical lines of a head, which are in lower case; the first one's, if there are more.
    0: there is none. `mark` is what it stands behind: a newline, its name, colon and blank."""
    if lower.startswith(mark[1:]):
        return len(mark) - 1
    at = lower.find(mark)
    return at + len(mark) if at >= 0 else 0


# A dataclass's own __init__ is never compiled (docs/decisions/30-compiled.md). These two are made for every request.
@dataclass(slots=True, init=False)
class RequestHead:
    """A request's head. `target` is as on the wire: origin-form, absolute-form, authority-form (CONNECT) or `*` (RFC 9112 §3.2)."""

    method: bytes
    target: bytes
    headers: Headers
    version: bytes
    protocol: bytes | None  # of an extended CONNECT (RFC 8441), which is how HTTP/2 asks for a WebSocket

    def __init__(self, method: bytes, target: bytes, headers: Headers, version: bytes = b"1.1", protocol: bytes | None = None) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.version = version
        self.protocol = protocol

    @property
    def authority(self) -> bytes | None:
        """Whom the request is for: the target's own authority before the Host field (RFC 9112 §3.2.2)."""
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
    """The head of a response. `version`: of the connection that it came on."""

    status: int
    headers: Headers
    reason: bytes
    version: bytes

    def __init__(self, status: int, headers: Headers | None = None, reason: bytes = b"", version: bytes = b"1.1") -> None:
        self.status = status
        self.headers = Headers() if headers is None else headers
        self.reason = reason
        self.version = version

    @property
    def informational(self) -> bool:
        """An interim response, which another one follows. 101 is not one: it ends HTTP on the connection (RFC 9110 §15.2.2)."""
        return 100 <= self.status < 200 and self.status != 101


@dataclass(frozen=True, slots=True)
class EndOfMessage:
    """A body has ended, with these trailers."""

    trailers: Headers = field(default_factory=Headers)


# Without trailers there is nothing to tell two ends apart, so all share one.
END = EndOfMessage()


def absolute_authority(target: bytes) -> bytes | None:
    """The authority of an absolute-form target; None if it has none, or one that is no host and port (user information included)."""
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


# Fields that speak of one connection only (RFC 9110 §7.6.1; Keep-Alive and Proxy-Connection are RFC 2068's and de facto). Two come back:
# Transfer-Encoding, as the framing of the other side has it, and TE as `TE: trailers` where trailers can be carried.
_CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"})

# Who has sent a request, as proxies have verified it. Each proxy says it anew to the next hop, or says nothing: what came in is dropped,
# for anybody could have written it. So is Linkerd's field of the same meaning, and every spelling that a server which makes variables
# of fields (CGI and its children: RFC 3875 §4.1.18) would take for the same name. lighttpd has an underscore for each character that is no
# letter and no digit, and so all that a name may have of these (RFC 9110 §5.6.2) stand for a dash.
CALLER = b"isthmus-client-id"
_DASHES = b"!#$%&'*+-.^_`|~"
CALLER_FIELDS = frozenset(b"%b%cclient%cid" % (proxy, one, two) for proxy in (b"isthmus", b"l5d") for one in _DASHES for two in _DASHES)
# The same as a pattern, of names in any case if it is used so.
CALLER_PATTERN = rb"(?:isthmus|l5d)[%b]client[%b]id" % (re.escape(_DASHES), re.escape(_DASHES))

# Limits that a client asks the first proxy for (proxy/routing/request_overrides.py). They end there, heard or not.
OVERRIDES = frozenset(
    {b"isthmus-timeout", b"isthmus-response-timeout", b"isthmus-attempt-timeout"}
    | {b"isthmus-retry-limit", b"isthmus-retry-statuses", b"isthmus-retry-grpc"}
)

# Why the last proxy answers a request itself: one of the reasons in errors.py. A proxy says it to peers whose identity is verified, and
# believes it of those only (proxy/exchange/reports.py). It removes what an application says here, and passes nothing on.
FAILURE = b"isthmus-failure"

# What ends at each hop.
HOP_BY_HOP = _CONNECTION_FIELDS | CALLER_FIELDS | OVERRIDES | {FAILURE}

# The names of all our fields begin with this.
OWN = b"isthmus-"

# A Connection option may name any field, but dropping one of these would change what the message means, to whom it goes, or what the
# proxies before us have said about it. None of ours is dropped for it either: a client could take the loop guard's tokens off so.
NEVER_NOMINATED = frozenset(
    {b"host", b"content-length", b"content-type", b"content-encoding", b"content-range", b"range", b"location", b"authorization"}
    | {b"cookie", b"set-cookie", b"date", b"cache-control", b"max-forwards", b"forwarded", b"via", b"x-real-ip"}
    | {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port"}
    | {b"traceparent", b"tracestate", b"grpc-trace-bin", b"b3", b"uber-trace-id", b"grpc-timeout"}
    | {b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"}
)

# Connection options that remove nothing more than is removed anyway.
_NOTHING_MORE = NEVER_NOMINATED | HOP_BY_HOP | {b"close"}

# What has no business behind a body (RFC 9110 §6.5.1, and the list of RFC 7230 §4.1.2): a recipient that adds trailers to the other
# fields would frame, route, authorise or read the message anew. They are dropped, as a recipient may ignore them.
_NO_TRAILERS = (
    _CONNECTION_FIELDS
    | CALLER_FIELDS
    | {b"content-length", b"trailer", b"host", b"via", b"forwarded", b"proxy-status", b"proxy-authenticate", b"proxy-authorization"}
    | {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port", b"x-real-ip"}
    | {b"authorization", b"www-authenticate", b"authentication-info", b"proxy-authentication-info", b"cookie", b"set-cookie"}
    | {b"cache-control", b"expect", b"max-forwards", b"pragma", b"range", b"age", b"date", b"expires", b"location", b"retry-after"}
    | {b"vary", b"warning", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"if-range"}
    | {b"content-encoding", b"content-type", b"content-range"}
)


def may_trail(name: bytes) -> bool:
    """Whether a field of this name (in lower case) may be passed on in a trailer section."""
    return name not in _NO_TRAILERS and not name.startswith(OWN)


def strip_hop_by_hop(headers: Headers) -> None:
    """Remove in place what ends at this hop: the fixed list, and what Connection names (RFC 9110 §7.6.1)."""
    if headers.clean or headers.strip_block():
        return
    named = [name for name in headers.tokens(b"connection") if name not in _NOTHING_MORE and not name.startswith(OWN)]
    headers.items = _others(headers.items, HOP_BY_HOP.union(named) if named else HOP_BY_HOP)


def wants_trailers(headers: Headers) -> bool:
    """The client said `TE: trailers` (RFC 9110 §10.1.4)."""
    return not headers.clean and any(token.split(b";")[0].strip() == b"trailers" for token in headers.tokens(b"te"))


_CARRY_HTTP = frozenset({b"h2c", b"h2", b"http", b"tls"})


def upgrade_offer(headers: Headers) -> bytes | None:
    """The value of Upgrade if Connection names it, as it must (RFC 9110 §7.8). What would carry HTTP is never offered onward (`h2c`, which
    RFC 9113 §3.1 has retired, and TLS, RFC 2817): this proxy would no longer see the single requests, and anything could be written into
    them. A proxy may ignore an offer."""
    if headers.clean or b"upgrade" not in headers.tokens(b"connection"):
        return None
    offers = [value for value in headers.all(b"upgrade") if value]
    names = [name.strip() for value in offers for name in value.split(b",")]
    return b", ".join([n for n in names if n and n.lower().partition(b"/")[0] not in _CARRY_HTTP]) or None
