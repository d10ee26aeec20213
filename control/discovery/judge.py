"""Decides which identity is expected at an endpoint's address.

Controllers write EndpointSlices, but so can every tenant with the right to write slices in a
namespace. A slice may contain any address (CVE-2021-25740). So a slice says where a service is
served, but never which identity is there. Pods say that: the API server checks their service
account, kubelets write their addresses, and the injector writes their label.

    address of  endpoint names              result
    ----------  --------------------------  ---------------------------------------------------
    a Service   anything                    refused: the kernel would forward it in clear text
    a pod       that pod, same namespace    the pod's identity, or clear text if it is unmeshed
    a pod       another pod                 refused
    a pod       no pod                      the same namespace: as above; another one: refused
    unknown     a pod with other addresses  refused
    unknown     a pod not known (yet)       not used until the pod is known
    unknown     no pod                      the Service's identity annotation, or clear text
    a node      no pod                      clear text; refused if the Service has the annotation

No pod vouches for the last two. What a Service says about such an address holds only for clients
that use this Service, and for clients of its namespace (catalog.py, "Addresses outside").

The annotation is isthmus.dev/endpoint-identity. Pods on the host network have no identity, so a
node's address has none either.

In one namespace an address has one identity, no matter which slice lists it. Services may disagree
about an address that belongs to no pod. Then the oldest service of the namespace wins, and the
endpoints of its others are refused. Services of other namespaces do not matter, so no tenant can
take an address from others.

A refused endpoint is not used: it gets no connection, neither in clear text nor with mTLS, and no
other endpoint replaces it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from control.contract import SpiffeId
from control.discovery.facts import EndpointFact, PodFact, ServiceFact
from control.kube.resources import Key

_NO_PORTS: frozenset[int] = frozenset()


class ClusterView(Protocol):
    """All that is known of the cluster. `holder` gives the pod that has an address in its own
    network namespace, so never a pod on the host network.
    """

    def pod_of(self, key: Key) -> PodFact | None: ...
    def holder(self, address: str) -> tuple[Key, PodFact] | None: ...
    def is_cluster_address(self, address: str) -> bool: ...
    def identity(self, namespace: str, account: str) -> SpiffeId | None: ...
    def is_host(self, address: str) -> bool: ...
    def external(self, address: str, namespace: str) -> SpiffeId | None: ...
    def zone(self, node: str) -> str: ...


class ExpectedPeer(NamedTuple):
    """The identity that is expected at an address, except on `skip_ports`. None: clear text, any
    peer. `outside`: no pod vouches for it.
    """

    identity: SpiffeId | None
    skip_ports: frozenset[int]
    outside: bool = False


class Refusal(NamedTuple):
    """The endpoint is not used. `why` is the reason for people; "": only not known yet."""

    why: str


def judge(
    endpoint: EndpointFact, namespace: str, service: ServiceFact, cluster: ClusterView
) -> ExpectedPeer | Refusal:
    """Return which identity is expected at an endpoint of a service of `namespace`."""
    address = endpoint.address
    if cluster.is_cluster_address(address):
        return Refusal(f"{address} is the cluster address of a service")
    holder = cluster.holder(address)
    if endpoint.target is not None:
        return _named(endpoint, namespace, holder, cluster)
    if holder is not None:
        (owner, _), pod = holder
        if owner != namespace:
            return Refusal(f"{address} is the address of a pod of another namespace, {owner}")
        return _of(pod, owner, cluster)
    if service.identity_unreadable:
        return Refusal(f"{address} needs the identity of an annotation that cannot be parsed")
    if service.identity is not None and cluster.is_host(address):
        return Refusal(f"{address} is the address of a node, whose pods have no identity there")
    if cluster.external(address, namespace) != service.identity:
        return Refusal(f"an older service expects another identity at {address}")
    return ExpectedPeer(service.identity, _NO_PORTS, outside=True)


def _named(
    endpoint: EndpointFact, namespace: str, holder: tuple[Key, PodFact] | None, cluster: ClusterView
) -> ExpectedPeer | Refusal:
    """Judge an endpoint that names a pod."""
    address = endpoint.address
    space, name, uid = endpoint.target or ("", "", "")
    if space != namespace:
        return Refusal(f"{address} names a pod of another namespace, {space}/{name}")
    pod = cluster.pod_of((space, name))
    if pod is None or (uid and uid != pod.uid):
        # Not seen yet, or gone already: the slice or the pod is slightly out of date.
        return Refusal("")
    if address not in pod.ips:
        return Refusal(f"{address} is not an address of the pod {name}" if pod.ips else "")
    if not pod.host_network and (holder is None or holder[0] != (space, name)):
        return Refusal(f"{address} is the address of another pod")
    return _of(pod, space, cluster)


def _of(pod: PodFact, namespace: str, cluster: ClusterView) -> ExpectedPeer | Refusal:
    if not pod.meshed:
        return ExpectedPeer(None, _NO_PORTS)
    identity = cluster.identity(namespace, pod.account)
    if identity is None:
        return Refusal(
            f"a pod of the service account {pod.account} cannot have an identity: its name is too"
            " long"
        )
    return ExpectedPeer(identity, pod.skip_ports)
