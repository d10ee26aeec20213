"""The Forwarded field (RFC 7239): what proxies say about the hops before them.

    Forwarded   = 1#forwarded-element                  elements, separated by commas: one for each proxy, the first one's first
    element     = [ pair ] *( ";" [ pair ] )
    pair        = token "=" ( token / quoted-string )  names in any case, none of them twice
    node        = name [ ":" port ]                    of `by` and `for`
    name        = IPv4 / "[" IPv6 "]" / "unknown" / obfuscated
    obfuscated  = "_" 1*( ALPHA / DIGIT / "." / "_" / "-" )

Several lines of the field are one list. That makes a malformed line dangerous: a quote that it opens and does not close would swallow what
the next proxy says. So every line has to be well formed by itself, and a proxy that adds a line first drops those that are not.

An identity of the mesh is no IP address, and `spiffe://...` is no node. Its DNS form is, as an obfuscated name:
`_web.default.sa.cluster.local`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.wire.messages import ProtocolError

# More hops than any request makes; loopguard stops them before.
MOST_ELEMENTS = 256

_TOKEN = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
# RFC 9110 §5.6.4: qdtext, or a backslash and any visible character or blank.
_QUOTED = re.compile(rb'"((?:[\t !#-\[\]-~\x80-\xff]|\\[\t !-~\x80-\xff])*)"')
_BLANKS = re.compile(rb"[ \t]*")
_OBFUSCATED = re.compile(r"_[A-Za-z0-9._-]+\Z")
_IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}\Z")

Element = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Node:
    """A hop as `by` or `for` names it. `name`: an IP literal without brackets, "unknown", or an obfuscated name with its underscore."""

    name: str
    port: str = ""  # digits, or an obfuscated port


def parse(lines: Iterable[bytes]) -> list[Element]:
    """The elements of all lines, in order; names in lower case, values without their quotes. Raises ProtocolError."""
    return [element for line in lines for element in _line(line)]


def _line(line: bytes) -> list[Element]:
    elements: list[Element] = []
    element: dict[str, bytes] = {}
    seen, at = False, _skip(line, 0)
    while at < len(line):
        mark = line[at : at + 1]
        if mark == b",":
            if seen:  # empty members of a list are none (RFC 9110 §5.6.1)
                elements.append(element)
            element, seen = {}, False
            at = _skip(line, at + 1)
        elif mark == b";":
            seen, at = True, _skip(line, at + 1)
        else:
            at = _pair(line, at, element)
            seen = True
            if line[at : at + 1] not in (b"", b",", b";"):
                raise ProtocolError(f"Forwarded: {line[at : at + 1]!r} behind a value")
        if len(elements) >= MOST_ELEMENTS:
            raise ProtocolError(f"Forwarded: more than {MOST_ELEMENTS} elements")
    if seen:
        elements.append(element)
    return elements


def _skip(line: bytes, at: int) -> int:
    """Behind the blanks at `at`, which are allowed around the separators and nowhere else."""
    match = _BLANKS.match(line, at)
    return match.end() if match is not None else at


def _pair(line: bytes, at: int, element: dict[str, bytes]) -> int:
    """Read a pair into `element`; where it ends, with the blanks behind it."""
    name = _TOKEN.match(line, at)
    if name is None or line[name.end() : name.end() + 1] != b"=":
        raise ProtocolError("Forwarded: not of the form name=value")
    key = name[0].decode("ascii").lower()
    if key in element:
        raise ProtocolError(f"Forwarded: {key} twice in one element")
    token = _TOKEN.match(line, name.end() + 1)
    quoted = _QUOTED.match(line, name.end() + 1)
    if token is not None:
        element[key] = token[0]
        return _skip(line, token.end())
    if quoted is None:
        raise ProtocolError(f"Forwarded: the value of {key} is neither a token nor a quoted string")
    element[key] = re.sub(rb"\\(.)", rb"\1", quoted[1], flags=re.DOTALL)
    return _skip(line, quoted.end())


def node(value: bytes) -> Node:
    """The node that the value of `by` or `for` names. Raises ProtocolError."""
    text = value.decode("latin-1")
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(name):
            raise ProtocolError(f"Forwarded: {text[:64]!r} is no IPv6 address in brackets")
    else:
        name, colon, rest = text.partition(":")
        rest = colon + rest
        ipv4 = _IPV4.match(name) and all(int(part) < 256 for part in name.split("."))
        if not (ipv4 or name.lower() == "unknown" or _OBFUSCATED.match(name)):
            raise ProtocolError(f"Forwarded: {text[:64]!r} is no address, and no name that begins with an underscore")
    port = rest[1:]
    if rest and not (rest[0] == ":" and (re.fullmatch(r"[0-9]{1,5}", port) or _OBFUSCATED.match(port))):
        raise ProtocolError(f"Forwarded: {text[:64]!r} has no port behind its colon")
    return Node("unknown" if name.lower() == "unknown" else name, port)


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address) and "%" not in text
    except ValueError:
        return False


def obfuscated(name: str) -> bytes:
    """A name as a node that is no address. Raises ValueError if it has characters that such a node cannot have."""
    if not _OBFUSCATED.match(f"_{name}"):
        raise ValueError(f"{name!r} cannot be a node of Forwarded")
    return f"_{name}".encode("ascii")


def encode(element: Element) -> bytes:
    """One element, with quotes where they are needed. Raises ValueError for a value that cannot be written."""
    parts = []
    for name, value in element.items():
        if _TOKEN.fullmatch(value):
            parts.append(b"%b=%b" % (name.encode("ascii"), value))
            continue
        quoted = b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
        if not _QUOTED.fullmatch(quoted):
            raise ValueError(f"{name} has bytes that no field may have")
        parts.append(b"%b=%b" % (name.encode("ascii"), quoted))
    return b";".join(parts)
