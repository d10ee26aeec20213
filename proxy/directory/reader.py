"""Reads a directory document: YAML text to a snapshot, or to a list of all its mistakes.

This module reads the services of this cluster. clusters.py reads those of other clusters. splits.py
then adds splits and failovers, which may name any service. The indexes ensure that each address and
each name has one meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.directory.clusters import read_clusters
from proxy.directory.policy import DEFAULT_POLICY, Policy, read_policy
from proxy.directory.service_names import ServiceNames
from proxy.directory.snapshot import (
    ADMIN_PORT,
    Allowance,
    Cluster,
    Directory,
    Endpoint,
    Hint,
    Pod,
    Port,
    Service,
    Target,
    of_family,
)
from proxy.directory.splits import PlanContext, RawPlan, plan
from proxy.directory.values import Values
from proxy.net.address import Address
from proxy.settings.document import (
    DocumentError,
    Mistakes,
    Plain,
    child,
    describe,
    load,
    mapping,
    sequence,
    unknown_keys,
)

MAX_WEIGHT = 1000
DOMAIN = "cluster.local"
# Marks a port of the service that an endpoint does not serve. An explicit word, because a missing
# value is a mistake.
NOT_SERVED = "none"

# The default ports on which an endpoint with an identity gets clear text.
SKIP_PORTS = frozenset({ADMIN_PORT})

TOP = ("cluster", "domain", "skip_ports", "allow_identity_loss", "services", "clusters")
SERVICE = (
    "name",
    "namespace",
    "addresses",
    "ports",
    "endpoints",
    "export",
    "split",
    "failover",
    "policy",
)
PORT = ("port", "target_port", "protocol")
ENDPOINT = ("address", "identity", "ports", "skip_ports", "ready", "weight", "zone")


class DirectoryError(DocumentError):
    """The text is not a valid directory. `.mistakes` has one line per mistake, with its path."""


def parse(text: str, source: str) -> Directory:
    """Parse a YAML document. `source` names it in errors. Raises DirectoryError with all
    mistakes."""
    try:
        value = load(text, source)
    except DocumentError as error:
        raise DirectoryError(source, error.mistakes) from error
    mistakes = Mistakes()
    root = mapping(value, "", mistakes)
    found = _read(root, mistakes) if root is not None else Directory()
    if mistakes:
        raise DirectoryError(source, mistakes.found())
    return found


def _read(root: Mapping[str, Plain], mistakes: Mistakes) -> Directory:
    values = Values(mistakes)
    unknown_keys(root, TOP, "", mistakes)
    if "services" not in root:
        mistakes.add("services", "must be given (use an empty list if there are no services)")
    name = values.label(root["cluster"], "cluster") if "cluster" in root else ""
    domain = values.domain(root.get("domain", DOMAIN), "domain")
    builder = _Builder(
        values,
        values.port_set(root["skip_ports"], "skip_ports") if "skip_ports" in root else SKIP_PORTS,
    )
    for index, item in enumerate(sequence(root.get("services"), "services", mistakes)):
        builder.service(item, f"services[{index}]")
    clusters = read_clusters(root.get("clusters"), name, values)
    names = _names(builder.services, clusters, domain, mistakes)
    plan(builder.raw_plans, PlanContext(name, tuple(builder.services), clusters, names), mistakes)
    for service, address in builder.addresses:
        builder.clustered[address] = of_family(service.targets[address.port], address.host)
    allowance = (
        values.allowance(root["allow_identity_loss"], "allow_identity_loss")
        if "allow_identity_loss" in root
        else Allowance()
    )
    return Directory(
        tuple(builder.services),
        clusters,
        name,
        builder.clustered,
        builder.served,
        builder.pods,
        names,
        allowance,
    )


def _names(
    services: list[Service], clusters: Mapping[str, Cluster], domain: str, mistakes: Mistakes
) -> ServiceNames[Service]:
    names: ServiceNames[Service] = ServiceNames(domain)
    for service in services:
        names.add(service.name, service.namespace, service)
    for cluster in clusters.values():
        for service in cluster.services:
            other = names.add_remote(service.name, service.namespace, cluster.name, service)
            if other is not None and other.cluster:
                mirror = f"{service.name}-{cluster.name}.{service.namespace}"
                mistakes.add(
                    "clusters",
                    f"{mirror} would mean both {other.qualified} and {service.qualified}: rename a"
                    " cluster",
                )
    return names


@dataclass(slots=True)
class _Entry:
    """One entry under `endpoints`, before its ports are known."""

    host: str
    pod: Pod
    ports: Mapping[int, int | None]  # None: the endpoint does not serve this port


class _Builder:
    """Collects the services of this cluster, and the mistakes in them."""

    def __init__(self, values: Values, skip_ports: frozenset[int]) -> None:
        self.values = values
        self.skip_ports = skip_ports
        self.mistakes = values.mistakes
        self.services: list[Service] = []
        self.raw_plans: list[RawPlan] = []
        self.addresses: list[tuple[Service, Address]] = []
        self.clustered: dict[Address, Target] = {}
        self.served: dict[Address, Target] = {}
        self.pods: dict[str, Pod] = {}
        self._names: dict[str, str] = {}
        self._owners: dict[Address, str] = {}

    def service(self, value: Plain, path: str) -> None:
        given = mapping(value, path, self.mistakes)
        if given is None:
            return
        unknown_keys(given, SERVICE, path, self.mistakes)
        name = self.values.label(given.get("name"), child(path, "name"))
        namespace = self.values.label(given.get("namespace", "default"), child(path, "namespace"))
        qualified = f"{namespace}/{name}"
        if name and namespace and (first := self._names.setdefault(qualified, path)) != path:
            self.mistakes.add(path, f"the service {qualified} is already at {first}")
        listed = sequence(given.get("addresses"), child(path, "addresses"), self.mistakes)
        hosts = tuple(
            self.values.host(host, f"{path}.addresses[{index}]")
            for index, host in enumerate(listed)
        )
        ports = self.values.ports(given.get("ports"), child(path, "ports"), PORT)
        pods = self._endpoints(given.get("endpoints"), child(path, "endpoints"), ports)
        policy = (
            read_policy(given["policy"], child(path, "policy"), self.mistakes)
            if "policy" in given
            else DEFAULT_POLICY
        )
        exported = (
            self.values.flag(given["export"], child(path, "export")) if "export" in given else False
        )
        targets = {port.port: self._target(qualified, port, pods, policy) for port in ports}
        service = Service(name, namespace, hosts, tuple(ports), targets, exported=exported)
        for index, host in enumerate(hosts):
            for port in ports:
                self._claim(service, Address(host, port.port), f"{path}.addresses[{index}]")
        self.services.append(service)
        if "split" in given or "failover" in given:
            self.raw_plans.append(
                RawPlan(service, targets, path, given.get("split"), given.get("failover"))
            )

    def _claim(self, service: Service, address: Address, path: str) -> None:
        if address in self._owners and address.host:
            self.mistakes.add(path, f"{address} already belongs to {self._owners[address]}")
            return
        self._owners[address] = f"{service.qualified} ({path})"
        self.addresses.append((service, address))

    def _target(self, service: str, port: Port, entries: list[_Entry], policy: Policy) -> Target:
        endpoints = []
        for entry in entries:
            number = entry.ports.get(port.port, port.target_port)
            if number is None:
                continue
            address = Address(entry.host, number)
            endpoint = entry.pod.at(address, port.protocol)
            endpoints.append(endpoint)
            before = self.served.get(address)
            if before is None:
                self.served[address] = Target(service, (endpoint,), port.protocol, policy)
            elif before.service != service or before.protocol != port.protocol:
                # Two services share the pod's port. The address alone does not tell which of them
                # is the destination.
                hint = port.protocol if before.protocol == port.protocol else Hint.DETECT
                ready = endpoint.ready or before.endpoints[0].ready
                shared = Endpoint(
                    address, endpoint.identity, hint, ready, endpoint.weight, endpoint.zone
                )
                self.served[address] = Target(None, (shared,), hint)
        return Target(service, tuple(endpoints), port.protocol, policy)

    def _endpoints(self, value: Plain, path: str, ports: list[Port]) -> list[_Entry]:
        found: dict[str, _Entry] = {}
        for index, item in enumerate(sequence(value, path, self.mistakes)):
            entry = self._endpoint(item, f"{path}[{index}]", ports)
            if entry is None:
                continue
            if entry.host in found:
                self.mistakes.add(
                    f"{path}[{index}].address", f"{entry.host} is listed twice in this service"
                )
            found[entry.host] = entry
        return list(found.values())

    def _endpoint(self, value: Plain, path: str, ports: list[Port]) -> _Entry | None:
        given = mapping(value, path, self.mistakes)
        if given is None:
            return None
        values = self.values
        unknown_keys(given, ENDPOINT, path, self.mistakes)
        host = values.host(given.get("address"), child(path, "address"))
        identity = (
            values.identity(given["identity"], child(path, "identity"))
            if "identity" in given
            else None
        )
        ready = values.flag(given["ready"], child(path, "ready")) if "ready" in given else True
        weight = (
            values.number(given["weight"], child(path, "weight"), 1, MAX_WEIGHT)
            if "weight" in given
            else 1
        )
        zone = given.get("zone", "")
        if not isinstance(zone, str) or len(zone) > 63:
            self.mistakes.add(
                child(path, "zone"),
                f"expected a string of at most 63 characters, found {describe(zone)}",
            )
        elsewhere = self._own_ports(given.get("ports"), child(path, "ports"), ports)
        skipped = (
            values.port_set(given["skip_ports"], child(path, "skip_ports"))
            if "skip_ports" in given
            else self.skip_ports
        )
        pod = Pod(
            Endpoint(Address(host, 0), identity, Hint.DETECT, ready, weight, str(zone)), skipped
        )
        self._one_identity(host, pod, path)
        return _Entry(host, pod, elsewhere)

    def _one_identity(self, host: str, pod: Pod, path: str) -> None:
        """Add a mistake if a pod has different identities, or different ports without identity, in
        two services. Otherwise a missing identity in one service would cause clear text to a meshed
        pod."""
        known = self.pods.setdefault(host, pod)
        if not host or known is pod:
            return
        if known.endpoint.identity != pod.endpoint.identity:
            was, now = (
                known.endpoint.identity or "no identity",
                pod.endpoint.identity or "no identity",
            )
            self.mistakes.add(path, f"{host} has {now} here, but {was} in another service")
        elif known.skip_ports != pod.skip_ports:
            here, there = sorted(pod.skip_ports), sorted(known.skip_ports)
            self.mistakes.add(
                path, f"{host} has skip_ports {here} here, but {there} in another service"
            )

    def _own_ports(self, value: Plain, path: str, ports: list[Port]) -> Mapping[int, int | None]:
        """The endpoint's own ports by service port. None: the endpoint does not serve that port."""
        if value is None:
            return {}
        found: dict[int, int | None] = {}
        names = {str(port.port): port.port for port in ports}
        for key, item in (mapping(value, path, self.mistakes) or {}).items():
            if key not in names:
                self.mistakes.add(child(path, key), "is not a port of this service")
            else:
                found[names[key]] = (
                    None if item == NOT_SERVED else self.values.port(item, child(path, key))
                )
        return found
