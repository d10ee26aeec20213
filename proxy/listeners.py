"""The proxy's listeners, bound all together or not at all."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from proxy.config import Config
from proxy.net.accept import BindFailed, bind
from proxy.net.address import Address


class StartError(Exception):
    """The proxy cannot start. `code` is the exit code (sysexits.h)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets. Whoever serves them closes them."""

    outbound: list[socket.socket]
    inbound: list[socket.socket]
    admin: list[socket.socket]

    def ports(self) -> frozenset[int]:
        """Those that forward what they accept."""
        return frozenset(sock.getsockname()[1] for sock in (*self.outbound, *self.inbound))


def listen(config: Config) -> Listeners:
    """Bind what is configured. Raises StartError, and then nothing stays bound."""
    bound: list[socket.socket] = []

    def every(addresses: tuple[Address, ...]) -> list[socket.socket]:
        sockets = [bind(address) for address in addresses if _has_family(address)]
        bound.extend(sockets)
        return sockets

    try:
        return Listeners(every(config.outbound.listen), every(config.inbound.listen), every(config.admin.listen))
    except BindFailed as error:
        for sock in bound:
            sock.close()
        raise StartError(str(error), 69) from error


def _has_family(address: Address) -> bool:
    """Whether the kernel knows the address's family: where IPv6 is switched off, its listeners are left out."""
    if not address.is_ipv6:
        return True
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
