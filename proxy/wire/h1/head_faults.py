"""Error messages for heads that cannot be parsed: which line, which part, and what is expected.

This module decides nothing: h11 or strict_head.py has already refused the head. h11's own messages
quote the bytes in Python's notation and do not give the line. These messages give the number of the
line (the request or status line is line 1), and the name of the field if it is valid. They repeat
nothing else of the input, because the sender chose it and an answer must not reflect it.
"""

from __future__ import annotations

import re

from proxy.wire.grammar import CONTROL, TOKEN
from proxy.wire.messages import Field, Headers

_TOKEN = re.compile(TOKEN)
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]")
_VISIBLE = re.compile(rb"[!-~]+")
_STATUS = re.compile(rb"[1-9][0-9]{2}")
_CONTROL = re.compile(CONTROL)

# A field name is quoted up to this length.
_QUOTED = 40

FRAGMENT = "the target in the request line has a fragment (#), which a client must not send"


def first_line(line: bytes, *, request: bool) -> str | None:
    """Describe the fault of a request line or a status line (RFC 9112 §3, §4). None: no fault."""
    return _request_line(line) if request else _status_line(line)


def _request_line(line: bytes) -> str | None:
    if not line:
        return "the head begins with an empty line"
    parts = line.split(b" ")
    if len(parts) != 3:
        return f"the request line must be `method target version`; it has {len(parts) - 1} spaces"
    method, target, version = parts
    if not _TOKEN.fullmatch(method):
        return "the method in the request line is missing or has invalid characters"
    if not _VISIBLE.fullmatch(target):
        return "the target in the request line is missing, or must be percent-encoded"
    if b"#" in target:
        return FRAGMENT
    if not _VERSION.fullmatch(version):
        return "the request line does not end with a version such as HTTP/1.1"
    return None


def _status_line(line: bytes) -> str | None:
    version, _, rest = line.partition(b" ")
    status, _, reason = rest.partition(b" ")
    if not _VERSION.fullmatch(version):
        return "the status line does not begin with a version such as HTTP/1.1"
    if not _STATUS.fullmatch(status):
        return "the status is not a number from 100 to 999"
    if _CONTROL.search(reason):
        return "the reason phrase in the status line has control characters"
    return None


def field_line(number: int, line: bytes) -> str | None:
    """Describe the fault of the field line (RFC 9112 §5) with this number. None: no fault."""
    name, colon, value = line.partition(b":")
    name = name.rstrip(b" \t")  # white space before the colon is handled in strict_head.py
    if not colon:
        return f"line {number} of the head is not a field: it has no colon"
    if not name:
        return f"line {number} of the head is a field without a name"
    if not _TOKEN.fullmatch(name):
        return f"the name of the field in line {number} of the head has invalid characters"
    if _CONTROL.search(value):
        return (
            f"the value of the field {name[:_QUOTED].decode('ascii')}, in line {number} of the"
            " head, has control characters"
        )
    return None


def lines(complete: bytes, *, request: bool) -> str | None:
    """Describe the first faulty line among some complete lines of a head. None: no fault."""
    first, *others = complete.removesuffix(b"\r\n").split(b"\r\n")
    words = first_line(first, request=request)
    for number, line in enumerate(others, 2):
        words = words or field_line(number, line)
    return words


def control(head: bytes) -> str | None:
    """Describe the line of a complete head that has a control character."""
    return lines(head.removesuffix(b"\r\n"), request=not head.startswith(b"HTTP/"))


def hosts(headers: Headers, version: bytes) -> str | None:
    """Describe a wrong number of Host fields in a request (RFC 9112 §3.2). None: no fault."""
    count = len(headers.all(b"host"))
    if count > 1:
        return f"the head has {count} Host fields: it must have one"
    return (
        "the head has no Host field: it must have one" if not count and version == b"1.1" else None
    )


def fields(head: bytes) -> Headers:
    """The fields of a head whose lines are all well formed."""
    pairs: list[Field] = []
    for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        pairs.append((name, value.strip(b" \t")))
    return Headers(pairs)
