"""Loops that requests show.

What goes round
===============

Addresses cannot show a loop that leads through an application: an ingress that forwards to its own service, two reverse proxies that point
at each other, two clusters that each send to the other. Between a proxy's inbound and its outbound side the application opens a connection
of its own, and nothing in the two says that they belong together. But software that forwards requests (nginx, HAProxy, ingress
controllers) copies header fields that it does not know. So each proxy that a request passes leaves a token in a field of ours, and one that
meets its own token has seen this request before.

The field
=========

    isthmus-hops = hop *( OWS "," OWS hop )        ; oldest first; several lines are one list (RFC 9110, section 5.3)
    hop          = place who what [ ":" name ]
    place        = "o" / "i" / "e" / "g"           ; outbound; inbound from a verified peer, from anybody else; gateway
    who          = 8base64                         ; 48 bits, of the cluster, the namespace, the pod and the side of the proxy
    what         = 8base64                         ; 48 bits, of the method, the authority and the target
    base64       = ALPHA / DIGIT / "+" / "/"
    name         = label "/" label                 ; cluster and pod, for people
    label        = 1*63( ALPHA / DIGIT / "-" / "." / "_" )

Both digests are keyed (BLAKE2b) by a secret that a process draws when it starts. So a proxy recognises its own tokens, nobody else can make
one, and nobody can find out by trial what a pod or a path is called. Others' tokens are never compared, only counted and read aloud.

Verdicts
========

*Return.* Our own `who` and `what` stand in the field already: the same request is here again. An application may call itself with the
request that it is answering, so a sidecar lets `max_returns` of them pass. A gateway is no application, and `max_returns` is 0 there. A
request that is sent again (a retry, a client that repeats itself) begins with an empty field each time, and is no return.

*Too far.* The field has `max_hops` tokens. That ends what no return shows: a loop that changes its path in each round, or one that
is spread over so many replicas that none sees it twice. It bounds every loop, because each round adds a token.

What is not seen: a loop through software that drops fields it does not know, as most programs do that are no reverse proxies. If it calls
itself, nesting.py bounds it; if it keeps `Forwarded`, forwarded_loops.py. Else nothing in its requests tells a loop from a busy service;
each proxy's limits hold, and no more.

Trust
=====

A refusal meets the request that carries the field and no other. Whoever forges tokens, or sends a field full of them, can have his
own requests refused, which he can have cheaper. What is not of the grammar is dropped, and what is longer than `LONGEST` is dropped
unread: a loop that loses its tokens begins again, and whoever could make it lose them in each round could as well not send it round.

The digests say nothing to others and always travel, so a loop that leads out of the mesh and back is seen. Names are for peers of the trust
domain: they are taken off before a request leaves for an endpoint without an identity, and not believed if they come from a peer that has
shown none. `e` says that the request came from such a peer, so the words of its loops are for the log and not for the answer.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from loopguard.l4 import Loop

HEADER = b"isthmus-hops"
LONGEST = 16384  # bytes of the field that are read
LONGEST_NAMED = 4096  # bytes that are sent on with names: common servers take 8 KiB for a line

Side = Literal["outbound", "inbound", "gateway"]

_DIGEST = 6  # bytes; 8 characters in base64
_BARE = 17  # characters of a token without a name
_LABEL = rb"[-A-Za-z0-9._]{1,63}"
_HOP = rb"[oieg][A-Za-z0-9+/]{16}(?::" + _LABEL + rb"/" + _LABEL + rb")?"
_ONE = re.compile(_HOP)
_WHOLE = re.compile(_HOP + rb"(?:, " + _HOP + rb")*+")
_NAMES = re.compile(rb":[^,]*")
_NO_LABEL = re.compile(r"[^-A-Za-z0-9._]")

UNNAMED = "?"
_TOLD = 8  # names of one cycle that are spelled out


@dataclass(frozen=True, slots=True)
class Who:
    """A proxy, in the words of its configuration."""

    cluster: str
    namespace: str
    pod: str

    @property
    def name(self) -> str:
        """As it stands in tokens and in words: `west/web-1`."""
        return f"{_label(self.cluster)}/{_label(self.pod or 'isthmus')}"


def _label(text: str) -> str:
    return _NO_LABEL.sub("_", text[:63]) or "_"


@dataclass(frozen=True, slots=True)
class HopLimits:
    """How often one request may be here again, and how many proxies it may pass."""

    max_returns: int
    max_hops: int


class Waypoint:
    """One side of one proxy, which requests pass. `secret` is the process's own, 16 to 64 random bytes."""

    __slots__ = ("_limits", "_name", "_own", "_prefix", "_what", "name")

    def __init__(self, side: Side, who: Who, secret: bytes, limits: HopLimits) -> None:
        self.name = who.name
        self._name = b":" + who.name.encode("ascii")
        self._limits = limits
        text = f"{who.cluster}/{who.namespace}/{who.pod}/{side}".encode()
        self._own = _base64(blake2b(text, digest_size=_DIGEST, key=secret, person=b"who").digest())
        self._prefix = side[:1].encode() + self._own
        # Kept with the key taken in: copying that is cheaper than taking it in again for each request.
        self._what = blake2b(text, digest_size=_DIGEST, key=secret, person=b"what")

    def token(self, method: bytes, target: bytes, authority: bytes) -> bytes:
        """Our token for a request, without a name."""
        digest = self._what.copy()
        digest.update(b"%b %b %b" % (method, target, authority))
        return self._prefix + b2a_base64(digest.digest(), newline=False)

    def named(self, token: bytes) -> bytes:
        return token + self._name

    def met(self, field: bytes, token: bytes) -> Loop | None:
        """The verdict on a request that comes with `field` (as `read` gives it) and for which `token` is ours."""
        if self._own in field and (loop := self._returned(field, token)) is not None:
            return loop
        if field.count(b",") + 1 < self._limits.max_hops:
            return None
        names = self._words(field.split(b", "))
        words = f"the request has passed {self._limits.max_hops} proxies, which is as many as it may (loops.max_hops): {names}"
        return Loop("hops", words, names)

    def _returned(self, field: bytes, token: bytes) -> Loop | None:
        hops = field.split(b", ")
        mine = [index for index, hop in enumerate(hops) if hop[1:_BARE] == token[1:]]
        if len(mine) <= self._limits.max_returns:
            return None
        names = self._words(hops[mine[-1] :])  # from its last time here to now is once round
        often = f" {len(mine)} times" if len(mine) > 1 else ""
        return Loop("request", f"the same request has been here{often} already: {names}", names)

    def _words(self, hops: list[bytes]) -> str:
        """The way of a request from `hops` to us, in words. The two sides of a proxy, and neighbours without a name, are one stop."""
        stops: list[str] = []
        for hop in hops:
            name = self.name if hop[1:9] == self._own else hop[_BARE + 1 :].decode("ascii") or UNNAMED
            if not stops or stops[-1] != name:
                stops.append(name)
        if len(stops) == 1 or stops[-1] != self.name:
            stops.append(self.name)
        return told(stops)

    def lost(self, field: bytes) -> bool:
        """Whether a request that goes on with `field` has come without a token of ours: it is new here, or has lost them on the way."""
        return field.count(self._own) <= 1

    def extended(self, field: bytes, token: bytes) -> bytes:
        """The field as it goes on; without its names if it would be too long with them."""
        longer = b"%b, %b%b" % (field, token, self._name)
        return longer if len(longer) <= LONGEST_NAMED else nameless(longer)


def told(stops: list[str]) -> str:
    """A way in words, of bounded length."""
    if len(stops) > _TOLD:
        stops = [*stops[: _TOLD // 2], f"({len(stops) - _TOLD} more)", *stops[-_TOLD // 2 :]]
    return " -> ".join(stops)


Dropped = Literal["", "broken", "oversized"]


def read(lines: list[bytes]) -> tuple[bytes, Dropped]:
    """The tokens in the field's lines, separated by `, `, and why some were dropped. b"": there are none."""
    if len(lines) == 1 and len(lines[0]) <= LONGEST and _WHOLE.fullmatch(lines[0]):
        return lines[0], ""
    if sum(map(len, lines)) > LONGEST:
        return b"", "oversized"
    members = [member for line in lines for member in (part.strip(b" \t") for part in line.split(b",")) if member]
    hops = [member for member in members if _ONE.fullmatch(member)]
    return b", ".join(hops), "broken" if len(hops) < len(members) else ""


def nameless(field: bytes) -> bytes:
    """The field as outsiders may see it."""
    return _NAMES.sub(b"", field) if b":" in field else field


def outsiders(token: bytes) -> bytes:
    """The inbound token of a request whose sender has shown no identity."""
    return b"e" + token[1:]


def from_outside(field: bytes) -> bool:
    """Whether somebody without an identity began this, or had a part in it."""
    return field.startswith(b"e") or b", e" in field


def _base64(digest: bytes) -> bytes:
    return b2a_base64(digest, newline=False)
