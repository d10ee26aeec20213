"""Many small choices from one draw of hypothesis. Each draw takes some 50 microseconds, so a list of
lists of tuples takes longer to draw than most tests take to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class Choices:
    """Choices that bytes determine. Behind their end each choice is the first option.

    Hypothesis shrinks bytes towards zeros, so the first option should be the simplest.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        size = 1 if limit <= 256 else (limit.bit_length() + 15) // 8
        piece = self.raw(size)
        return int.from_bytes(piece, "big") % limit

    def raw(self, size: int) -> bytes:
        """`size` bytes; behind the end they are zeros."""
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece.ljust(size, b"\0")

    def binary(self, most: int) -> bytes:
        return self.raw(self.below(most + 1))

    def of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some(self, most: int, make: Callable[[], T]) -> list[T]:
        """Up to `most` of what `make` gives."""
        return [make() for _ in range(self.below(most + 1))]

    def few(self, most: int, make: Callable[[], T]) -> list[T]:
        """Like `some`, but a third of `most` on average."""
        return [make() for _ in range(min(self.below(most + 1), self.below(most + 1)))]


def drawn(size: int, read: Callable[[Choices], T]) -> st.SearchStrategy[T]:
    """What `read` makes of `size` random bytes: about as many as there are choices."""
    return st.binary(min_size=size, max_size=size).map(lambda data: read(Choices(data)))
