"""HPACK (RFC 7541) by the hpack library, with a memory in front of it, and a choice of what is worth a place in the table.

Peers send the same header block again and again, and a block that neither reads nor changes anything but a table that has not
changed since means what it meant before. So the decoder remembers blocks, and the encoder fields, as long as the dynamic table stays
as it is:

    what left the table unchanged  ->  remembered
    what changed the table         ->  everything that was remembered is forgotten

The table is FIFO: using an entry does not move it (§2.3.2). So what is remembered can be replayed without the library seeing it.

A block that is new because of one literal (a trace context is in every request) is often made of nothing else but indexes and literals
that have no place in the table. `_recognise` reads those blocks, or declines without an opinion: it touches no table, so the library
can still read the block from its beginning.

What is sent without a place in the table. Secrets that are short enough to be guessed, because many clients share one connection to
an endpoint, and one of them could find another's secret by the size of its own requests (§7.1.1, §7.1.3): Authorization and short
cookies, as nghttp2 (and so Envoy) has it, and whatever was received marked as never to be indexed, because the mark has to be passed
on (§6.2.3). And values that are hardly ever sent twice: they would push out the others, and the memory would never hit.
"""

from __future__ import annotations

from collections.abc import Sequence

import hpack
from hpack.hpack import encode_integer
from hpack.table import HeaderTable

from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.fields import Block, Pair, Secret
from proxy.wire.h2.frames import Code, ConnectionFault

# How many bytes the memory of one direction may take, keys and all, by a rough count from above.
_REMEMBERED = 64 * 1024
# Of Python's own for a field: the tuple, two bytes objects, a place in a list or dict.
_OVERHEAD = 256
# What a peer may have us use for its table (§4.2 lets us use less).
_LARGEST_TABLE = 4096
# A list over the limit is one stream's fault, as long as it can be decoded at all within so many times the limit, or so many bytes.
_BOMB = 4
_BOMB_FROM = 256 * 1024

_NEVER = frozenset({b"authorization", b"proxy-authorization"})
_SHORT_COOKIE = 20
_WITHOUT = frozenset(
    {b":path", b"age", b"content-length", b"etag", b"if-modified-since", b"if-none-match", b"location", b"set-cookie"}
    | {b"grpc-timeout", b"traceparent", b"tracestate", b"uber-trace-id", b"x-b3-spanid", b"x-b3-traceid", b"x-request-id"}
)
# Of those, what is different in every message is not remembered either.
_FLEETING = frozenset(
    {b"grpc-timeout", b"traceparent", b"tracestate", b"uber-trace-id", b"x-b3-spanid", b"x-b3-traceid", b"x-request-id"}
)
# What is recognised is no longer than this: it cannot become a bomb, whatever the table holds.
_SHORT_BLOCK = 2048
_STATIC = HeaderTable.STATIC_TABLE_MAPPING
# A field of the static table counts for less than this (§6.5.2 of RFC 9113), and so does the name of one.
_SMALL_FIELD = 64
UNLIMITED = 2**62
_LITERAL_NEVER, _LITERAL_WITHOUT = 0x10, 0x00

State = tuple[int, int, object]


def _state(coder: hpack.Encoder | hpack.Decoder) -> State:
    """Something that is different after every change of the dynamic table: an insertion makes another entry the newest one, everything
    else changes a size. The newest entry is held, not just named by its id, so that no later one can take its place in memory."""
    table = coder.header_table
    entries = table.dynamic_entries
    return len(entries), table.maxsize, entries[0] if entries else None


def _same(one: State, other: State) -> bool:
    return one[0] == other[0] and one[1] == other[1] and one[2] is other[2]


def _recognise(block: bytes, table: HeaderTable) -> list[Pair] | None:
    """The fields of a block of indexes and of uncompressed literals that leave the table alone; None for any other block."""
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
                pairs.append(static[index - 1] if index <= len(static) else dynamic[index - len(static) - 1])
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
            pairs.append(Secret((name, value)) if first & 0x10 else (name, value))
    except (IndexError, _NotPlain):
        return None
    return pairs


class _NotPlain(Exception):
    """A string that is compressed, cut off, or so long that it takes three bytes to say so."""


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
    """Bytes of a header block, or of its list, that are still decoded, for the sake of the table, where `limit` is what may be used."""
    return max(limit * _BOMB, _BOMB_FROM)


class Decoder:
    """Raises ConnectionFault for what cannot be decoded: the table is lost then, and the connection with it (§4.1)."""

    __slots__ = ("_held", "_hpack", "_known", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hpack = hpack.Decoder(max_header_list_size=hard_limit(limit))
        self._known: dict[bytes, Block] = {}
        self._held = 0

    def decode(self, block: bytes) -> Sequence[Pair] | None:
        """The header list; None if it is over the limit (bytes, counted as in RFC 9113 §6.5.2)."""
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
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"a header list far over the limit: {error}") from error
        except hpack.HPACKError as error:
            raise ConnectionFault(Code.COMPRESSION_ERROR, f"a header block that cannot be decoded: {error}") from error
        return [(bytes(f[0]), bytes(f[1])) if f.indexable else Secret((bytes(f[0]), bytes(f[1]))) for f in decoded]

    def _remember(self, block: bytes, pairs: Sequence[Pair], listed: int) -> None:
        # A literal's bytes are no more than its block's, nearly doubled by Huffman's code. The values of indexed fields are the table's
        # own; but what the block is read as may hold them again, as often as they stand in it: cookies are joined.
        size = 3 * len(block) + _OVERHEAD * (len(pairs) + 4) + listed
        if size > _REMEMBERED // 8:
            return
        if self._held + size > _REMEMBERED:
            self._known.clear()
            self._held = 0
        self._known[block] = Block(pairs)
        self._held += size


class Encoder:
    """The header blocks of one direction of a connection, in the order in which they are sent."""

    __slots__ = ("_held", "_hpack", "_known", "_largest", "_sizes")

    def __init__(self) -> None:
        self._hpack = hpack.Encoder()
        self._known: dict[Pair, bytes] = {}
        self._held = 0
        self._sizes: tuple[int, int] | None = None  # the smallest and the last table size that was set since the last block
        self._largest = _SMALL_FIELD  # no field counts for more than this beyond its bytes in a block

    def encode(self, pairs: Sequence[Pair], limit: int = UNLIMITED) -> bytes:
        """A header block. Raises HeadTooLarge if the list is over `limit` (bytes, counted as in RFC 9113 §6.5.2); then nothing is to be
        sent, and the next block clears the table, which may have changed."""
        known = self._known
        pieces = [self._resized()] if self._sizes is not None else []
        for pair in pairs:
            # A Secret equals the same field that is none.
            piece = known.get(pair) if type(pair) is tuple else None
            pieces.append(self._field(pair) if piece is None else piece)
        block = b"".join(pieces)
        if len(block) + len(pairs) * self._largest > limit:  # it cannot be otherwise, so the fields need not be counted
            self._check(pairs, limit)
        return block

    def _check(self, pairs: Sequence[Pair], limit: int) -> None:
        size = sum([len(name) + len(value) + 32 for name, value in pairs])
        if size > limit:
            self._sizes = (0, self._hpack.header_table_size)
            raise HeadTooLarge(f"a header list of {size} bytes, and the peer takes {limit} (SETTINGS_MAX_HEADER_LIST_SIZE)")

    def _field(self, pair: Pair) -> bytes:
        name, value = pair
        static = _STATIC.get(name)
        if isinstance(pair, Secret) or name in _NEVER or (name == b"cookie" and len(value) < _SHORT_COOKIE):
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
        """Hardly ever sent twice, or so large that the table would hold little else."""
        return name in _WITHOUT or (len(name) + len(value) + 32) * 4 > self._hpack.header_table_size * 3

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
        """The peer's SETTINGS_HEADER_TABLE_SIZE, in bytes; it may come many times before the next block."""
        size = min(size, _LARGEST_TABLE)
        self._sizes = (min(size, self._sizes[0]) if self._sizes is not None else size, size)

    def _resized(self) -> bytes:
        """What the next block begins with: the smallest size since the last one, then the last one (§4.2)."""
        for size in self._sizes or ():
            # Not setting the same size again: the library would forget that there is something to say.
            if size != self._hpack.header_table_size:
                self._hpack.header_table_size = size
        self._sizes = None
        self._known.clear()
        self._held = 0
        return self._hpack.encode([])


def _literal(kind: int, index: int, name: bytes, value: bytes) -> bytes:
    """A literal that has no place in the table (§6.2.2, §6.2.3). Not Huffman-coded: that would cost more than the bytes it saves."""
    head = encode_integer(index, 4)
    head[0] |= kind
    if not index:
        head += encode_integer(len(name), 7) + name
    return bytes(head + encode_integer(len(value), 7) + value)
