"""Keys by their addresses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

K = TypeVar("K")


class Index(Generic[K]):
    """Which keys have an address. It is nearly always one key."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of: dict[str, tuple[K, ...]] = {}

    def move(self, key: K, before: Iterable[str], after: Iterable[str]) -> set[str]:
        """Replace the addresses of `key`. Returns the addresses that were added or removed."""
        old, new = set(before), set(after)
        for address in old - new:
            left = tuple(other for other in self._of[address] if other != key)
            if left:
                self._of[address] = left
            else:
                del self._of[address]
        for address in new - old:
            self._of[address] = (*self._of.get(address, ()), key)
        return old ^ new

    def at(self, address: str) -> tuple[K, ...]:
        """The keys that have `address`."""
        return self._of.get(address, ())
