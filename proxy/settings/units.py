"""The units of settings: one notation for each, and errors that say what is expected.

Durations need a unit, because a bare number may mean seconds or milliseconds. Sizes are powers of
two and written so (KiB). Every parser takes a plain value of the document and raises ValueError.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from proxy.identity.spiffe import IdentityPattern
from proxy.net.address import Address
from proxy.settings.document import Plain, closest, describe

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
IP = ipaddress.IPv4Address | ipaddress.IPv6Address

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)\Z")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"([0-9]+)(B|KiB|MiB|GiB)?\Z")
_STATUSES = re.compile(r"(?:([45])xx|([0-9]{3})(?:-([0-9]{3}))?)\Z")
_BYTES: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class PortSwitch(NamedTuple):
    """Yes or no for every port: `ports` lists exceptions, `default` is for all others."""

    default: bool
    ports: Mapping[int, bool]

    def at(self, port: int) -> bool:
        return self.ports.get(port, self.default)


class StatusRange(NamedTuple):
    """HTTP statuses from `low` to `high`, inclusive; written 503, 5xx or 500-504."""

    low: int
    high: int

    def __str__(self) -> str:
        if self.low % 100 == 0 and self.high == self.low + 99:
            return f"{self.low // 100}xx"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


Statuses = tuple[StatusRange, ...]


def within(status: int, ranges: Statuses) -> bool:
    """Whether an HTTP status is in one of the ranges. These contain errors only (`_statuses`), and
    most statuses are not errors.
    """
    return status >= 400 and any(low <= status <= high for low, high in ranges)


class GrpcCode(enum.IntEnum):
    """The error statuses of gRPC (github.com/grpc/grpc, statuscodes.md)."""

    cancelled = 1
    unknown = 2
    invalid_argument = 3
    deadline_exceeded = 4
    not_found = 5
    already_exists = 6
    permission_denied = 7
    resource_exhausted = 8
    failed_precondition = 9
    aborted = 10
    out_of_range = 11
    unimplemented = 12
    internal = 13
    unavailable = 14
    data_loss = 15
    unauthenticated = 16


def parse_duration(value: Plain) -> float:
    """Parse a duration into seconds. Raises ValueError with the expected form."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    if isinstance(value, str) and (match := _DURATION.match(value)):
        return round(float(match[1]) * _SECONDS[match[2]], 6)
    unit = (
        " (a number needs a unit)"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else ""
    )
    raise ValueError(
        f'expected a duration such as "500ms", "10s", "5m" or "1h", found {describe(value)}{unit}'
    )


def parse_size(value: Plain) -> int:
    """Parse a size into bytes. Raises ValueError with the expected form."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.match(value)):
        return int(match[1]) * _BYTES[match[2] or "B"]
    raise ValueError(
        f'expected a size such as "64KiB", "1MiB" or a number of bytes, found {describe(value)}'
    )


def show_duration(value: float) -> str:
    """The shortest exact notation of a duration; the inverse of `parse_duration`."""
    if value == 0:
        return "0"
    for unit in ("d", "h", "m", "s", "ms"):
        if value >= _SECONDS[unit] and abs((count := value / _SECONDS[unit]) - round(count)) < 1e-9:
            return f"{round(count)}{unit}"
    return f"{round(value * 1000, 3)}ms"


def show_size(value: int) -> str:
    """The shortest exact notation of a size; the inverse of `parse_size`."""
    for unit in ("GiB", "MiB", "KiB"):
        if value and value % _BYTES[unit] == 0:
            return f"{value // _BYTES[unit]}{unit}"
    return str(value)


def _address(value: Plain) -> Address:
    if isinstance(value, str):
        return Address.parse(value)
    hint = ' (an IPv6 address needs quotes: "[::1]:4140")' if isinstance(value, list) else ""
    raise ValueError(f'expected an address such as "127.0.0.1:4140", found {describe(value)}{hint}')


def _ip(value: Plain) -> IP:
    try:
        return ipaddress.ip_address(_text(value))
    except ValueError:
        raise ValueError(f"expected an IP address, found {describe(value)}") from None


def _network(value: Plain) -> Network:
    try:
        return ipaddress.ip_network(_text(value))
    except ValueError as error:
        raise ValueError(
            f'expected a subnet such as "10.0.0.0/8", found {describe(value)}: {error}'
        ) from None


def _text(value: Plain) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {describe(value)}")
    return value


def _path(value: Plain) -> Path:
    if not (text := _text(value)) or "\0" in text:
        raise ValueError("expected a path, found empty text or a NUL character")
    return Path(text)


def _port_switch(value: Plain) -> PortSwitch:
    match value:
        case bool():
            return PortSwitch(value, {})
        case list():
            return PortSwitch(False, {parse_port(port): True for port in value})
        case dict():
            for state in value.values():
                if not isinstance(state, bool):
                    raise ValueError(
                        f"expected true or false for each port, found {describe(state)}"
                    )
            ports = {
                parse_port(port): state is True
                for port, state in value.items()
                if port != "default"
            }
            return PortSwitch(value.get("default") is True, ports)
    raise ValueError(
        "expected true, false, a list of ports, or a mapping of ports to true or false, found"
        f" {describe(value)}"
    )


def _statuses(value: Plain) -> StatusRange:
    if (
        isinstance(value, int | str)
        and not isinstance(value, bool)
        and (match := _STATUSES.match(str(value)))
    ):
        if match[1]:
            return StatusRange(int(match[1]) * 100, int(match[1]) * 100 + 99)
        low = int(match[2])
        high = int(match[3] or low)
        if 400 <= low <= high <= 599:
            return StatusRange(low, high)
    raise ValueError(
        f"expected statuses such as 503, 5xx or 500-504, from 400 to 599, found {describe(value)}"
    )


def _grpc_code(value: Plain) -> GrpcCode:
    name = value.lower() if isinstance(value, str) else ""
    for code in GrpcCode:
        if name == code.name or (
            isinstance(value, int) and not isinstance(value, bool) and value == code.value
        ):
            return code
    near = closest(name, GrpcCode.__members__) if name else ""
    raise ValueError(
        f"expected a gRPC status such as unavailable or 14, found {describe(value)}{near}"
    )


def parse_port(value: Plain) -> int:
    """Parse a port; as a mapping key it may be text. Raises ValueError with the expected form."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError(f"expected a port from 1 to 65535, found {describe(value)}")
    return value


LEAVES: Mapping[object, tuple[Callable[[Plain], object], str, Callable[[Any], str]]] = {
    Address: (_address, "address", str),
    IP: (_ip, "IP address", str),
    Network: (_network, "subnet", str),
    Path: (_path, "path", str),
    PortSwitch: (
        _port_switch,
        "true, false or ports",
        lambda switch: "true" if switch.default else "false",
    ),
    StatusRange: (_statuses, "HTTP statuses", str),
    GrpcCode: (_grpc_code, "gRPC status", lambda code: str(code.name)),
    IdentityPattern: (lambda value: IdentityPattern.parse(_text(value)), "identity pattern", str),
    str: (_text, "text", str),
}  # fmt: skip
