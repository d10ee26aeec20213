"""Our own connections, known to all workers of a proxy: a table in memory that they share.

A connection of ours that comes back to us (loopguard/nesting.py) comes back to any worker, since the kernel divides connections by a hash.
One that asked only itself would take most of them for the application's, and the commonest of all misconfigurations, a proxy whom its own
redirection does not exempt, would be a storm again.

Each worker has a part of its own and reads in all of them. There is no lock: an entry is one word of eight bytes. 56 bits of it say whose
it is, 7 how deep it lies, and one that it was stopped as a loop. Other workers than the owner set that bit, and no other one. If the owner
writes at that very moment, the older entry stays in its place until the next one there. The place and the 56 bits are a digest, with the
workers' secret, of both ends of the connection; nobody can choose ends that meet. Two connections that want the same place are the price:
the older one is forgotten by the other workers, not by its own worker, which asks its own exact table first, and a loop that goes over it
has one round more. A worker's part is wiped when the worker is gone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from hashlib import blake2b

from proxy.net.address import Address

# Of each worker; with ten thousand connections open, one in four is not seen by the others.
_PLACES = 1 << 15
_WORD = 8
_STOPPED = 0x80
_DEPTH = 0x7F

Ends = tuple[Address, Address]


def make(workers: int) -> int:
    """Memory for this many workers, empty; the caller closes the descriptor."""
    descriptor = os.memfd_create("isthmus-connections")
    os.ftruncate(descriptor, workers * _PLACES * _WORD)
    return descriptor


def wipe(descriptor: int, worker: int) -> None:
    """Forget what a worker, counted from 1, has left. Nobody writes there now."""
    os.pwrite(descriptor, bytes(_PLACES * _WORD), (worker - 1) * _PLACES * _WORD)


class SharedConnectionTable:
    """The table of one worker, and what it sees of the others' (loopguard.nesting.ConnectionTable)."""

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
