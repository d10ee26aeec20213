"""Which DNS names are ours to answer: what a pod's resolver asks when an application says `c.east`.

A resolver does not ask for what the application said. With `search default.svc.cluster.local svc.cluster.local cluster.local` and
`ndots:5`, as Kubernetes sets them, glibc and musl make of `c.east` one question after the other, each for both address families:

    c.east.default.svc.cluster.local     in the own namespace
    c.east.svc.cluster.local             this is how Kubernetes writes a service `c` of the namespace `east`
    c.east.cluster.local
    c.east.example.com                   what else the node searches
    c.east                               as it was said

until one is answered. NXDOMAIN sends both of them on. An empty answer (NODATA) stops musl, and SERVFAIL stops musl and spoils the end for
glibc; so neither may be said of a name that is still to be found. Most of these names lie in somebody else's zone: there we only add
what exists, and pass on everything else, so that what works without us goes on working:

* A name that belongs to a service of our own cluster, or lies below one (`pod-0.db.default.svc.cluster.local`), is passed on. This
  comes first: nothing that works without the mesh changes its meaning when a cluster is added.
* A name that means a service of another cluster is answered: as it stands (proxy/directory/service_names.py has the forms), or with one of
  the pod's search domains behind it. So the walk above ends at its first step, without asking anybody. Not taken off is `svc.<domain>`:
  what remains would be read as `c` of the cluster `east`, but whoever writes `c.east.svc.cluster.local` means a namespace of
  their own cluster, and nobody's walk needs it.
* A name below another cluster's name, as a top-level domain, is ours alone: `gone.east` does not exist (NXDOMAIN), and no server of the
  world is asked for it. `east` itself, and `shop.east` if the namespace has a service, exist without an address (NODATA, RFC 8020).
* All else is passed on.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from proxy.directory import Directory, Service
from proxy.dns.virtual_addresses import RemoteName


class Verdict(enum.Enum):
    """What becomes of a question that is not for an existing service of another cluster."""

    FORWARD = "forward"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"


class Zone:
    """The names of one snapshot, as a pod sees them. Never fails; a few look-ups, however many services there are."""

    def __init__(self, directory: Directory, namespace: str, searched: Sequence[str]) -> None:
        """`namespace` is the pod's own, `searched` are its search domains."""
        self._directory = directory
        self._namespace = namespace
        self._services = ["svc", *directory.domain.split(".")]
        domains = {tuple(domain.lower().rstrip(".").split(".")) for domain in searched} - {tuple(self._services), ("",)}
        self._searched = [list(domain) for domain in sorted(domains, key=len, reverse=True)]
        self.names = [
            RemoteName(cluster.name, service.namespace, service.name)
            for cluster in directory.clusters.values()
            for service in cluster.services
        ]
        self._inner = {f"{name.namespace}.{name.cluster}" for name in self.names}

    def judge(self, labels: Sequence[str]) -> RemoteName | Verdict:
        """What to do about the name with these labels, in any case, without the root's empty one."""
        labels = [label.lower() for label in labels]
        if self._below_a_service(labels):
            return Verdict.FORWARD
        meant = self._find(labels)
        for domain in self._searched:
            if meant is None and len(labels) > len(domain) and labels[-len(domain) :] == domain:
                meant = self._find(labels[: -len(domain)])
        if meant is not None:
            return RemoteName(meant.cluster, meant.namespace, meant.name) if meant.cluster else Verdict.FORWARD
        if labels and labels[-1] in self._directory.clusters:
            return Verdict.NODATA if len(labels) == 1 or ".".join(labels) in self._inner else Verdict.NXDOMAIN
        return Verdict.FORWARD

    def _find(self, labels: Sequence[str]) -> Service | None:
        if any("." in label for label in labels):  # DNS allows it within a label; no service is called so
            return None
        return self._directory.named(".".join(labels), self._namespace)

    def _below_a_service(self, labels: Sequence[str]) -> bool:
        """Whether it is of the form [...].c.shop.svc.cluster.local, and our cluster has that service."""
        end = len(labels) - len(self._services)
        if end <= 2 or list(labels[end:]) != self._services:
            return False
        service = self._find(labels[end - 2 :])
        return service is not None and not service.cluster
