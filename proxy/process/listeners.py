"""The proxy's listeners, bound all together or not at all."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from proxy.config.resolv_conf import Resolvers
from proxy.config.schema import Config
from proxy.errors import StartError
from proxy.net.accept import BindFailed, bind, bind_datagrams
from proxy.net.address import Address
from proxy.net.liveness import Liveness


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets. Their server closes them. A gateway has no outbound listeners; `inbound` holds
    its gateway port.
    """

    outbound: list[socket.socket]
    inbound: list[socket.socket]
    admin: list[socket.socket]
    names: list[socket.socket]  # DNS over TCP
    datagrams: list[tuple[socket.socket, Address]]  # DNS over UDP, each with its upstream resolver

    def ports(self) -> frozenset[int]:
        """The ports whose connections are forwarded."""
        return frozenset(
            sock.getsockname()[1] for sock in (*self.outbound, *self.inbound, *self.names)
        )

    def close(self) -> None:
        """Close the sockets of the traffic, which has no server yet."""
        for sock in (*self.outbound, *self.inbound, *self.names):
            sock.close()
        for sock, _ in self.datagrams:
            sock.close()


def listen(config: Config, liveness: Liveness, resolvers: Resolvers | None = None) -> Listeners:
    """Bind the configured listeners. With `config.workers`, bind them shared with the other
    workers. Raises StartError; then none stays bound.
    """
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
            return Listeners(
                [], every(config.gateway.listen), every(config.admin.listen), names=[], datagrams=[]
            )
        traffic = (
            every(config.outbound.listen),
            every(config.inbound.listen),
            every(config.admin.listen),
        )
        if config.dns is None or resolvers is None:
            return Listeners(*traffic, names=[], datagrams=[])
        names = every(config.dns.listen)
        datagrams = []
        for address, upstream in resolvers.listen_addresses(config.dns):
            if has_family(address):
                bound.append(bind_datagrams(address, shared=shared))
                datagrams.append((bound[-1], upstream))
        return Listeners(*traffic, names, datagrams)
    except BindFailed as error:
        for sock in bound:
            sock.close()
        raise StartError(str(error), 69) from error


def has_family(address: Address) -> bool:
    """Whether the kernel supports the address family. Without IPv6, its listeners are left out."""
    if not address.is_ipv6:
        return True
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
