"""The messages of the directory channel, and their frames.

A frame is the length of a message (4 bytes, big endian) and the message in MessagePack: an array
whose first element is the number of its type. A receiver ignores further elements that it does not
know, so a later version can add fields. Other changes need a new ALPN name.

An entry has a key: `a/<IP address>` or `s/<namespace>/<name>`. Its version is a digest of its
content, so it means the same in each replica of the control plane, and after a restart. An entry
without content is not part of the mesh.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

ALPN = b"isthmus-directory/1"

# The longest message of a proxy, in bytes.
MOST_FROM_PROXY = 65536
# Keys in one message. 128 of the longest ones fit into MOST_FROM_PROXY.
MOST_KEYS = 128
MOST_KEY = 256
_HEAD = 4
_VERSION = 8

Key = Annotated[str, msgspec.Meta(min_length=3, max_length=MOST_KEY)]
Version = Annotated[bytes, msgspec.Meta(max_length=32)]
Name = Annotated[str, msgspec.Meta(max_length=253)]
_Keys = Annotated[tuple[Key, ...], msgspec.Meta(max_length=MOST_KEYS)]


class ChannelError(Exception):
    """The peer violated the protocol."""


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The base of all messages."""


class Hello(Message, frozen=True, tag=1):
    """The first message of a proxy. `node`, `zone`: where it runs; "": not known."""

    node: Name = ""
    zone: Name = ""
    pod: Name = ""


class Subscribe(Message, frozen=True, tag=2):
    """Follow entries. Each has the version that the proxy knows, or b""."""

    entries: Annotated[tuple[tuple[Key, Version], ...], msgspec.Meta(max_length=MOST_KEYS)]


class Unsubscribe(Message, frozen=True, tag=3):
    """Follow these entries no longer."""

    keys: _Keys


class Ping(Message, frozen=True, tag=4):
    """Shows that the peer is alive. Both ends send it after `heartbeat` seconds without data."""


class Welcome(Message, frozen=True, tag=5):
    """The first message of the control plane.

    `replica`: its name, for logs. `domain`: of the cluster. `networks`: those of the cluster, as
    CIDR; empty: not known. `subscriptions`: how many the proxy may have. `heartbeat` in seconds.
    """

    replica: Name
    domain: Name
    networks: tuple[str, ...]
    subscriptions: int
    heartbeat: float


class Update(Message, frozen=True, tag=6):
    """The content of an entry (views.py); b"": it is not part of the mesh, or no longer."""

    key: Key
    version: Version
    content: bytes


class Current(Message, frozen=True, tag=7):
    """The proxy's versions of these entries are current."""

    keys: _Keys


class Refused(Message, frozen=True, tag=8):
    """These entries cannot be followed. The proxy knows nothing new about them."""

    keys: _Keys
    reason: str


class Unavailable(Message, frozen=True, tag=10):
    """The control plane does not have these entries, but cannot tell now whether they exist: it is
    cut off from its own source. What the proxy knows stays. An Update follows when it is known."""

    keys: _Keys


class Goodbye(Message, frozen=True, tag=9):
    """The control plane closes the connection."""

    reason: str


FromProxy = Hello | Subscribe | Unsubscribe | Ping
FromControl = Welcome | Update | Current | Refused | Unavailable | Goodbye | Ping


_encoder = msgspec.msgpack.Encoder()
_from_proxy: msgspec.msgpack.Decoder[FromProxy] = msgspec.msgpack.Decoder(FromProxy)
_from_control: msgspec.msgpack.Decoder[FromControl] = msgspec.msgpack.Decoder(FromControl)


def version_of(content: bytes) -> bytes:
    """The version of an entry with this content."""
    return hashlib.blake2b(content, digest_size=_VERSION).digest()


def frame(message: Message) -> bytes:
    """The message as a frame."""
    data = _encoder.encode(message)
    return len(data).to_bytes(_HEAD, "big") + data


def from_proxy(data: bytes) -> FromProxy:
    """Decode a message. Raises ChannelError."""
    try:
        return _from_proxy.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ChannelError(f"a message cannot be decoded: {error}") from None


def from_control(data: bytes) -> FromControl:
    """Decode a message. Raises ChannelError."""
    try:
        return _from_control.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ChannelError(f"a message cannot be decoded: {error}") from None


class Frames:
    """Splits received bytes into messages. Holds less than one message of at most `most` bytes."""

    __slots__ = ("_held", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises ChannelError if one is empty or too long."""
        self._held += data
        found: list[bytes] = []
        start, held = 0, len(self._held)
        while held - start >= _HEAD:
            length = int.from_bytes(self._held[start : start + _HEAD], "big")
            if not 0 < length <= self._most:
                raise ChannelError(f"a message of {length} bytes; the limit is {self._most}")
            end = start + _HEAD + length
            if end > held:
                break
            found.append(bytes(self._held[start + _HEAD : end]))
            start = end
        del self._held[:start]
        return found
