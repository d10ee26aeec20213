"""Network addresses as values.

An address is always a literal: names are resolved before a connection reaches this package. A
socket that was opened for IPv6 may report an IPv4 peer as `::ffff:10.0.0.1` (RFC 4291, section
2.5.5.2). Other code compares addresses, so the mapped form is unwrapped here, and used nowhere
else.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple, Self


class Address(NamedTuple):
    """An IP literal and a port. `str()` returns `10.0.0.1:80` or `[fd00::1]:80`.

    `host` has no brackets. IPv4-mapped IPv6 is already unwrapped.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `10.0.0.1:80` or `[fd00::1]:80`. Raises ValueError with the text and the reason."""
        host, colon, digits = text.rpartition(":")
        if not colon:
            raise ValueError(
                f"{text!r} is not an address: no port (expected 10.0.0.1:80 or [fd00::1]:80)"
            )
        if not (digits.isascii() and digits.isdigit() and int(digits) <= 65535):
            raise ValueError(f"{text!r} is not an address: {digits!r} is not a port (0 to 65535)")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            literal = ipaddress.ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            raise ValueError(
                f"{text!r} is not an address: {host!r} is not an IP literal (names are not resolved"
                " here)"
            ) from None
        if bracketed != (literal.version == 6):
            raise ValueError(
                f"{text!r} is not an address: IPv6 needs brackets, IPv4 must not have them"
            )
        if isinstance(literal, ipaddress.IPv6Address) and literal.ipv4_mapped is not None:
            literal = literal.ipv4_mapped
        return cls(str(literal), int(digits))

    @classmethod
    def of(cls, sockaddr: tuple[str, int] | tuple[str, int, int, int]) -> Self:
        """Convert what getpeername(), getsockname() or accept() returns."""
        host = sockaddr[0]
        if ":" in host and "." in host:  # mapped; or "::1.2.3.4", as inet_ntop writes ::102:304
            literal = ipaddress.IPv6Address(host)
            host = str(literal.ipv4_mapped or literal)
        return cls(host, sockaddr[1])
