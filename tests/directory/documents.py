"""Directories of the tests."""

from __future__ import annotations


def large(services: int) -> str:
    """A directory of that many services with five endpoints each."""
    lines = ["services:"]
    for number in range(services):
        lines.append(
            f"- {{name: s-{number}, addresses: [10.64.{number >> 8}.{number & 255}], ports:"
            " [{port: 80}], endpoints: ["
        )
        lines += [
            f"  {{address: 10.128.{pod >> 8}.{pod & 255}, identity:"
            f" spiffe://cluster.local/ns/default/sa/s-{number}}},"
            for pod in range(number * 5, number * 5 + 5)
        ]
        lines.append("]}")
    return "\n".join(lines)
