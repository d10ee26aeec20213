"""Service names: the forms that an application may use, and the service that each form means.

In Kubernetes, a pod can refer to a service `c` in the namespace `shop` as

    c                             within the same namespace
    c.shop
    c.shop.svc
    c.shop.svc.cluster.local      with the cluster's domain, and optionally a trailing dot

in upper or lower case, with or without a port. A service of another cluster, for example `east`,
has the names of a mirror service in this cluster, in all these forms. The name of the cluster may
also follow after a dot:

    c-east, c-east.shop, c-east.shop.svc, c-east.shop.svc.cluster.local
    c.east                        in the pod's own namespace
    c.shop.east

Some names are ambiguous. The precedence is: a service of this cluster with exactly that name; a
mirror name; a cluster after a dot. So a name that works without the mesh keeps its meaning when a
cluster is added.

One dictionary has all names: a mirror as `c-east.shop`, and a dotted name as `c.shop.east`. If a
name has no namespace, `find` adds it and looks it up again. That makes at most three lookups,
independent of the number of services."""

from __future__ import annotations

import re
from typing import Generic, TypeVar

T = TypeVar("T")

# RFC 1123: the names that Kubernetes accepts for services and namespaces.
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z")
# RFC 1035 §2.3.4: the maximum length of a name in text form, in bytes.
LONGEST = 253

_PORT = re.compile(r"[0-9]{1,5}\Z")


def mirror_name(name: str, cluster: str) -> str:
    """The name of a service of another cluster in the form of a local service."""
    return f"{name}-{cluster}"


def full_name(name: str, namespace: str, domain: str) -> str:
    """The fully qualified name of a service in its own cluster."""
    return f"{name}.{namespace}.svc.{domain}"


class ServiceNames(Generic[T]):
    """The names of one snapshot. Add the services of this cluster first. `find` never raises."""

    def __init__(self, domain: str = "cluster.local") -> None:
        self.domain = domain  # of this cluster
        self._svc = f".svc.{domain}"
        self._found: dict[str, T] = {}

    def add(self, name: str, namespace: str, service: T) -> None:
        """Add a service of this cluster."""
        self._found[f"{name}.{namespace}"] = service

    def add_remote(self, name: str, namespace: str, cluster: str, service: T) -> T | None:
        """Add a service of another cluster. If another service already has the mirror name, that
        service keeps it and is returned."""
        self._found[f"{name}.{namespace}.{cluster}"] = service
        holder = self._found.setdefault(f"{mirror_name(name, cluster)}.{namespace}", service)
        return None if holder is service else holder

    def remote(self, name: str, namespace: str, cluster: str) -> T | None:
        """The service of another cluster with exactly this name there."""
        return self._found.get(f"{name}.{namespace}.{cluster}")

    def find(self, host: str, namespace: str) -> T | None:
        """The service that `host` means for a pod in `namespace`. None: not a known service."""
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

    def local(self, host: str, namespace: str) -> str | None:
        """The name of the only service of this cluster that `host` can mean, as "name.namespace".
        None: it cannot mean one."""
        if len(host) > LONGEST + 1:
            return None
        host = host.lower().removesuffix(".")
        short = host.removesuffix(self._svc)
        if len(short) == len(host):
            short = host.removesuffix(".svc")
        name, dot, of = short.partition(".")
        if not dot and len(short) == len(host):
            of = namespace
        return f"{name}.{of}" if LABEL.match(name) and LABEL.match(of) else None


def split_authority(authority: bytes) -> tuple[str, int | None] | None:
    """(host, port) of an authority (RFC 3986 §3.2) that may be a service name. None: an IP literal,
    or not a name."""
    try:
        text = authority.decode("ascii")
    except UnicodeDecodeError:
        return None
    host, colon, port = text.partition(":")
    if not host or host[0] == "[":
        return None
    if not colon or not port:  # RFC 3986 §3.2.3: an empty port counts as none
        return host, None
    if not _PORT.match(port) or not 1 <= int(port) <= 65535:
        return None
    return host, int(port)
