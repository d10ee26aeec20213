"""The ways in which one stream of bytes can arrive. A reader must give the same result for all of
them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at the given places (any order, taken modulo the length); no piece is
    empty."""
    at = sorted({place % len(data) for place in places} - {0}) if data else []
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if a < b]


def halves(data: bytes) -> Iterator[list[bytes]]:
    """Every way to cut `data` once."""
    for place in range(1, len(data)):
        yield [data[:place], data[place:]]


def at_random(data: bytes, seed: int, pieces: int = 8) -> list[bytes]:
    source = random.Random(seed)
    return cut(data, [source.randrange(len(data)) for _ in range(pieces)]) if data else []


def every_way(data: bytes, run: Callable[[list[bytes]], T]) -> T:
    """The result of `run` for `data` in pieces. Asserts that it is the same whole, byte by byte,
    and cut at random."""
    whole = run([data] if data else [])
    assert run(byte_by_byte(data)) == whole, "byte by byte"
    for seed in range(4):
        assert run(at_random(data, seed)) == whole, f"cut at random ({seed})"
    return whole
