"""Contradictions in the configuration: mistakes that only a comparison of settings shows."""

from __future__ import annotations

import re

from proxy.config.endpoint_socket import VARIABLE, socket_path
from proxy.config.schema import Config
from proxy.config.schema_files import ControlPlaneConfig, EnrollmentConfig, IdentityConfig
from proxy.config.schema_tracing import TracingConfig
from proxy.identity.spiffe import SpiffeId, SpiffeIdError, check_trust_domain
from proxy.net.address import Address
from proxy.settings.document import Mistakes

# Virtual addresses are hashes of names. In a sparsely used range, hashes rarely collide.
_LEAST_ADDRESSES = 4096
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s@/?#:\[\]]+)(:[0-9]{1,5})?(/[^\s]*)?")
_AGENT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s@/?#:\[\]]+):[0-9]{1,5}")
_CLUSTER = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def check(config: Config, mistakes: Mistakes) -> None:
    """Add a mistake for each contradiction."""
    if not _CLUSTER.fullmatch(config.cluster):
        mistakes.add(
            "cluster", f"expected lower-case letters, digits and dashes, found {config.cluster!r}"
        )
    try:
        check_trust_domain(config.trust_domain)
    except SpiffeIdError as error:
        mistakes.add("trust_domain", str(error))
    _listeners(config, mistakes)
    _workers(config, mistakes)
    _gateway(config, mistakes)
    _directory(config, mistakes)
    inbound = config.inbound
    if config.identity is None:
        if inbound.require_identity.default or any(inbound.require_identity.ports.values()):
            mistakes.add(
                "inbound.require_identity",
                "requires identities, but there is no `identity` section, so no peer can"
                " present one",
            )
        if inbound.allow:
            mistakes.add(
                "inbound.allow",
                "lists identities, but there is no `identity` section, so no peer can present one",
            )
    else:
        _identity(config.identity, config.trust_domain, mistakes)
    if both := set(inbound.http_ports) & set(inbound.opaque_ports):
        mistakes.add(
            "inbound.http_ports",
            f"accepts only HTTP on {min(both)}, but inbound.opaque_ports declares it opaque",
        )
    for port in inbound.allow:
        if inbound.require_identity.ports.get(port) is False:
            mistakes.add(
                f"inbound.allow.{port}",
                "has an allow-list, but inbound.require_identity says false for the same port",
            )
    _dns(config, mistakes)
    if config.http.max_target_bytes > config.http.max_head_bytes:
        mistakes.add(
            "http.max_target_bytes",
            "is greater than http.max_head_bytes, of which the target is a part",
        )
    if config.pool.max_idle_per_endpoint > config.pool.max_connections_per_endpoint:
        mistakes.add(
            "pool.max_idle_per_endpoint", "is greater than pool.max_connections_per_endpoint"
        )
    _tracing(config.tracing, mistakes)
    if config.pool.idle_timeout >= config.http.idle_timeout:
        mistakes.add(
            "pool.idle_timeout",
            "is not below http.idle_timeout: other proxies would close connections that are about"
            " to be used",
        )


def _identity(section: IdentityConfig, trust_domain: str, mistakes: Mistakes) -> None:
    from_files = section.source == "files"
    for name, value in (("certificate", section.certificate), ("key", section.key)):
        if from_files and value is None:
            mistakes.add(f"identity.{name}", "is missing: `identity.source` is `files`")
        if not from_files and value is not None:
            mistakes.add(
                f"identity.{name}", f"is not used with `identity.source: {section.source}`"
            )
    if section.source != "spiffe" and not section.roots:
        mistakes.add("identity.roots", "lists no file: no peer would be trusted")
    if section.source == "spiffe" and section.roots:
        mistakes.add("identity.roots", "is not used with `identity.source: spiffe`")
    if section.revoked is not None and not section.end_with_certificate:
        mistakes.add(
            "identity.revoked",
            "needs `identity.end_with_certificate`: open connections of a revoked peer must end",
        )
    control = section.control
    if (control is not None) != (section.source == "control"):
        mistakes.add("identity.control", "belongs to `identity.source: control`")
    if control is not None:
        _peer("identity.control", control, trust_domain, mistakes)
        for name in ("max_first_pause", "max_pause"):
            if getattr(control, name) < control.min_pause:
                mistakes.add(f"identity.control.{name}", "is below identity.control.min_pause")
    _workload_api(section, mistakes)


def _workload_api(section: IdentityConfig, mistakes: Mistakes) -> None:
    spiffe = section.spiffe
    if section.source != "spiffe":
        if spiffe is not None:
            mistakes.add("identity.spiffe", "belongs to `identity.source: spiffe`")
        return
    if spiffe is None or not spiffe.socket:
        mistakes.add("identity.spiffe.socket", f"is missing, and {VARIABLE} is not set")
        return
    try:
        socket_path(spiffe.socket)
    except ValueError as error:
        mistakes.add("identity.spiffe.socket", str(error))
    if spiffe.max_pause < spiffe.min_pause:
        mistakes.add("identity.spiffe.max_pause", "is below identity.spiffe.min_pause")


def _peer(
    path: str,
    control: ControlPlaneConfig | EnrollmentConfig,
    trust_domain: str,
    mistakes: Mistakes,
) -> None:
    """Check where the control plane is, and its name."""
    if not _AGENT.fullmatch(control.address):
        mistakes.add(f"{path}.address", f"expected host:port, found {control.address!r}")
    try:
        expected = SpiffeId.parse(control.identity)
    except SpiffeIdError as error:
        mistakes.add(f"{path}.identity", str(error))
    else:
        if expected.trust_domain != trust_domain:
            mistakes.add(f"{path}.identity", f"is not of the trust domain {trust_domain}")


def _workers(config: Config, mistakes: Mistakes) -> None:
    if config.workers == 1:
        return
    for path, address in config.listeners():
        if address.port == 0 and not path.startswith("admin."):
            mistakes.add(
                path, f"{address} would be another port for each of the {config.workers} workers"
            )


def _dns(config: Config, mistakes: Mistakes) -> None:
    section = config.dns
    if section is None:
        return
    if not config.outbound.listen:
        mistakes.add(
            "dns",
            "returns addresses that lead to the outbound listener, but outbound.listen is empty",
        )
    for name, given in (("listen", section.listen), ("ranges", section.ranges)):
        if not given:
            mistakes.add(f"dns.{name}", "must not be empty")
    for index, network in enumerate(section.ranges):
        if network.num_addresses < _LEAST_ADDRESSES:
            mistakes.add(
                f"dns.ranges[{index}]",
                f"{network} has fewer than {_LEAST_ADDRESSES} addresses: too few to hash names to"
                " them",
            )
    if len({network.version for network in section.ranges}) < len(section.ranges):
        mistakes.add("dns.ranges", "at most one network of each address family")
    if len({address.is_ipv6 for address in section.listen}) < len(section.listen):
        mistakes.add("dns.listen", "at most one address of each family")
    if section.quarantine < section.ttl:
        mistakes.add("dns.quarantine", "is below dns.ttl: a cached answer could outlive it")
    ours = [address for _, address in config.listeners()]
    for index, upstream in enumerate(section.upstreams):
        if any(_collide(address, upstream) for address in ours) or upstream.port == 0:
            mistakes.add(
                f"dns.upstreams[{index}]", f"{upstream} is the proxy itself, or has port 0"
            )


def _tracing(tracing: TracingConfig, mistakes: Mistakes) -> None:
    if tracing.endpoint and not _URL.fullmatch(tracing.endpoint):
        mistakes.add(
            "tracing.endpoint",
            f"expected an http or https URL without a user, found {tracing.endpoint!r}",
        )
    if not _AGENT.fullmatch(tracing.agent):
        mistakes.add("tracing.agent", f"expected host:port, found {tracing.agent!r}")
    for name, members in (("headers", tracing.headers), ("resource", tracing.resource)):
        for index, member in enumerate(members):
            if (
                not member.partition("=")[0].strip()
                or "=" not in member
                or any(ord(c) < 32 for c in member)
            ):
                # the value may be secret, so it is not repeated
                mistakes.add(f"tracing.{name}[{index}]", "expected name=value")
    if tracing.client_key is not None and tracing.client_certificate is None:
        mistakes.add(
            "tracing.client_key",
            "is the key of a certificate, but tracing.client_certificate names none",
        )


def _directory(config: Config, mistakes: Mistakes) -> None:
    section = config.directory
    if section is None:
        return
    if (section.file is None) == (section.control is None):
        mistakes.add("directory", "expected either `file` or `control`")
    control = section.control
    if control is None:
        return
    _peer("directory.control", control, config.trust_domain, mistakes)
    if control.max_pause < control.min_pause:
        mistakes.add("directory.control.max_pause", "is below directory.control.min_pause")
    if config.identity is None:
        mistakes.add(
            "directory.control", "needs an `identity` section: the connection uses mutual TLS"
        )


def _gateway(config: Config, mistakes: Mistakes) -> None:
    if config.gateway.enabled and config.identity is None:
        mistakes.add(
            "gateway.enabled", "needs an `identity` section: a gateway accepts only mutual TLS"
        )
    if config.gateway.enabled and config.directory is None:
        mistakes.add(
            "gateway.enabled", "needs a `directory` section, which lists the exported services"
        )
    if config.gateway.enabled and config.dns is not None:
        mistakes.add("dns", "a gateway has no application that could send queries")
    if config.inbound.trusted_gateways and config.identity is None:
        mistakes.add(
            "inbound.trusted_gateways",
            "lists identities, but there is no `identity` section, so no peer can present one",
        )


def _listeners(config: Config, mistakes: Mistakes) -> None:
    taken: list[tuple[str, Address]] = []
    for path, address in config.listeners():
        if (other := next((p for p, known in taken if _collide(known, address)), None)) is not None:
            mistakes.add(path, f"{address} is already taken by {other}")
        taken.append((path, address))
    for name, section in (("outbound", config.outbound), ("inbound", config.inbound)):
        fixed = section.fixed_destination
        if (
            fixed is not None
            and (other := next((p for p, known in taken if _collide(known, fixed)), None))
            is not None
        ):
            mistakes.add(
                f"{name}.fixed_destination",
                f"{fixed} is the proxy itself ({other}): that would be a loop",
            )


def _collide(one: Address, two: Address) -> bool:
    """Whether the two cannot be bound at once. A listener on `::` accepts IPv6 only, so 0.0.0.0
    does not conflict.
    """
    if one.port != two.port or one.port == 0 or one.is_ipv6 != two.is_ipv6:
        return False
    return one.host == two.host or "0.0.0.0" in (one.host, two.host) or "::" in (one.host, two.host)
