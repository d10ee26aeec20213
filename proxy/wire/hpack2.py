"""HPACK (RFC 7541) by the hpack library, with a memory in front of it.

Peers send the same header block again and again, and a block that neither reads nor changes anything but a table that has not
changed since means what it meant before. So each direction remembers blocks, as long as its dynamic table stays as it is:

    a block that left the table unchanged  ->  remembered
    a block that changed the table         ->  everything that was remembered is forgotten

The table is FIFO: using an entry does not move it (§2.3.2). So remembered blocks can be replayed without the library seeing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import hpack

from proxy.wire.fields2 import Pair
from proxy.wire.frames2 import Code, ConnectionFault

# What is remembered of one direction: more kinds of messages than one peer usually sends, and none that is unusually large, so that
# a connection's memory stays some tens of KiB whatever its peer sends.
_REMEMBERED = 64
_LARGEST_BLOCK = 1024
_MOST_FIELDS = 64

State = tuple[int, int, object]


def _state(coder: hpack.Encoder | hpack.Decoder) -> State:
    """Something that is different after every change of the dynamic table: an insertion makes another entry the newest one, everything
    else changes a size. The newest entry is held, not just named by its id, so that no later one can take its place in memory."""
    table = coder.header_table
    entries = table.dynamic_entries
    return len(entries), table.maxsize, entries[0] if entries else None


def _same(one: State, other: State) -> bool:
    return one[0] == other[0] and one[1] == other[1] and one[2] is other[2]


class Decoder:
    """Raises ConnectionFault for what cannot be decoded: the table is lost then, and the connection with it (§4.1)."""

    __slots__ = ("_hpack", "_known")

    def __init__(self, limit: int) -> None:
        self._hpack = hpack.Decoder(max_header_list_size=limit)
        self._known: dict[bytes, Sequence[Pair]] = {}

    def decode(self, block: bytes) -> Sequence[Pair]:
        known = self._known.get(block)
        if known is not None:
            return known
        before = _state(self._hpack)
        try:
            pairs = [(bytes(name), bytes(value)) for name, value in self._hpack.decode(block, raw=True)]
        except hpack.OversizedHeaderListError as error:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"a header list over the limit: {error}") from error
        except hpack.HPACKError as error:
            raise ConnectionFault(Code.COMPRESSION_ERROR, f"a header block that cannot be decoded: {error}") from error
        if not _same(_state(self._hpack), before):
            self._known.clear()
        elif len(block) <= _LARGEST_BLOCK and len(pairs) <= _MOST_FIELDS:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[block] = pairs
        return pairs


class Encoder:
    __slots__ = ("_hpack", "_known", "_resized")

    def __init__(self) -> None:
        self._hpack = hpack.Encoder()
        self._resized = False
        self._known: dict[tuple[Pair, ...], bytes] = {}

    def encode(self, pairs: Sequence[Pair]) -> bytes:
        key = tuple(pairs)
        known = self._known.get(key)
        if known is not None:
            return known
        before = _state(self._hpack)
        block = self._hpack.encode(pairs)
        if self._resized or not _same(_state(self._hpack), before):
            self._resized = False
            self._known.clear()
        elif len(block) <= _LARGEST_BLOCK:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = block
        return block

    def resize(self, size: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE, in bytes. The next block begins with it, so that one cannot be a remembered one."""
        self._hpack.header_table_size = min(size, 4096)
        self._known.clear()
        self._resized = True
