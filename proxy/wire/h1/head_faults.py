"""What is wrong with a head that cannot be read, in words for whoever sent it: which line, which part of it, and what should stand there.

Nothing is decided here. A head has been refused already, by h11 or by strict_head.py, and h11's own words quote the bytes as Python writes
them and leave the line to be found. The words name lines by their number (the request or status line is line 1) and fields by their name,
if it is one; they never repeat what was sent beside that, because an answer is no place to write what somebody else has chosen.
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

# A field's name is quoted up to here.
_QUOTED = 40

FRAGMENT = "the target in the request line has a fragment (#), which stays with the client"


def first_line(line: bytes, *, request: bool) -> str | None:
    """What is wrong with a request line or a status line (RFC 9112 §3, §4); None: nothing."""
    return _request_line(line) if request else _status_line(line)


def _request_line(line: bytes) -> str | None:
    if not line:
        return "the head begins with an empty line"
    parts = line.split(b" ")
    if len(parts) != 3:
        return f"the request line should be a method, a target and a version, with one blank between them; it has {len(parts) - 1} blanks"
    method, target, version = parts
    if not _TOKEN.fullmatch(method):
        return "the method in the request line is missing, or has characters that no method may have"
    if not _VISIBLE.fullmatch(target):
        return "the target in the request line is missing, or has characters that have to be percent-encoded"
    if b"#" in target:
        return FRAGMENT
    if not _VERSION.fullmatch(version):
        return "the request line does not end with HTTP/ and a version of one digit, a point, one digit"
    return None


def _status_line(line: bytes) -> str | None:
    version, _, rest = line.partition(b" ")
    status, _, reason = rest.partition(b" ")
    if not _VERSION.fullmatch(version):
        return "the status line does not begin with HTTP/ and a version of one digit, a point, one digit"
    if not _STATUS.fullmatch(status):
        return "the status is not a number from 100 to 999"
    if _CONTROL.search(reason):
        return "the reason in the status line has control characters"
    return None


def field_line(number: int, line: bytes) -> str | None:
    """What is wrong with the field line (RFC 9112 §5) that is line `number` of its head; None: nothing."""
    name, colon, value = line.partition(b":")
    name = name.rstrip(b" \t")  # white space before the colon is another fault, and in a response none (strict_head.py)
    if not colon:
        return f"line {number} of the head is no field: it has no colon"
    if not name:
        return f"line {number} of the head is a field without a name"
    if not _TOKEN.fullmatch(name):
        return f"the name of the field in line {number} of the head has characters that no name may have"
    if _CONTROL.search(value):
        return f"the value of the field {name[:_QUOTED].decode('ascii')}, in line {number} of the head, has control characters"
    return None


def lines(complete: bytes, *, request: bool) -> str | None:
    """What is wrong with the first of some complete lines that is not as it should be; None: all are."""
    first, *others = complete.removesuffix(b"\r\n").split(b"\r\n")
    words = first_line(first, request=request)
    for number, line in enumerate(others, 2):
        words = words or field_line(number, line)
    return words


def control(head: bytes) -> str | None:
    """In which line of a complete head a control character stands."""
    return lines(head.removesuffix(b"\r\n"), request=not head.startswith(b"HTTP/"))


def hosts(headers: Headers, version: bytes) -> str | None:
    """What is wrong with how often a request says for whom it is (RFC 9112 §3.2); None: nothing."""
    count = len(headers.all(b"host"))
    if count > 1:
        return f"the head has {count} Host fields: it must have one"
    return "the head has no Host field: it must have one" if not count and version == b"1.1" else None


def fields(head: bytes) -> Headers:
    """The fields of a head whose lines are as they should be."""
    pairs: list[Field] = []
    for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        pairs.append((name, value.strip(b" \t")))
    return Headers(pairs)
