"""HTTP/2 frames (RFC 9113 §4, §6): constants, parsing and encoding."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_SIZE = 9
DEFAULT_WINDOW = 65535
DEFAULT_FRAME_SIZE = 16384
LARGEST_FRAME_SIZE = 2**24 - 1
LARGEST_WINDOW = 2**31 - 1


class Kind(IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


# Flags.
END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20


class Setting(IntEnum):
    """Parameters of SETTINGS (§6.5.2)."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8  # RFC 8441


class Code(IntEnum):
    """Error codes (§7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def code_name(code: int) -> str:
    """The name of an error code, or its number if it is unknown."""
    return Code(code).name if code in Code.__members__.values() else f"code {code}"


class ConnectionFault(Exception):
    """The connection must end, with this error code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class StreamFault(Exception):
    """One stream must end, with this error code. The others continue."""

    def __init__(self, stream: int, code: Code, message: str) -> None:
        super().__init__(message)
        self.stream = stream
        self.code = code


HEADER = struct.Struct(">BHBBL")
_SETTING = struct.Struct(">HL")
_LONG = struct.Struct(">L")
_GOAWAY = struct.Struct(">LL")


def header(size: int, kind: int, flags: int, stream: int) -> bytes:
    """The nine-byte frame header for a payload of `size` bytes (§4.1)."""
    return HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A complete frame."""
    return HEADER.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame (§6.5)."""
    return frame(
        Kind.SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items())
    )


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame (§6.9). Stream 0: for the connection."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, _LONG.pack(increment))


def rst_stream(stream: int, code: int) -> bytes:
    """A RST_STREAM frame (§6.4)."""
    return frame(Kind.RST_STREAM, 0, stream, _LONG.pack(code))


def goaway(last: int, code: int, words: str = "") -> bytes:
    """A GOAWAY frame (§6.8).

    `last`: the highest stream that was or will be processed. `words`: debug data, cut to 256 bytes.
    """
    return frame(
        Kind.GOAWAY, 0, 0, _GOAWAY.pack(last, code) + words.encode("ascii", "replace")[:256]
    )


def headers(stream: int, block: bytes, size: int, *, end: bool) -> list[bytes]:
    """A header block as HEADERS, and CONTINUATION frames if it is larger than `size`."""
    flags = END_STREAM if end else 0
    if len(block) <= size:
        return [frame(Kind.HEADERS, flags | END_HEADERS, stream, block)]
    pieces = [block[at : at + size] for at in range(0, len(block), size)]
    frames = [frame(Kind.HEADERS, flags, stream, pieces[0])]
    frames += [frame(Kind.CONTINUATION, 0, stream, piece) for piece in pieces[1:-1]]
    frames.append(frame(Kind.CONTINUATION, END_HEADERS, stream, pieces[-1]))
    return frames


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Parse SETTINGS into (parameter, value), in order. Raises ConnectionFault."""
    if len(payload) % 6:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "the size of SETTINGS is not a multiple of 6")
    return list(_SETTING.iter_unpack(payload))


def read_long(payload: bytes, what: str) -> int:
    """Parse a payload that is one 32-bit number. Raises ConnectionFault for another size."""
    if len(payload) != 4:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a {what} frame of {len(payload)} bytes")
    number: int = _LONG.unpack(payload)[0]
    return number


def read_goaway(payload: bytes) -> tuple[int, int]:
    """Parse GOAWAY into (highest processed stream, error code). Raises ConnectionFault."""
    if len(payload) < 8:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a GOAWAY frame that is too short")
    last, code = _GOAWAY.unpack_from(payload)
    return last & LARGEST_WINDOW, code


def unpadded(payload: bytes, flags: int) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding. Raises ConnectionFault."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "padding that is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def without_priority(payload: bytes, flags: int, stream: int) -> bytes:
    """The payload of a HEADERS frame without its priority, which is deprecated (§5.3).

    Raises ConnectionFault, and StreamFault for a stream that depends on itself.
    """
    if not flags & PRIORITY:
        return payload
    if len(payload) < 5:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a HEADERS frame too short for its priority")
    if _LONG.unpack_from(payload)[0] & LARGEST_WINDOW == stream:
        raise StreamFault(stream, Code.PROTOCOL_ERROR, "a stream that depends on itself")
    return payload[5:]
