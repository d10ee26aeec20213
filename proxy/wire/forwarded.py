"""The Forwarded field (RFC 7239): each proxy adds information about the previous hop.

    Forwarded   = 1#forwarded-element
                  comma-separated; one element for each proxy, the first proxy's element first
    element     = [ pair ] *( ";" [ pair ] )
    pair        = token "=" ( token / quoted-string )
                  names are case-insensitive; each name occurs once
    node        = name [ ":" port ]                    the value of `by` and `for`
    name        = IPv4 / "[" IPv6 "]" / "unknown" / obfuscated
    obfuscated  = "_" 1*( ALPHA / DIGIT / "." / "_" / "-" )

Several lines of the field form one list. Therefore a malformed line is dangerous: an opening quote
without a closing one would hide what the next proxy adds. So every line must be well formed by
itself. A proxy that adds a line first removes the lines that are not.

An identity of the mesh is not an IP address, and `spiffe://...` is not a valid node. Its DNS form
is valid as an obfuscated name: `_web.default.sa.cluster.local`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.wire.messages import ProtocolError

# More hops than any request makes. The loop guard stops a request long before.
MOST_ELEMENTS = 256

_TOKEN = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
# RFC 9110 §5.6.4: qdtext, or a backslash and any visible character, space or tab.
_QUOTED = re.compile(rb'"((?:[\t !#-\[\]-~\x80-\xff]|\\[\t !-~\x80-\xff])*)"')
_BLANKS = re.compile(rb"[ \t]*")
_OBFUSCATED = re.compile(r"_[A-Za-z0-9._-]+\Z")
_IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}\Z")

Element = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Node:
    """A hop as `by` or `for` names it.

    `name` is an IP literal without brackets, "unknown", or an obfuscated name with its underscore.
    """

    name: str
    port: str = ""  # digits, or an obfuscated port with its underscore


def parse(lines: Iterable[bytes]) -> list[Element]:
    """Return the elements of all lines, in order. Raises ProtocolError for a malformed line.

    Names are in lower case; values have no quotes.
    """
    return [element for line in lines for element in _line(line)]


def _line(line: bytes) -> list[Element]:
    elements: list[Element] = []
    element: dict[str, bytes] = {}
    seen, at = False, _skip(line, 0)
    while at < len(line):
        mark = line[at : at + 1]
        if mark == b",":
            if seen:  # empty list members are ignored (RFC 9110 §5.6.1)
                elements.append(element)
            element, seen = {}, False
            at = _skip(line, at + 1)
        elif mark == b";":
            seen, at = True, _skip(line, at + 1)
        else:
            at = _pair(line, at, element)
            seen = True
            if line[at : at + 1] not in (b"", b",", b";"):
                raise ProtocolError(f"Forwarded: {line[at : at + 1]!r} after a value")
        if len(elements) >= MOST_ELEMENTS:
            raise ProtocolError(f"Forwarded: more than {MOST_ELEMENTS} elements")
    if seen:
        elements.append(element)
    return elements


def _skip(line: bytes, at: int) -> int:
    """Return the offset after the blanks at `at`. Blanks are allowed only around separators."""
    match = _BLANKS.match(line, at)
    return match.end() if match is not None else at


def _pair(line: bytes, at: int, element: dict[str, bytes]) -> int:
    """Read a pair into `element`. Return the offset after it and the blanks that follow."""
    name = _TOKEN.match(line, at)
    if name is None or line[name.end() : name.end() + 1] != b"=":
        raise ProtocolError("Forwarded: not of the form name=value")
    key = name[0].decode("ascii").lower()
    if key in element:
        raise ProtocolError(f"Forwarded: {key} occurs twice in one element")
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
    """Parse the value of `by` or `for`. Raises ProtocolError."""
    text = value.decode("latin-1")
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(name):
            raise ProtocolError(f"Forwarded: {text[:64]!r} is not an IPv6 address in brackets")
    else:
        name, colon, rest = text.partition(":")
        rest = colon + rest
        ipv4 = _IPV4.match(name) and all(int(part) < 256 for part in name.split("."))
        if not (ipv4 or name.lower() == "unknown" or _OBFUSCATED.match(name)):
            raise ProtocolError(f"Forwarded: {text[:64]!r} is neither an address nor a _name")
    port = rest[1:]
    if rest and not (
        rest[0] == ":" and (re.fullmatch(r"[0-9]{1,5}", port) or _OBFUSCATED.match(port))
    ):
        raise ProtocolError(f"Forwarded: {text[:64]!r} has no valid port after its colon")
    return Node("unknown" if name.lower() == "unknown" else name, port)


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address) and "%" not in text
    except ValueError:
        return False


def obfuscated(name: str) -> bytes:
    """Encode a name as an obfuscated node.

    Raises ValueError for characters that it may not have.
    """
    if not _OBFUSCATED.match(f"_{name}"):
        raise ValueError(f"{name!r} cannot be a node of Forwarded")
    return f"_{name}".encode("ascii")


def encode(element: Element) -> bytes:
    """Encode one element; values are quoted where necessary.

    Raises ValueError if a value has bytes that no field value may have.
    """
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
