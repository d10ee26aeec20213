"""The addresses of this network namespace, from the kernel's tables."""

from __future__ import annotations

import ipaddress
from pathlib import Path

_PROC = Path("/proc/net")


def local_addresses(proc: Path = _PROC) -> frozenset[str]:
    """The addresses of all interfaces except loopback, of both families. Empty without /proc.

    IPv4: the `/32 host LOCAL` leaves of the routing trie; each follows the line with its address.
    IPv6: one line for each address.
    """
    found: set[str] = set()
    try:
        leaf = ""
        for line in (proc / "fib_trie").read_text("ascii").splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == "|--":
                leaf = words[1]
            elif words[:3] == ["/32", "host", "LOCAL"]:
                found.add(leaf)
    except OSError:
        pass
    try:
        for line in (proc / "if_inet6").read_text("ascii").splitlines():
            found.add(str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))))
    except OSError:
        pass
    return frozenset(host for host in found if not ipaddress.ip_address(host).is_loopback)
