"""HPACK (RFC 7541) by the hpack library, with a cache and rules for what enters the dynamic table.

Peers send the same header block repeatedly. If a block does not change the table, and the table has
not changed since, the block means the same as before. So the decoder caches blocks and the encoder
caches fields while the dynamic table stays the same:

    the table did not change  ->  the result is cached
    the table changed         ->  the whole cache is cleared

The table is FIFO: using an entry does not move it (§2.3.2). So a cached result can be reused
without the library.

A block is often new only because of one literal, such as a trace context. Such a block often has
nothing but indexes and literals that do not enter the table. `_recognise` decodes those blocks, or
declines. It never changes the table, so the library can still decode the block from its start.

Two kinds of fields do not enter the table. First, secrets that are short enough to guess. Many
clients share one connection to an endpoint, and one of them could find another one's secret by the
size of its own requests (§7.1.1, §7.1.3). These are Authorization and short cookies, as in nghttp2
(and so Envoy), and every field that arrived as never-indexed, because this mark must be forwarded
(§6.2.3). Second, values that are rarely sent twice: they would push out other entries, and each
insertion would clear the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import hpack
from hpack.hpack import encode_integer
from hpack.table import HeaderTable

from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.fields import Block, NeverIndexedField, Pair
from proxy.wire.h2.frames import Code, ConnectionFault

# The memory limit of the cache of one direction (bytes, including keys), by a rough upper estimate.
_REMEMBERED = 64 * 1024
# Python's overhead for a field: the tuple, two bytes objects, a slot in a list or dict.
_OVERHEAD = 256
# The largest table that a peer may make us use. §4.2 allows a smaller one than the peer's.
_LARGEST_TABLE = 4096
# A list over the limit is an error of one stream, if it can be decoded within this many times the
# limit, or within this many bytes.
_BOMB = 4
_BOMB_FROM = 256 * 1024

_NEVER = frozenset({b"authorization", b"proxy-authorization"})
_SHORT_COOKIE = 20
_WITHOUT = frozenset(
    {
        b":path",
        b"age",
        b"content-length",
        b"etag",
        b"if-modified-since",
        b"if-none-match",
        b"location",
        b"set-cookie",
    }
    | {
        b"grpc-timeout",
        b"traceparent",
        b"tracestate",
        b"uber-trace-id",
        b"x-b3-spanid",
        b"x-b3-traceid",
        b"x-request-id",
    }
)
# Those that differ in every message are not cached either.
_FLEETING = frozenset(
    {
        b"grpc-timeout",
        b"traceparent",
        b"tracestate",
        b"uber-trace-id",
        b"x-b3-spanid",
        b"x-b3-traceid",
        b"x-request-id",
    }
)
# The longest block for `_recognise`. So its result cannot become huge, whatever the table holds.
_SHORT_BLOCK = 2048
_STATIC = HeaderTable.STATIC_TABLE_MAPPING
# The size of a static table field (RFC 9113 §6.5.2) is less than this, and so is that of its name.
_SMALL_FIELD = 64
UNLIMITED = 2**62
_LITERAL_NEVER, _LITERAL_WITHOUT = 0x10, 0x00

State = tuple[int, int, object]


def _state(coder: hpack.Encoder | hpack.Decoder) -> State:
    """A value that differs after every change of the dynamic table.

    An insertion changes the newest entry; every other change affects a size. The state refers to
    the newest entry itself, not to its id, so no later entry can get the same address in memory.
    """
    table = coder.header_table
    entries = table.dynamic_entries
    return len(entries), table.maxsize, entries[0] if entries else None


def _same(one: State, other: State) -> bool:
    return one[0] == other[0] and one[1] == other[1] and one[2] is other[2]


def _recognise(block: bytes, table: HeaderTable) -> list[Pair] | None:
    """Decode a block of indexes and uncompressed literals that do not enter the table.

    None: the block is of another kind.
    """
    static, dynamic = HeaderTable.STATIC_TABLE, table.dynamic_entries
    known = len(static) + len(dynamic)
    pairs: list[Pair] = []
    at = 0
    try:
        while at < len(block):
            first = block[at]
            at += 1
            if first >= 0x80:
                index = first & 0x7F
                if index == 0x7F or not 0 < index <= known:
                    return None
                pairs.append(
                    static[index - 1] if index <= len(static) else dynamic[index - len(static) - 1]
                )
                continue
            if first >= 0x20:
                return None
            index = first & 0x0F
            if index == 0x0F:
                index += block[at]
                at += 1
            if index > len(static):
                return None
            if index:
                name = static[index - 1][0]
            else:
                name, at = _text(block, at)
            value, at = _text(block, at)
            pairs.append(NeverIndexedField((name, value)) if first & 0x10 else (name, value))
    except (IndexError, _NotPlain):
        return None
    return pairs


class _NotPlain(Exception):
    """A string is compressed, truncated, or so long that its length needs three bytes."""


def _text(block: bytes, at: int) -> tuple[bytes, int]:
    size = block[at]
    at += 1
    if size == 0x7F:
        size += block[at] & 0x7F
        if block[at] >= 0x80:
            at += 1
            size += block[at] << 7
        at += 1
    end = at + size
    if block[at - 1] >= 0x80 or end > len(block):
        raise _NotPlain
    return block[at:end], end


def hard_limit(limit: int) -> int:
    """The largest header block, or list, that is still decoded (bytes).

    It only keeps the table in sync. `limit` is the largest list that may be used.
    """
    return max(limit * _BOMB, _BOMB_FROM)


class Decoder:
    """Decodes the header blocks of one direction of a connection.

    Raises ConnectionFault for a block that cannot be decoded: then the table is out of sync, and
    the connection must end (§4.1).
    """

    __slots__ = ("_held", "_hpack", "_known", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hpack = hpack.Decoder(max_header_list_size=hard_limit(limit))
        self._known: dict[bytes, Block] = {}
        self._held = 0

    def decode(self, block: bytes) -> Sequence[Pair] | None:
        """Return the header list; None: it is over the limit (bytes, as in RFC 9113 §6.5.2)."""
        known = self._known.get(block)
        if known is not None:
            return known
        pairs = _recognise(block, self._hpack.header_table) if len(block) <= _SHORT_BLOCK else None
        changed = False
        if pairs is None:
            before = _state(self._hpack)
            pairs = self._decode(block)
            changed = not _same(_state(self._hpack), before)
        size = sum([len(name) + len(value) + 32 for name, value in pairs])
        if changed:
            self._known.clear()
            self._held = 0
        elif size <= self._limit:
            self._remember(block, pairs, size)
        return pairs if size <= self._limit else None

    def _decode(self, block: bytes) -> list[Pair]:
        try:
            decoded = self._hpack.decode(block, raw=True)
        except hpack.OversizedHeaderListError as error:
            raise ConnectionFault(
                Code.ENHANCE_YOUR_CALM, f"a header list far over the limit: {error}"
            ) from error
        except hpack.HPACKError as error:
            raise ConnectionFault(
                Code.COMPRESSION_ERROR, f"a header block that cannot be decoded: {error}"
            ) from error
        return [
            (bytes(f[0]), bytes(f[1]))
            if f.indexable
            else NeverIndexedField((bytes(f[0]), bytes(f[1])))
            for f in decoded
        ]

    def _remember(self, block: bytes, pairs: Sequence[Pair], listed: int) -> None:
        # Huffman coding at most doubles (nearly) a literal's bytes. Indexed values belong to the
        # table. But the parsed head may hold copies of them, because cookies are joined. `listed`
        # covers these.
        size = 3 * len(block) + _OVERHEAD * (len(pairs) + 4) + listed
        if size > _REMEMBERED // 8:
            return
        if self._held + size > _REMEMBERED:
            self._known.clear()
            self._held = 0
        self._known[block] = Block(pairs)
        self._held += size


class Encoder:
    """Encodes the header blocks of one direction of a connection, in the order of sending."""

    __slots__ = ("_held", "_hpack", "_known", "_largest", "_sizes")

    def __init__(self) -> None:
        self._hpack = hpack.Encoder()
        self._known: dict[Pair, bytes] = {}
        self._held = 0
        self._sizes: tuple[int, int] | None = None  # the smallest and the last new table size
        self._largest = _SMALL_FIELD  # upper limit of a field's size beyond its bytes in a block

    def encode(self, pairs: Sequence[Pair], limit: int = UNLIMITED) -> bytes:
        """Encode a header block.

        Raises HeadTooLarge if the list is over `limit` (bytes, as in RFC 9113 §6.5.2). Then nothing
        may be sent, and the next block clears the table, which may have changed.
        """
        known = self._known
        pieces = [self._resized()] if self._sizes is not None else []
        for pair in pairs:
            # A NeverIndexedField is equal to a plain tuple, but must not use its cache entry.
            piece = known.get(pair) if type(pair) is tuple else None
            pieces.append(self._field(pair) if piece is None else piece)
        block = b"".join(pieces)
        # A quick estimate: usually the list cannot exceed the limit, so its size need not be
        # counted.
        if len(block) + len(pairs) * self._largest > limit:
            self._check(pairs, limit)
        return block

    def _check(self, pairs: Sequence[Pair], limit: int) -> None:
        size = sum([len(name) + len(value) + 32 for name, value in pairs])
        if size > limit:
            self._sizes = (0, self._hpack.header_table_size)
            raise HeadTooLarge(f"a header list of {size} bytes, over the peer's limit of {limit}")

    def _field(self, pair: Pair) -> bytes:
        name, value = pair
        static = _STATIC.get(name)
        if (
            isinstance(pair, NeverIndexedField)
            or name in _NEVER
            or (name == b"cookie" and len(value) < _SHORT_COOKIE)
        ):
            piece = _literal(_LITERAL_NEVER, static[0] if static else 0, name, value)
        elif (static is None or value not in static[1]) and self._not_worth_it(name, value):
            piece = _literal(_LITERAL_WITHOUT, static[0] if static else 0, name, value)
        else:
            before = _state(self._hpack)
            self._largest = max(self._largest, len(name) + len(value) + 32)
            piece = self._hpack.add((name, value), sensitive=False, huffman=True)
            if not _same(_state(self._hpack), before):
                self._known.clear()
                self._held = 0
                return piece
        if type(pair) is tuple and name not in _FLEETING:
            self._remember(pair, piece)
        return piece

    def _not_worth_it(self, name: bytes, value: bytes) -> bool:
        """Whether the field is rarely sent twice, or would fill most of the table."""
        return (
            name in _WITHOUT
            or (len(name) + len(value) + 32) * 4 > self._hpack.header_table_size * 3
        )

    def _remember(self, pair: Pair, piece: bytes) -> None:
        size = len(pair[0]) + len(pair[1]) + len(piece) + _OVERHEAD
        if size > _REMEMBERED // 8:
            return
        if self._held + size > _REMEMBERED:
            self._known.clear()
            self._held = 0
        self._known[pair] = piece
        self._held += size

    def resize(self, size: int) -> None:
        """Apply the peer's SETTINGS_HEADER_TABLE_SIZE (bytes).

        It may change several times before the next block.
        """
        size = min(size, _LARGEST_TABLE)
        self._sizes = (min(size, self._sizes[0]) if self._sizes is not None else size, size)

    def _resized(self) -> bytes:
        """Encode size updates before the next block: the smallest, then the last size (§4.2)."""
        for size in self._sizes or ():
            # Do not set an equal size: the library would then forget the pending update.
            if size != self._hpack.header_table_size:
                self._hpack.header_table_size = size
        self._sizes = None
        self._known.clear()
        self._held = 0
        return self._hpack.encode([])


def _literal(kind: int, index: int, name: bytes, value: bytes) -> bytes:
    """A literal that does not enter the table (§6.2.2, §6.2.3).

    It has no Huffman coding, which would cost more than the bytes that it saves.
    """
    head = encode_integer(index, 4)
    head[0] |= kind
    if not index:
        head += encode_integer(len(name), 7) + name
    return bytes(head + encode_integer(len(value), 7) + value)
