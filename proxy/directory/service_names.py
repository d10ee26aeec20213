"""Names of services: all the ways in which an application may write one, and which service each of them means.

Kubernetes lets a pod write a service `c` of the namespace `shop` as

    c                             within the namespace itself
    c.shop
    c.shop.svc
    c.shop.svc.cluster.local      with the cluster's own domain; a dot may stand behind it

each in any case, with or without a port. A service of another cluster, say `east`, can be written as the service that mirrors it here
would be, in all these forms, or with the cluster's name behind a dot:

    c-east, c-east.shop, c-east.shop.svc, c-east.shop.svc.cluster.local
    c.east                        of our own namespace
    c.shop.east

Some names can be read in two ways. The order is: a service of our own cluster of exactly that name; a mirror's name; a cluster behind a
dot. So nothing that works without the mesh changes its meaning when a cluster is added.

One dictionary holds them all, in which a mirror stands as `c-east.shop` and a dotted name as `c.shop.east`; a name that leaves its
namespace out is completed and looked up again. That makes at most three look-ups, however many services there are.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

T = TypeVar("T")

# RFC 1123: what Kubernetes accepts as a name of a service or namespace.
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z")
# RFC 1035 §2.3.4: a name has 253 bytes in its written form.
LONGEST = 253

_PORT = re.compile(r"[0-9]{1,5}\Z")


def mirror_name(name: str, cluster: str) -> str:
    """What a service of another cluster is called here, if it is written like one of our own."""
    return f"{name}-{cluster}"


def full_name(name: str, namespace: str, domain: str) -> str:
    """The service's name in its own cluster, complete."""
    return f"{name}.{namespace}.svc.{domain}"


class Names(Generic[T]):
    """The names of one snapshot. To be filled with our own services first; `find` never fails."""

    def __init__(self, domain: str = "cluster.local") -> None:
        self.domain = domain  # of our own cluster
        self._svc = f".svc.{domain}"
        self._found: dict[str, T] = {}

    def add(self, name: str, namespace: str, service: T) -> None:
        """A service of our own cluster."""
        self._found[f"{name}.{namespace}"] = service

    def add_remote(self, name: str, namespace: str, cluster: str, service: T) -> T | None:
        """A service of another cluster. Returns another one that has the mirror's name already, which then keeps it."""
        self._found[f"{name}.{namespace}.{cluster}"] = service
        holder = self._found.setdefault(f"{mirror_name(name, cluster)}.{namespace}", service)
        return None if holder is service else holder

    def remote(self, name: str, namespace: str, cluster: str) -> T | None:
        """The service of another cluster that is called exactly so there."""
        return self._found.get(f"{name}.{namespace}.{cluster}")

    def find(self, host: str, namespace: str) -> T | None:
        """The service that `host` means to a pod of `namespace`; None: none that is known here."""
        if len(host) > LONGEST + 1:
            return None
        host = host.lower().removesuffix(".")
        short = host.removesuffix(self._svc)
        if len(short) == len(host):
            short = host.removesuffix(".svc")
        dots = short.count(".")
        if len(short) != len(host):
            return self._found.get(short) if dots == 1 else None
        if dots == 0:
            return self._found.get(f"{short}.{namespace}")
        if dots == 1:
            found = self._found.get(short)
            if found is None:
                name, _, cluster = short.partition(".")
                found = self._found.get(f"{name}.{namespace}.{cluster}")
            return found
        return self._found.get(short) if dots == 2 else None


def split_authority(authority: bytes) -> tuple[str, int | None] | None:
    """(host, port) of an authority (RFC 3986 §3.2) that could be a service's name; None: it is an IP literal, or no name at all."""
    try:
        text = authority.decode("ascii")
    except UnicodeDecodeError:
        return None
    host, colon, port = text.partition(":")
    if not host or host[0] == "[":
        return None
    if not colon or not port:  # RFC 3986 §3.2.3: an empty port is none
        return host, None
    if not _PORT.match(port) or not 1 <= int(port) <= 65535:
        return None
    return host, int(port)
