"""The configuration of a proxy: read from its file and the environment, checked as a whole, typed and frozen.

It comes from one YAML file and from the environment, which wins: `ISTHMUS_OUTBOUND__DETECT_TIMEOUT=5s` is the setting
`outbound.detect_timeout`, `ISTHMUS_CLUSTER=east` the setting `cluster`; values are written as in the file. All mistakes are reported
together, each with its path, and then those that only show when settings are held against each other.

The settings themselves stand in schema.py.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy import files
from proxy.config import otel_env
from proxy.config.decode import decode, fields, is_struct
from proxy.config.document import DocumentError, Mistakes, Plain, closest, said
from proxy.config.document import load as load_document
from proxy.config.reference import schema
from proxy.config.schema import Config, LogConfig
from proxy.config.schema_tracing import TracingConfig
from proxy.identity.spiffe import SpiffeIdError, check_trust_domain
from proxy.net.address import Address

__all__ = ["Config", "ConfigError", "LogConfig", "config_schema", "load", "variable"]

PREFIX = "ISTHMUS_"
# Seconds, for `isthmus run`: a file that is cut off can be a valid one that asks for less.
SETTLE = 0.5
# What Kubernetes' downward API is usually asked to put into the environment, and the setting of the pod that it stands for.
DOWNWARD = {
    "name": "POD_NAME",
    "namespace": "POD_NAMESPACE",
    "uid": "POD_UID",
    "ip": "POD_IP",
    "node": "NODE_NAME",
    "zone": "POD_ZONE",
    "service_account": "SERVICE_ACCOUNT",
}
DOWNWARD_ADDRESSES = "POD_IPS"
# Every setting and an allow-list of ten thousand identities fit many times.
MOST_BYTES = 4 * 1024 * 1024
# Addresses are made by hashing names: in a range that is hardly used, hashes seldom meet.
_LEAST_ADDRESSES = 4096
# The variables that Kubernetes sets in each container for each Service of the namespace (`enableServiceLinks`), as `name=value`. A Service
# may be called anything, so the value too has to be one that Kubernetes writes.
_SERVICE_LINK = re.compile(
    r"[A-Z](?:[A-Z0-9_]*[A-Z0-9])?_"
    r"(?:SERVICE_HOST=[0-9A-Fa-f.:]+"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=[0-9]+"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP))?=(?:tcp|udp|sctp)://[^/\s]+:[0-9]+"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT=[0-9]+|ADDR=[0-9A-Fa-f.:]+))"
)
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s@/?#:\[\]]+)(:[0-9]{1,5})?(/[^\s]*)?")
_AGENT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s@/?#:\[\]]+):[0-9]{1,5}")
_CLUSTER = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


class ConfigError(DocumentError):
    """The configuration is wrong. `.mistakes` has one line for each thing that is, with its path."""


def load(path: Path | None, environ: Mapping[str, str], settle: float = 0.0) -> Config:
    """The configuration from the file at `path` (None: the one that ISTHMUS_CONFIG names, if any) and the environment.

    A file that has been modified within the last `settle` seconds has to be read twice, so far apart, with one result (files.read_settled).
    Raises ConfigError with all mistakes; a file that cannot be read is one of them.
    """
    mistakes = Mistakes()
    environ = _ours(environ, mistakes)
    if path is None and (named := environ.get(f"{PREFIX}CONFIG")):
        path = Path(named)
    source = str(path) if path is not None else "the environment"
    values = _file(path, source, settle) if path is not None else {}
    _pod_defaults(values, environ)
    _tracing_defaults(values, environ)
    _overrides(values, environ, mistakes)
    config: Config | None = decode(values, Config, "", mistakes)
    if config is not None:
        _contradictions(config, mistakes)
    if config is None or mistakes:
        raise ConfigError(source, mistakes.found())
    return config


def _file(path: Path, source: str, settle: float) -> dict[str, Plain]:
    def read() -> tuple[str, bytes]:
        text = files.read_text(path, MOST_BYTES)
        return text, text.encode()

    try:
        values = load_document(files.read_settled(read, [path], settle)[0], source)
    except files.FileUnusable as error:
        raise ConfigError(source, [error.reason]) from error
    except DocumentError as error:
        raise ConfigError(source, error.mistakes) from error
    if not isinstance(values, dict | None):
        raise ConfigError(source, [f"expected a mapping of sections, found {said(values)}"])
    return values or {}


def _ours(environ: Mapping[str, str], mistakes: Mistakes) -> dict[str, str]:
    """The variables that are looked at here, without those that speak of a Service. One that is not UTF-8, which the system does not
    mind, is a mistake and left out."""
    found = {}
    for name, text in sorted(environ.items()):
        ours = name.startswith((PREFIX, otel_env.PREFIX)) or name in DOWNWARD.values() or name == DOWNWARD_ADDRESSES
        if ours and not _SERVICE_LINK.fullmatch(f"{name}={text}"):
            try:
                f"{name}{text}".encode()
            except UnicodeEncodeError:
                if name.startswith(otel_env.PREFIX):
                    continue  # it is not for us alone, and no reason not to start
                mistakes.add(name.encode("ascii", "backslashreplace").decode(), "not UTF-8")
            else:
                found[name] = text
    return found


def _pod_defaults(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    """What the downward API says in the environment stands in for what the file leaves open."""
    pod = values.get("pod")
    if not isinstance(pod, dict | None):
        return
    found: dict[str, Plain] = {name: environ[variable] for name, variable in DOWNWARD.items() if environ.get(variable)}
    if addresses := environ.get(DOWNWARD_ADDRESSES):
        found["addresses"] = [address.strip() for address in addresses.split(",")]
    if found:
        values["pod"] = {**found, **(pod or {})}


def _tracing_defaults(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    """OpenTelemetry's own variables stand in for what the file leaves open."""
    given = values.get("tracing")
    if isinstance(given, dict | None) and (found := otel_env.standard(environ)):
        values["tracing"] = {**found, **(given or {})}


def _overrides(values: dict[str, Plain], environ: Mapping[str, str], mistakes: Mistakes) -> None:
    """Puts ISTHMUS_<SECTION>__<FIELD> over what the file says."""
    known = {variable(section, field): (section, field) for section, field in _names()}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name == f"{PREFIX}CONFIG":
            continue
        if name not in known:
            # A variable without `__` may belong to another program, unless it is a slip.
            near = closest(name.removeprefix(PREFIX), (other.removeprefix(PREFIX) for other in known))
            if "__" in name or near:
                mistakes.add(name, f"no such setting{near.replace(chr(39), chr(39) + PREFIX, 1)}")
            continue
        section, field = known[name]
        try:
            value = load_document(text, name)
        except DocumentError as error:
            mistakes.add(name, "; ".join(error.mistakes))
            continue
        place = values
        if section:
            if not isinstance(values.get(section), dict):
                values[section] = {}
            place = typing.cast("dict[str, Plain]", values[section])
        place[field] = value


def variable(section: str, field: str) -> str:
    """The name of the environment variable of a setting; `section` is "" for the settings at the top."""
    return PREFIX + (f"{section}__{field}" if section else field).upper()


def _names() -> Iterator[tuple[str, str]]:
    for name, _, form in fields(Config):
        if is_struct(form.type):
            yield from ((name, field) for field, _, _ in fields(form.type))
        else:
            yield "", name


def _contradictions(config: Config, mistakes: Mistakes) -> None:
    """What is wrong only when settings are held against each other."""
    if not _CLUSTER.fullmatch(config.cluster):
        mistakes.add("cluster", f"expected lower-case letters, digits and dashes, found {config.cluster!r}")
    try:
        check_trust_domain(config.trust_domain)
    except SpiffeIdError as error:
        mistakes.add("trust_domain", str(error))
    _listeners(config, mistakes)
    _workers(config, mistakes)
    _gateway(config, mistakes)
    inbound = config.inbound
    if config.identity is None:
        if inbound.require_identity.default or any(inbound.require_identity.ports.values()):
            mistakes.add("inbound.require_identity", "asks for identities, but there is no `identity` section, so no peer can show one")
        if inbound.allow:
            mistakes.add("inbound.allow", "names identities, but there is no `identity` section, so no peer can show one")
    elif not config.identity.roots:
        mistakes.add("identity.roots", "names no file: nobody would be trusted")
    if both := set(inbound.http_ports) & set(inbound.opaque_ports):
        mistakes.add("inbound.http_ports", f"takes HTTP only on {min(both)}, which inbound.opaque_ports declares to be something else")
    for port in inbound.allow:
        if inbound.require_identity.ports.get(port) is False:
            mistakes.add(f"inbound.allow.{port}", "has an allow-list, but inbound.require_identity says false for the same port")
    _dns(config, mistakes)
    if config.http.max_target_bytes > config.http.max_head_bytes:
        mistakes.add("http.max_target_bytes", "is greater than http.max_head_bytes, of which the target is a part")
    if config.pool.max_idle_per_endpoint > config.pool.max_connections_per_endpoint:
        mistakes.add("pool.max_idle_per_endpoint", "is greater than pool.max_connections_per_endpoint")
    _tracing(config.tracing, mistakes)
    if config.pool.idle_timeout >= config.http.idle_timeout:
        mistakes.add("pool.idle_timeout", "is not below http.idle_timeout: other proxies would close connections that are about to be used")


def _workers(config: Config, mistakes: Mistakes) -> None:
    if config.workers == 1:
        return
    for path, address in config.listeners():
        if address.port == 0 and not path.startswith("admin."):
            mistakes.add(path, f"{address} would be another port for each of the {config.workers} workers")


def _dns(config: Config, mistakes: Mistakes) -> None:
    section = config.dns
    if section is None:
        return
    if not config.outbound.listen:
        mistakes.add("dns", "hands out addresses that lead to the outbound listener, but outbound.listen is empty")
    for name, given in (("listen", section.listen), ("ranges", section.ranges)):
        if not given:
            mistakes.add(f"dns.{name}", "must not be empty")
    for index, network in enumerate(section.ranges):
        if network.num_addresses < _LEAST_ADDRESSES:
            mistakes.add(f"dns.ranges[{index}]", f"{network} has less than {_LEAST_ADDRESSES} addresses: too few to make them of names")
    if len({network.version for network in section.ranges}) < len(section.ranges):
        mistakes.add("dns.ranges", "at most one network of each address family")
    if len({address.is_ipv6 for address in section.listen}) < len(section.listen):
        mistakes.add("dns.listen", "at most one address of each family")
    if section.quarantine < section.ttl:
        mistakes.add("dns.quarantine", "is below dns.ttl: an answer could outlive it")
    ours = [address for _, address in config.listeners()]
    for index, upstream in enumerate(section.upstreams):
        if any(_collide(address, upstream) for address in ours) or upstream.port == 0:
            mistakes.add(f"dns.upstreams[{index}]", f"{upstream} is the proxy itself, or nobody")


def _tracing(tracing: TracingConfig, mistakes: Mistakes) -> None:
    if tracing.endpoint and not _URL.fullmatch(tracing.endpoint):
        mistakes.add("tracing.endpoint", f"expected an http or https URL without a user, found {tracing.endpoint!r}")
    if not _AGENT.fullmatch(tracing.agent):
        mistakes.add("tracing.agent", f"expected host:port, found {tracing.agent!r}")
    for name, members in (("headers", tracing.headers), ("resource", tracing.resource)):
        for index, member in enumerate(members):
            if not member.partition("=")[0].strip() or "=" not in member or any(ord(c) < 32 for c in member):
                mistakes.add(f"tracing.{name}[{index}]", "expected name=value")  # which may be a secret: it is not repeated
    if tracing.client_key is not None and tracing.client_certificate is None:
        mistakes.add("tracing.client_key", "is the key of a certificate, but tracing.client_certificate names none")


def _gateway(config: Config, mistakes: Mistakes) -> None:
    if config.gateway.enabled and config.identity is None:
        mistakes.add("gateway.enabled", "needs an `identity` section: a gateway takes mutual TLS only")
    if config.gateway.enabled and config.directory is None:
        mistakes.add("gateway.enabled", "needs a `directory` section, which says what is exported")
    if config.gateway.enabled and config.dns is not None:
        mistakes.add("dns", "a gateway has no application whose questions it could answer")
    if config.inbound.trusted_gateways and config.identity is None:
        mistakes.add("inbound.trusted_gateways", "names identities, but there is no `identity` section, so no peer can show one")


def _listeners(config: Config, mistakes: Mistakes) -> None:
    taken: list[tuple[str, Address]] = []
    for path, address in config.listeners():
        if (other := next((p for p, known in taken if _collide(known, address)), None)) is not None:
            mistakes.add(path, f"{address} is already taken by {other}")
        taken.append((path, address))
    for name, section in (("outbound", config.outbound), ("inbound", config.inbound)):
        fixed = section.fixed_destination
        if fixed is not None and (other := next((p for p, known in taken if _collide(known, fixed)), None)) is not None:
            mistakes.add(f"{name}.fixed_destination", f"{fixed} is the proxy itself ({other}): that would be a loop")


def _collide(one: Address, two: Address) -> bool:
    """Whether both cannot be bound at once. A listener on `::` takes IPv6 only, so it does not meet one on 0.0.0.0."""
    if one.port != two.port or one.port == 0 or one.is_ipv6 != two.is_ipv6:
        return False
    return one.host == two.host or "0.0.0.0" in (one.host, two.host) or "::" in (one.host, two.host)


def config_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of the file, made from the same structs."""
    return schema(Config)
