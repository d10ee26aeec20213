"""Samples of a metrics exposition."""

from __future__ import annotations


def samples(text: bytes) -> dict[str, float]:
    """The samples by name and labels."""
    return {
        name: float(value)
        for name, _, value in (
            line.rpartition(" ")
            for line in text.decode().splitlines()
            if line and not line.startswith("#")
        )
    }
