"""Labels and annotations that discovery reads, and their values.

The injector adds a sidecar to a pod and gives the pod a label. An annotation lists the ports
that the sidecar does not intercept. If a value cannot be read, the safer meaning is used: a pod
with an unknown label value is meshed, and a list of ports with a mistake is ignored. So a typing
error makes a connection fail, and never sends it in clear text.
"""

from __future__ import annotations

from collections.abc import Mapping

from control.contract import ADMIN_PORT, MOST_PORTS, Hint

# Of pods. The injector writes them. A manifest that has its own sidecar can also set them.
MESHED = "isthmus.dev/meshed"  # label: "true"
SKIP_INBOUND_PORTS = (
    "isthmus.dev/skip-inbound-ports"  # annotation: ports and ranges, "4567,4568,5000-5010"
)
ADMIN = "isthmus.dev/admin-port"  # annotation: "4191"

# Of services.
OPAQUE_PORTS = "isthmus.dev/opaque-ports"  # annotation: ports and ranges that clients connect to
EXPORTED = "isthmus.dev/exported"  # label: "true": clients of other clusters may use it
# annotation: the SPIFFE ID of endpoints that are not pods of this cluster
ENDPOINT_IDENTITY = "isthmus.dev/endpoint-identity"

ZONE = "topology.kubernetes.io/zone"
SERVICE_NAME = "kubernetes.io/service-name"

# appProtocol: the names of IANA and Kubernetes (KEP-3726), and names that other meshes use.
# Everything else is detected.
_PROTOCOLS: Mapping[str, Hint] = {
    "http": Hint.HTTP1,
    "kubernetes.io/ws": Hint.HTTP1,
    "kubernetes.io/h2c": Hint.HTTP2,
    "http2": Hint.HTTP2,
    "grpc": Hint.HTTP2,
    "https": Hint.OPAQUE,
    "kubernetes.io/wss": Hint.OPAQUE,
    "tls": Hint.OPAQUE,
    "tcp": Hint.OPAQUE,
    "mysql": Hint.OPAQUE,
    "mongo": Hint.OPAQUE,
    "redis": Hint.OPAQUE,
    "postgres": Hint.OPAQUE,
    "postgresql": Hint.OPAQUE,
}


class MetadataError(ValueError):
    """A value cannot be read. The message gives the reason for people."""


def is_meshed(labels: Mapping[str, str]) -> bool:
    """Whether a pod has a sidecar."""
    return labels.get(MESHED, "false") != "false"


def is_exported(labels: Mapping[str, str]) -> bool:
    """Whether the gateway of this cluster serves a service. Any other value than "true" means
    no."""
    return labels.get(EXPORTED) == "true"


def hint(app_protocol: str | None) -> Hint:
    """The protocol hint for a port's `appProtocol`."""
    return _PROTOCOLS.get((app_protocol or "").lower(), Hint.DETECT)


def port_list(text: str) -> frozenset[int]:
    """Parse ports and ranges, separated by commas. Raises MetadataError."""
    found: set[int] = set()
    for part in text.split(","):
        if not part.strip():
            continue
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        low = _port(first, part)
        high = _port(last, part) if dash else low
        if high < low:
            raise MetadataError(f"{part.strip()[:40]!r} is a range whose end is below its start")
        if len(found) + high - low >= MOST_PORTS:
            raise MetadataError(f"more than {MOST_PORTS} ports")
        found.update(range(low, high + 1))
    return frozenset(found)


def skipped_ports(annotations: Mapping[str, str]) -> frozenset[int]:
    """The ports of a meshed pod that its sidecar does not intercept. Raises MetadataError."""
    admin = annotations.get(ADMIN)
    return port_list(annotations.get(SKIP_INBOUND_PORTS, "")) | {
        _port(admin.strip(), admin) if admin is not None else ADMIN_PORT
    }


def _port(text: str, whole: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise MetadataError(f"{whole.strip()[:40]!r} is neither a port nor a range like 4000-4010")
    return int(text)
