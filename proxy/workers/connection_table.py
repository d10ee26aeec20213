"""The proxy's own open connections, in a table in memory that all workers share.

If one of our connections comes back to us (loopguard/nesting.py), it can arrive at any worker: the
kernel distributes connections by a hash. A worker that knew only its own connections would take
most of the others for the application's. Then the most common misconfiguration, a proxy that is not
exempt from its own redirection, would create a storm again.

Each worker writes its own part and reads all parts. There is no lock: an entry is one word of eight
bytes. 56 bits identify the connection, 7 bits hold its depth, one bit says that it was stopped as a
loop. Other workers set only that bit. If the owner writes at the same moment, the older entry may
stay in its place until the next write there. The place and the 56 bits are a keyed digest of both
ends of the connection, so an attacker cannot choose ends that collide. If two connections collide,
the other workers forget the older one; its own worker does not, because it asks its exact table
first. A loop over that connection then makes one more round. A worker's part is cleared when the
worker has ended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from hashlib import blake2b

from proxy.net.address import Address

# Entries per worker. With ten thousand open connections, the other workers do not see one in four.
_PLACES = 1 << 15
_WORD = 8
_STOPPED = 0x80
_DEPTH = 0x7F

Ends = tuple[Address, Address]


def make(workers: int) -> int:
    """Create empty shared memory for this many workers. The caller closes the descriptor."""
    descriptor = os.memfd_create("isthmus-connections")
    os.ftruncate(descriptor, workers * _PLACES * _WORD)
    return descriptor


def wipe(descriptor: int, worker: int) -> None:
    """Clear the part of a worker, counted from 1. No process may be writing there."""
    os.pwrite(descriptor, bytes(_PLACES * _WORD), (worker - 1) * _PLACES * _WORD)


class SharedConnectionTable:
    """One worker's table, which also reads the other workers' parts
    (loopguard.nesting.ConnectionTable).
    """

    def __init__(self, descriptor: int, worker: int, secret: bytes) -> None:
        self._words = memoryview(mmap.mmap(descriptor, 0)).cast("Q")
        self._first = (worker - 1) * _PLACES
        self._secret = secret
        self._own: dict[Ends, int] = {}

    def __setitem__(self, ends: Ends, depth: int) -> None:
        self._own[ends] = depth
        place, mark = self._where(ends)
        self._words[self._first + place] = mark | min(depth, _DEPTH)

    def pop(self, ends: Ends, default: None) -> int | None:
        place, mark = self._where(ends)
        if self._words[self._first + place] & ~0xFF == mark:
            self._words[self._first + place] = 0
        return self._own.pop(ends, default)

    def get(self, ends: Ends, default: int) -> int:
        found = self._own.get(ends)
        if found is not None:
            return found
        place, mark = self._where(ends)
        return next((word & _DEPTH for word in self._at(place) if word & ~0xFF == mark), default)

    def stop(self, ends: Ends) -> None:
        place, mark = self._where(ends)
        for index in range(place, len(self._words), _PLACES):
            if self._words[index] & ~0xFF == mark:
                self._words[index] |= _STOPPED

    def stopped(self, ends: Ends) -> bool:
        place, mark = self._where(ends)
        word = self._words[self._first + place]
        return word & ~0xFF == mark and bool(word & _STOPPED)

    def __len__(self) -> int:
        return len(self._own)

    def _at(self, place: int) -> Iterator[int]:
        return (self._words[index] for index in range(place, len(self._words), _PLACES))

    def _where(self, ends: Ends) -> tuple[int, int]:
        text = f"{ends[0]} {ends[1]}".encode()
        digest = int.from_bytes(blake2b(text, digest_size=10, key=self._secret).digest(), "big")
        return digest >> 56 & (_PLACES - 1), (digest & (1 << 56) - 1) << 8 or 1 << 8
