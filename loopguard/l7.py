"""Loops that requests show.

The problem
===========

Addresses cannot show a loop through an application. Examples: an ingress that forwards to its own
service, two reverse proxies that point at each other, two clusters that each send to the other.
Between the proxy's inbound and outbound side, the application opens a new connection, and nothing
connects the two. But software that forwards requests (nginx, HAProxy, ingress controllers) copies
unknown header fields. So each proxy adds a token to a field of the request. A proxy that finds its
own token has already seen this request.

The field
=========

    isthmus-hops = hop *( OWS "," OWS hop )    ; oldest first; several lines are one list
                                               ; (RFC 9110, section 5.3)
    hop          = place who what [ ":" name ]
    place        = "o" / "i" / "e" / "g"       ; outbound; inbound from a verified peer; inbound
                                               ; from any other peer; gateway
    who          = 8base64                     ; 48 bits: cluster, namespace, pod, side of the proxy
    what         = 8base64                     ; 48 bits: method, authority, target
    base64       = ALPHA / DIGIT / "+" / "/"
    name         = label "/" label             ; cluster and pod, for people
    label        = 1*63( ALPHA / DIGIT / "-" / "." / "_" )

Both digests are keyed (BLAKE2b) by a secret that each process creates at its start. So a proxy
recognises its own tokens, no other party can create one, and no party can find out the names of
pods or paths by trial. Tokens of other proxies are never compared. They are only counted and
quoted.

Verdicts
========

*Return.* The field has our own `who` and `what`: the same request is here again. An application may
call itself with the request that it is answering, so a sidecar allows `max_returns` of them. A
gateway is not an application, so there `max_returns` is 0. A repeated request (a retry, or a client
that tries again) starts with an empty field each time, so it is not a return.

*Too many hops.* The field has `max_hops` tokens. This ends loops without a visible return: a loop
whose path changes in each round, or one over so many replicas that none sees it twice. It limits
every loop, because each round adds a token.

What is not detected: a loop through software that drops unknown fields, like most programs that are
not reverse proxies. If it calls itself, nesting.py limits it. If it keeps `Forwarded`,
forwarded_loops.py limits it. Otherwise its requests look like those of a busy service, and only the
limits of each proxy apply.

Trust
=====

A refusal affects only the request that carries the field. A sender that forges tokens, or fills the
field with them, only has its own requests refused. Text outside the grammar is dropped, and a field
longer than `LONGEST` is dropped unread. A loop that loses its tokens starts again; a party that can
remove them in each round could also stop sending.

The digests are opaque to others and always stay, so a loop that leaves the mesh and returns is
detected. Names are only for peers of the trust domain. They are removed before a request goes to an
endpoint without an identity, and not trusted if a peer without an identity sends them. `e` marks a
request of such a peer; then the description of a loop goes into the log but not into the answer.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from loopguard.l4 import Loop

HEADER = b"isthmus-hops"
LONGEST = 16384  # bytes; a longer field is not read
LONGEST_NAMED = 4096  # bytes; a longer field is sent without names (servers accept 8 KiB a line)

Direction = Literal["outbound", "inbound", "gateway"]

_DIGEST = 6  # bytes; 8 characters in base64
_BARE = 17  # characters of a token without a name
_LABEL = rb"[-A-Za-z0-9._]{1,63}"
_HOP = rb"[oieg][A-Za-z0-9+/]{16}(?::" + _LABEL + rb"/" + _LABEL + rb")?"
_ONE = re.compile(_HOP)
_WHOLE = re.compile(_HOP + rb"(?:, " + _HOP + rb")*+")
_NAMES = re.compile(rb":[^,]*")
_NO_LABEL = re.compile(r"[^-A-Za-z0-9._]")

UNNAMED = "?"
_TOLD = 8  # names in a description of a cycle


@dataclass(frozen=True, slots=True)
class ProxyName:
    """A proxy, by the names in its configuration."""

    cluster: str
    namespace: str
    pod: str

    @property
    def name(self) -> str:
        """The name in tokens and messages: `west/web-1`."""
        return f"{_label(self.cluster)}/{_label(self.pod or 'isthmus')}"


def _label(text: str) -> str:
    return _NO_LABEL.sub("_", text[:63]) or "_"


@dataclass(frozen=True, slots=True)
class HopLimits:
    """The limits for one request: returns to the same proxy, and proxies on its path."""

    max_returns: int
    max_hops: int


class HopTokens:
    """One side of one proxy. `secret`: the secret of this process, 16 to 64 random bytes."""

    __slots__ = ("_limits", "_name", "_own", "_prefix", "_what", "name")

    def __init__(self, side: Direction, who: ProxyName, secret: bytes, limits: HopLimits) -> None:
        self.name = who.name
        self._name = b":" + who.name.encode("ascii")
        self._limits = limits
        text = f"{who.cluster}/{who.namespace}/{who.pod}/{side}".encode()
        self._own = _base64(blake2b(text, digest_size=_DIGEST, key=secret, person=b"who").digest())
        self._prefix = side[:1].encode() + self._own
        # The key is already processed here: a copy is cheaper than processing it for each request.
        self._what = blake2b(text, digest_size=_DIGEST, key=secret, person=b"what")

    def token(self, method: bytes, target: bytes, authority: bytes) -> bytes:
        """The token of this proxy for a request, without a name."""
        digest = self._what.copy()
        digest.update(b"%b %b %b" % (method, target, authority))
        return self._prefix + b2a_base64(digest.digest(), newline=False)

    def with_name(self, token: bytes) -> bytes:
        return token + self._name

    def check(self, field: bytes, token: bytes) -> Loop | None:
        """Return the verdict on a request with `field` (from `read`) and our `token`.

        None: no loop.
        """
        if self._own in field and (loop := self._check_returns(field, token)) is not None:
            return loop
        if field.count(b",") + 1 < self._limits.max_hops:
            return None
        names = self._describe(field.split(b", "))
        words = (
            f"the request has passed {self._limits.max_hops} proxies, the limit (loops.max_hops):"
            f" {names}"
        )
        return Loop("hops", words, names)

    def _check_returns(self, field: bytes, token: bytes) -> Loop | None:
        hops = field.split(b", ")
        mine = [index for index, hop in enumerate(hops) if hop[1:_BARE] == token[1:]]
        if len(mine) <= self._limits.max_returns:
            return None
        names = self._describe(hops[mine[-1] :])  # one cycle: from our last token to now
        often = f" {len(mine)} times" if len(mine) > 1 else ""
        return Loop("request", f"the same request has been here{often} already: {names}", names)

    def _describe(self, hops: list[bytes]) -> str:
        """Describe the path of a request from `hops` to this proxy.

        The two sides of a proxy, and adjacent hops without names, count as one stop.
        """
        stops: list[str] = []
        for hop in hops:
            name = (
                self.name if hop[1:9] == self._own else hop[_BARE + 1 :].decode("ascii") or UNNAMED
            )
            if not stops or stops[-1] != name:
                stops.append(name)
        if len(stops) == 1 or stops[-1] != self.name:
            stops.append(self.name)
        return describe_path(stops)

    def is_first_hop(self, field: bytes) -> bool:
        """Whether a request that is forwarded with `field` arrived without a token of this mesh.

        It is either new here, or has lost its tokens.
        """
        return field.count(self._own) <= 1

    def append(self, field: bytes, token: bytes) -> bytes:
        """The field with our token added. Without names if it would be too long with them."""
        longer = b"%b, %b%b" % (field, token, self._name)
        return longer if len(longer) <= LONGEST_NAMED else strip_names(longer)


def describe_path(stops: list[str]) -> str:
    """Describe a path in a text of limited length."""
    if len(stops) > _TOLD:
        stops = [*stops[: _TOLD // 2], f"({len(stops) - _TOLD} more)", *stops[-_TOLD // 2 :]]
    return " -> ".join(stops)


Dropped = Literal["", "malformed", "oversized"]


def read(lines: list[bytes]) -> tuple[bytes, Dropped]:
    """Return the tokens in the field's lines, separated by `, `, and why some were dropped.

    b"": there are none.
    """
    if len(lines) == 1 and len(lines[0]) <= LONGEST and _WHOLE.fullmatch(lines[0]):
        return lines[0], ""
    if sum(map(len, lines)) > LONGEST:
        return b"", "oversized"
    members = [
        member
        for line in lines
        for member in (part.strip(b" \t") for part in line.split(b","))
        if member
    ]
    hops = [member for member in members if _ONE.fullmatch(member)]
    return b", ".join(hops), "malformed" if len(hops) < len(members) else ""


def strip_names(field: bytes) -> bytes:
    """The field without names, for peers outside the mesh."""
    return _NAMES.sub(b"", field) if b":" in field else field


def mark_outside(token: bytes) -> bytes:
    """The inbound token for a request whose sender has no identity."""
    return b"e" + token[1:]


def from_outside(field: bytes) -> bool:
    """Whether a sender without an identity started this request or forwarded it."""
    return field.startswith(b"e") or b", e" in field


def _base64(digest: bytes) -> bytes:
    return b2a_base64(digest, newline=False)
