"""The JSON schema of a directory document. Only `parse` finds contradictions between entries."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.directory.policy import Policy
from proxy.directory.reader import MAX_WEIGHT, NOT_SERVED
from proxy.directory.snapshot import Hint
from proxy.directory.splits import MAX_SHARE, MOST_BACKENDS
from proxy.directory.values import MOST_ALLOWED, MOST_PORTS
from proxy.settings.reference import schema

_LABEL = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
_DOMAIN = {
    "type": "string",
    "maxLength": 253,
    "pattern": r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\.?$",
}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_PROTOCOL = {"enum": [hint.value for hint in Hint]}
_IDENTITY = {"type": "string", "pattern": "^spiffe://[^/]+/ns/[^/]+/sa/[^/]+$"}
_FLAG = {"type": "boolean"}


def directory_schema() -> dict[str, object]:
    """The schema of the file (JSON Schema 2020-12), for editors and checks."""
    top = {
        "cluster": _LABEL,
        "domain": _DOMAIN,
        "skip_ports": _list(_PORT, maxItems=MOST_PORTS),
        "allow_identity_loss": {"anyOf": [_FLAG, _list({"type": "string"}, maxItems=MOST_ALLOWED)]},
        "services": _list(_service()),
        "clusters": _list(_cluster()),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Isthmus directory",
        **_closed(top, "services"),
    }


def _service() -> dict[str, object]:
    endpoint = {
        "address": {"type": "string"},
        "identity": _IDENTITY,
        "ports": {
            "type": "object",
            "additionalProperties": {"anyOf": [_PORT, {"const": NOT_SERVED}]},
        },
        "skip_ports": _list(_PORT, maxItems=MOST_PORTS),
        "ready": _FLAG,
        "weight": {"type": "integer", "minimum": 1, "maximum": MAX_WEIGHT},
        "zone": {"type": "string", "maxLength": 63},
    }
    backend = {
        "service": _LABEL,
        "namespace": _LABEL,
        "cluster": _LABEL,
        "weight": {"type": "integer", "minimum": 0, "maximum": MAX_SHARE},
    }
    failover = {
        "clusters": _list(_LABEL, minItems=1),
        "below": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
    }
    service = {
        "name": _LABEL,
        "namespace": _LABEL,
        "addresses": _list({"type": "string"}),
        "ports": _list(
            _closed({"port": _PORT, "target_port": _PORT, "protocol": _PROTOCOL}, "port"),
            minItems=1,
        ),
        "endpoints": _list(_closed(endpoint, "address")),
        "export": _FLAG,
        "split": _list(_closed(backend, "service", "weight"), maxItems=MOST_BACKENDS),
        "failover": _closed(failover, "clusters"),
        "policy": schema(Policy),
    }
    return _closed(service, "name", "ports")


def _cluster() -> dict[str, object]:
    gateway = {"address": {"type": "string"}, "host": _DOMAIN, "port": _PORT, "identity": _IDENTITY}
    service = {
        "name": _LABEL,
        "namespace": _LABEL,
        "ports": _list(_closed({"port": _PORT, "protocol": _PROTOCOL}, "port"), minItems=1),
        "policy": schema(Policy),
    }
    return _closed(
        {
            "name": _LABEL,
            "domain": _DOMAIN,
            "gateways": _list(
                _closed(gateway, "identity")
                | {"oneOf": [{"required": ["address"]}, {"required": ["host"]}]}
            ),
            "services": _list(_closed(service, "name", "ports")),
        },
        "name",
    )


def _list(items: Mapping[str, object], **bounds: int) -> dict[str, object]:
    return {"type": "array", "items": items, **bounds}


def _closed(properties: Mapping[str, object], *required: str) -> dict[str, object]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": dict(properties),
        "required": list(required),
    }
