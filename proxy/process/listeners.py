"""The proxy's listeners, bound all together or not at all."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from proxy.config.load import Config
from proxy.config.resolv_conf import Resolvers
from proxy.errors import StartError
from proxy.net.accept import BindFailed, bind, bind_datagrams
from proxy.net.address import Address
from proxy.net.liveness import Liveness


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets. Whoever serves them closes them. A gateway has no outbound side, and its way in is its inbound one."""

    outbound: list[socket.socket]
    inbound: list[socket.socket]
    admin: list[socket.socket]
    names: list[socket.socket]  # DNS over TCP
    datagrams: list[tuple[socket.socket, Address]]  # DNS over UDP, and the resolver that each socket stands for

    def ports(self) -> frozenset[int]:
        """Those that forward what they accept."""
        return frozenset(sock.getsockname()[1] for sock in (*self.outbound, *self.inbound, *self.names))


def listen(config: Config, liveness: Liveness, resolvers: Resolvers | None = None) -> Listeners:
    """Bind what is configured; as one of several workers (`config.workers`) together with the others. Raises StartError, and then nothing
    stays bound."""
    shared = config.workers > 1
    bound: list[socket.socket] = []

    def every(addresses: tuple[Address, ...]) -> list[socket.socket]:
        sockets = [bind(address, shared=shared) for address in addresses if has_family(address)]
        bound.extend(sockets)
        for sock in sockets:
            liveness.prepare(sock)
        return sockets

    try:
        if config.gateway.enabled:
            return Listeners([], every(config.gateway.listen), every(config.admin.listen), names=[], datagrams=[])
        traffic = every(config.outbound.listen), every(config.inbound.listen), every(config.admin.listen)
        if config.dns is None or resolvers is None:
            return Listeners(*traffic, names=[], datagrams=[])
        names = every(config.dns.listen)
        datagrams = []
        for address, upstream in resolvers.ways_in(config.dns):
            if has_family(address):
                bound.append(bind_datagrams(address, shared=shared))
                datagrams.append((bound[-1], upstream))
        return Listeners(*traffic, names, datagrams)
    except BindFailed as error:
        for sock in bound:
            sock.close()
        raise StartError(str(error), 69) from error


def has_family(address: Address) -> bool:
    """Whether the kernel knows the address's family: where IPv6 is switched off, its listeners are left out."""
    if not address.is_ipv6:
        return True
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
