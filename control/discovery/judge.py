"""Whom an endpoint's address belongs to, and so who is expected there.

An EndpointSlice is written by controllers, and by anybody with the right to write slices in a
namespace, who may put any address into it (CVE-2021-25740). So a slice says where a service is
served, and never who is there. That is said by pods: their service account is checked by the API
server, their addresses are written by kubelets, and their mark by the injector.

    the address is      the endpoint names                 then
    ------------------  ---------------------------------  -------------------------------------------------
    a cluster address   anything                           refused: the kernel would send it on, in clear text
    a pod's             that pod, of the same namespace    the pod's own identity, or clear text
    a pod's             another pod                        refused
    a pod's             no pod                             the pod's own, if it is of the same namespace; else refused
    nobody's            a pod that has another address     refused
    nobody's            a pod that is not known (yet)      not used until it is
    nobody's            no pod                             what the service says of it (isthmus.dev/endpoint-identity), or clear text
    a node's            no pod                             the same, but no identity: pods of the host network have none

One address means one identity, whoever lists it. Where services disagree about an address that is
no pod's, the oldest one is right: nobody can take an address from a service that uses it already,
and the others' endpoints are refused.

A refused endpoint is none: it gets no connection, neither in clear text nor otherwise, and nothing
else takes its place.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from control.contract import SpiffeId
from control.discovery.facts import EndpointFact, PodFact, ServiceFact
from control.kube.resources import Key

_NO_PORTS: frozenset[int] = frozenset()


class World(Protocol):
    """All that is known of the cluster. `holder`: the pod that has an address, and the network
    namespace behind it, for itself."""

    def pod_of(self, key: Key) -> PodFact | None: ...
    def holder(self, address: str) -> tuple[Key, PodFact] | None: ...
    def is_cluster_address(self, address: str) -> bool: ...
    def identity(self, namespace: str, account: str) -> SpiffeId | None: ...
    def is_host(self, address: str) -> bool: ...
    def external(self, address: str) -> SpiffeId | None: ...
    def zone(self, node: str) -> str: ...


class Who(NamedTuple):
    """Who is expected at an address (None: nobody in particular, in clear text), but for
    `skip_ports`."""

    identity: SpiffeId | None
    skip_ports: frozenset[int]


class Refusal(NamedTuple):
    """The endpoint is not used. `why`, for people; "": it is only not known yet."""

    why: str


def judge(
    endpoint: EndpointFact, namespace: str, service: ServiceFact, world: World
) -> Who | Refusal:
    """Who is expected at an endpoint of a service of `namespace`."""
    address = endpoint.address
    if world.is_cluster_address(address):
        return Refusal(f"{address} is the cluster address of a service")
    holder = world.holder(address)
    if endpoint.target is not None:
        return _named(endpoint, namespace, holder, world)
    if holder is not None:
        (owner, _), pod = holder
        if owner != namespace:
            return Refusal(f"{address} is the address of a pod of another namespace, {owner}")
        return _of(pod, owner, world)
    if service.careful:
        return Refusal(f"{address} should have an identity, which cannot be read")
    if service.identity is not None and world.is_host(address):
        return Refusal(f"{address} is the address of a node, whose pods have no identity there")
    if world.external(address) != service.identity:
        return Refusal(f"{address} has another identity in another service")
    return Who(service.identity, _NO_PORTS)


def _named(
    endpoint: EndpointFact, namespace: str, holder: tuple[Key, PodFact] | None, world: World
) -> Who | Refusal:
    """Of an endpoint that names a pod."""
    address = endpoint.address
    space, name, uid = endpoint.target or ("", "", "")
    if space != namespace:
        return Refusal(f"{address} names a pod of another namespace, {space}/{name}")
    pod = world.pod_of((space, name))
    if pod is None or (uid and uid != pod.uid):
        return Refusal(
            ""
        )  # not seen yet, or seen no more: the slice, or the pod, is a moment behind
    if address not in pod.ips:
        return Refusal(f"{address} is not an address of the pod {name}" if pod.ips else "")
    if not pod.host_network and (holder is None or holder[0] != (space, name)):
        return Refusal(f"{address} is the address of another pod")
    return _of(pod, space, world)


def _of(pod: PodFact, namespace: str, world: World) -> Who | Refusal:
    if not pod.meshed:
        return Who(None, _NO_PORTS)
    identity = world.identity(namespace, pod.account)
    if identity is None:
        return Refusal(
            f"a pod of the service account {pod.account} cannot have an identity: its name is too"
            " long"
        )
    return Who(identity, pod.skip_ports)
