"""Reads the other clusters in a directory document: their gateways, and the services that they
export.

Each port of a remote service becomes a target whose endpoints are the gateways of its cluster. A
gateway with a DNS name has no endpoint yet: proxy/routing/remote_gateways.py resolves it while the
proxy runs."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.directory.policy import DEFAULT_POLICY, read_policy
from proxy.directory.service_names import LONGEST, full_name
from proxy.directory.snapshot import Cluster, Endpoint, Gateway, Remote, Service, Target
from proxy.directory.values import Values
from proxy.settings.document import Plain, child, describe, mapping, sequence, unknown_keys

GATEWAY_PORT = 4143
DOMAIN = "cluster.local"

CLUSTER = ("name", "domain", "gateways", "services")
GATEWAY = ("address", "host", "port", "identity")
SERVICE = ("name", "namespace", "ports", "policy")
PORT = ("port", "protocol")


def read_clusters(value: Plain, own: str, values: Values) -> dict[str, Cluster]:
    """The clusters in the list `clusters`, by name. `own`: the name of this cluster, "" if the
    document does not give it."""
    reader = _Reader(own, values)
    for index, item in enumerate(sequence(value, "clusters", values.mistakes)):
        reader.cluster(item, f"clusters[{index}]")
    return reader.found


class _Reader:
    def __init__(self, own: str, values: Values) -> None:
        self._own = own
        self._values = values
        self._mistakes = values.mistakes
        self._ways: dict[tuple[str, int], str] = {}
        self.found: dict[str, Cluster] = {}

    def cluster(self, value: Plain, path: str) -> None:
        given = mapping(value, path, self._mistakes)
        if given is None:
            return
        unknown_keys(given, CLUSTER, path, self._mistakes)
        name = self._name(given.get("name"), child(path, "name"))
        domain = self._values.domain(given.get("domain", DOMAIN), child(path, "domain"))
        gateways = []
        for index, item in enumerate(
            sequence(given.get("gateways"), child(path, "gateways"), self._mistakes)
        ):
            if (gateway := self._gateway(item, f"{path}.gateways[{index}]")) is not None:
                gateways.append(gateway)
        endpoints = tuple(gateway.at(gateway.host) for gateway in gateways if gateway.literal)
        services: dict[str, Service] = {}
        for index, item in enumerate(
            sequence(given.get("services"), child(path, "services"), self._mistakes)
        ):
            here = f"{path}.services[{index}]"
            if (service := self._service(item, here, (name, domain), endpoints)) is None:
                continue
            if services.setdefault(service.qualified, service) is not service:
                self._mistakes.add(here, f"the service {service.qualified} is listed twice")
        self.found.setdefault(
            name, Cluster(name, domain, tuple(gateways), tuple(services.values()))
        )

    def _name(self, value: Plain, path: str) -> str:
        name = self._values.label(value, path)
        if name and name == self._own:
            self._mistakes.add(
                path, f"{name} is this cluster itself: list its services in `services`"
            )
        elif name == "svc":
            self._mistakes.add(
                path, "a cluster cannot be called svc: c.default.svc would have two meanings"
            )
        elif name in self.found and name:
            self._mistakes.add(path, f"the cluster {name} is listed twice")
        return name

    def _gateway(self, value: Plain, path: str) -> Gateway | None:
        given = mapping(value, path, self._mistakes)
        if given is None:
            return None
        unknown_keys(given, GATEWAY, path, self._mistakes)
        if ("address" in given) == ("host" in given):
            self._mistakes.add(
                path, "expected either `address`, an IP address, or `host`, a DNS name"
            )
            return None
        literal = "address" in given
        host = (
            self._values.host(given["address"], child(path, "address"))
            if literal
            else self._host(given["host"], child(path, "host"))
        )
        port = self._values.port(given.get("port", GATEWAY_PORT), child(path, "port"))
        if "identity" not in given:
            self._mistakes.add(
                child(path, "identity"),
                "must be given: connections to a gateway always use mutual TLS",
            )
            return None
        identity = self._values.identity(given["identity"], child(path, "identity"))
        if host and (first := self._ways.setdefault((host, port), path)) != path:
            self._mistakes.add(path, f"{host} port {port} is already the gateway at {first}")
        return Gateway(host, port, identity, literal) if identity is not None else None

    def _host(self, value: Plain, path: str) -> str:
        if isinstance(value, str) and value.replace(".", "").isdigit():
            self._mistakes.add(
                path,
                f"expected a DNS name, found {describe(value)} (an IP address belongs under"
                " `address`)",
            )
            return ""
        return self._values.domain(
            value.removesuffix(".") if isinstance(value, str) else value, path
        )

    def _service(
        self, value: Plain, path: str, cluster: tuple[str, str], gateways: tuple[Endpoint, ...]
    ) -> Service | None:
        given = mapping(value, path, self._mistakes)
        if given is None:
            return None
        unknown_keys(given, SERVICE, path, self._mistakes)
        name = self._values.label(given.get("name"), child(path, "name"))
        namespace = self._values.label(given.get("namespace", "default"), child(path, "namespace"))
        ports = self._values.ports(given.get("ports"), child(path, "ports"), PORT)
        policy = (
            read_policy(given["policy"], child(path, "policy"), self._mistakes)
            if "policy" in given
            else DEFAULT_POLICY
        )
        host = full_name(name, namespace, cluster[1])
        if len(host) > LONGEST:
            self._mistakes.add(
                path, f"its name in its own cluster is longer than {LONGEST} characters: {host}"
            )
        targets: Mapping[int, Target] = {
            port.port: Target(
                f"{cluster[0]}/{namespace}/{name}",
                gateways,
                port.protocol,
                policy,
                Remote(cluster[0], host, port.port),
            )
            for port in ports
        }
        return Service(name, namespace, (), tuple(ports), targets, cluster=cluster[0])
