"""The DNS names that this proxy answers: what a pod's resolver asks when an application uses
`c.east`.

A resolver does not ask for the name as the application wrote it. Kubernetes sets `search
default.svc.cluster.local svc.cluster.local cluster.local` and `ndots:5`. So for `c.east`, glibc and
musl ask for these names one after the other, each for both address families:

    c.east.default.svc.cluster.local     in the pod's own namespace
    c.east.svc.cluster.local             in Kubernetes, the service `c` of the namespace `east`
    c.east.cluster.local
    c.east.example.com                   other search domains of the node
    c.east                               the name itself

until one is answered. After NXDOMAIN both continue. An empty response (NODATA) stops musl. SERVFAIL
stops musl, and makes the final result of glibc an error. So the proxy must not send these for a
name that still has to be found. Most of these names are in zones of other servers. There the proxy
only adds names that exist, and forwards all other queries, so that everything that works without it
keeps working:

* A name of a service of this cluster, or below one (`pod-0.db.default.svc.cluster.local`), is
  forwarded. This rule comes first: a name that works without the mesh keeps its meaning when a
  cluster is added.
* A name of a service of another cluster is answered: alone (proxy/directory/service_names.py has
  the forms), or followed by one of the pod's search domains. So the search ends at the first step,
  without a query to another server. The search domain `svc.<domain>` is an exception. The rest
  would be read as `c` of the cluster `east`, but `c.east.svc.cluster.local` means a namespace of
  this cluster. No search needs it.
* For a name below the name of another cluster as a top-level domain, only this proxy is
  responsible: `gone.east` does not exist (NXDOMAIN), and no other server is asked. `east` itself,
  and `shop.east` if that namespace has a service, exist without an address (NODATA, RFC 8020).
* Queries for all other names are forwarded."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from proxy.directory import Directory, Service
from proxy.dns.virtual_addresses import RemoteName


class Verdict(enum.Enum):
    """The verdict for a name that is not an existing service of another cluster."""

    FORWARD = "forward"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"


class Zone:
    """The names of one snapshot, as a pod sees them. Never raises. A few lookups, independent of
    the number of services."""

    def __init__(self, directory: Directory, namespace: str, searched: Sequence[str]) -> None:
        """`namespace`: the pod's own. `searched`: its search domains."""
        self._directory = directory
        self._namespace = namespace
        self._services = ["svc", *directory.domain.split(".")]
        domains = {tuple(domain.lower().rstrip(".").split(".")) for domain in searched} - {
            tuple(self._services),
            ("",),
        }
        self._searched = [list(domain) for domain in sorted(domains, key=len, reverse=True)]
        self.names = [
            RemoteName(cluster.name, service.namespace, service.name)
            for cluster in directory.clusters.values()
            for service in cluster.services
        ]
        self._inner = {f"{name.namespace}.{name.cluster}" for name in self.names}

    def judge(self, labels: Sequence[str]) -> RemoteName | Verdict:
        """The verdict for the name with these labels, in any case, without the empty root label."""
        labels = [label.lower() for label in labels]
        if self._below_a_service(labels):
            return Verdict.FORWARD
        meant = self._find(labels)
        for domain in self._searched:
            if meant is None and len(labels) > len(domain) and labels[-len(domain) :] == domain:
                meant = self._find(labels[: -len(domain)])
        if meant is not None:
            return (
                RemoteName(meant.cluster, meant.namespace, meant.name)
                if meant.cluster
                else Verdict.FORWARD
            )
        if labels and labels[-1] in self._directory.clusters:
            return (
                Verdict.NODATA
                if len(labels) == 1 or ".".join(labels) in self._inner
                else Verdict.NXDOMAIN
            )
        return Verdict.FORWARD

    def _find(self, labels: Sequence[str]) -> Service | None:
        if any(
            "." in label for label in labels
        ):  # DNS allows a dot within a label, but no service has such a name
            return None
        return self._directory.find_service(".".join(labels), self._namespace)

    def _below_a_service(self, labels: Sequence[str]) -> bool:
        """Whether the name has the form [...].c.shop.svc.cluster.local, and this cluster has that
        service."""
        end = len(labels) - len(self._services)
        if end <= 2 or list(labels[end:]) != self._services:
            return False
        service = self._find(labels[end - 2 :])
        return service is not None and not service.cluster
