"""Reads single values of a directory document. A reader that finds a mistake records it with its
path, and returns a harmless value."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from proxy.directory.service_names import DOMAIN, LABEL, LONGEST
from proxy.directory.snapshot import Allowance, Hint, Port
from proxy.identity.spiffe import SpiffeId, SpiffeIdError
from proxy.settings.document import (
    Mistakes,
    Plain,
    child,
    closest,
    describe,
    mapping,
    sequence,
    unknown_keys,
)

MOST_PORTS = 1024  # in a list of ports
MOST_ALLOWED = 100_000  # services and addresses in allow_identity_loss

_HINTS: Mapping[str, Hint] = {hint.value: hint for hint in Hint}


class Values:
    """Converts the values of one document. All mistakes go into `mistakes`."""

    def __init__(self, mistakes: Mistakes) -> None:
        self.mistakes = mistakes
        self._identities: dict[str, SpiffeId] = {}  # most endpoints of a service share one
        self._port_sets: dict[frozenset[int], frozenset[int]] = {}

    def label(self, value: Plain, path: str) -> str:
        if isinstance(value, str) and LABEL.match(value):
            return value
        expected = "expected a name of at most 63 lower-case letters, digits and dashes"
        self.mistakes.add(
            path, "must be given" if value is None else f"{expected}, found {describe(value)}"
        )
        return ""

    def domain(self, value: Plain, path: str) -> str:
        if isinstance(value, str) and len(value) <= LONGEST and DOMAIN.match(value):
            return value
        self.mistakes.add(
            path,
            f"expected a domain name in lower case such as cluster.local, found {describe(value)}",
        )
        return ""

    def host(self, value: Plain, path: str) -> str:
        """An IP literal in canonical form."""
        try:
            literal = ipaddress.ip_address(value) if isinstance(value, str) else None
        except ValueError:
            literal = None
        if literal is None:
            self.mistakes.add(
                path,
                (
                    "must be given"
                    if value is None
                    else f"expected an IP address, found {describe(value)}"
                ),
            )
            return ""
        if literal.is_unspecified or literal.is_multicast:
            self.mistakes.add(path, f"{literal} is not the address of a single host")
        mapped = literal.ipv4_mapped if isinstance(literal, ipaddress.IPv6Address) else None
        return str(mapped or literal)

    def port(self, value: Plain, path: str) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
            return value
        self.mistakes.add(
            path,
            (
                "must be given"
                if value is None
                else f"expected a port from 1 to 65535, found {describe(value)}"
            ),
        )
        return 0

    def port_set(self, value: Plain, path: str) -> frozenset[int]:
        """A list of ports. It may be empty."""
        listed = sequence(value, path, self.mistakes)
        if len(listed) > MOST_PORTS:
            self.mistakes.add(path, f"at most {MOST_PORTS} ports, found {len(listed)}")
        found = frozenset(self.port(item, f"{path}[{index}]") for index, item in enumerate(listed))
        return self._port_sets.setdefault(found, found)

    def allowance(self, value: Plain, path: str) -> Allowance:
        """True, or a list of services and IP addresses."""
        if isinstance(value, bool):
            return Allowance(everything=value)
        listed = sequence(value, path, self.mistakes)
        if len(listed) > MOST_ALLOWED:
            self.mistakes.add(
                path,
                f"at most {MOST_ALLOWED} entries, found {len(listed)}: use true to permit"
                " everything",
            )
        return Allowance(
            names=frozenset(
                self._service_or_host(item, f"{path}[{index}]") for index, item in enumerate(listed)
            )
        )

    def _service_or_host(self, value: Plain, path: str) -> str:
        if isinstance(value, str) and "/" in value:
            namespace, _, name = value.partition("/")
            if LABEL.match(namespace) and LABEL.match(name):
                return value
            self.mistakes.add(
                path,
                f"expected a service as namespace/name, or an IP address, found {describe(value)}",
            )
            return ""
        return self.host(value, path)

    def number(self, value: Plain, path: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`. `low` on a mistake."""
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.mistakes.add(
            path, f"expected a whole number from {low} to {high}, found {describe(value)}"
        )
        return low

    def flag(self, value: Plain, path: str) -> bool:
        if not isinstance(value, bool):
            self.mistakes.add(path, f"expected true or false, found {describe(value)}")
        return value is True

    def hint(self, value: Plain, path: str) -> Hint:
        hint = _HINTS.get(value) if isinstance(value, str) else None
        if hint is None:
            near = closest(value, _HINTS) if isinstance(value, str) else ""
            self.mistakes.add(
                path, f"expected one of {', '.join(_HINTS)}; found {describe(value)}{near}"
            )
        return hint or Hint.DETECT

    def identity(self, value: Plain, path: str) -> SpiffeId | None:
        if not isinstance(value, str):
            # No identity would mean clear text. An empty value must not cause that by accident.
            self.mistakes.add(
                path,
                f"expected a SPIFFE ID, found {describe(value)} (omit the key for an endpoint"
                " without a proxy)",
            )
            return None
        found = self._identities.get(value)
        if found is None:
            try:
                found = self._identities[value] = SpiffeId.parse(value)
            except SpiffeIdError as error:
                self.mistakes.add(path, str(error))
        return found

    def ports(self, value: Plain, path: str, keys: tuple[str, ...]) -> list[Port]:
        """The ports of a service. Each entry may have the keys `keys`."""
        ports: dict[int, Port] = {}
        for index, item in enumerate(sequence(value, path, self.mistakes)):
            here = f"{path}[{index}]"
            given = mapping(item, here, self.mistakes)
            if given is None:
                continue
            unknown_keys(given, keys, here, self.mistakes)
            port = self.port(given.get("port"), child(here, "port"))
            target = (
                self.port(given["target_port"], child(here, "target_port"))
                if "target_port" in given
                else port
            )
            if port in ports and port:
                self.mistakes.add(child(here, "port"), f"port {port} is listed twice")
            ports[port] = Port(
                port, target, self.hint(given.get("protocol", "detect"), child(here, "protocol"))
            )
        if not ports:
            self.mistakes.add(path, "at least one port must be given")
        return list(ports.values())
