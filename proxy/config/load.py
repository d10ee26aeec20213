"""Loads the configuration of the proxy (proxy/settings/load.py). Pod settings also come from the
variables of the downward API, tracing settings from those of OpenTelemetry, and the address of a
SPIFFE Workload API from its own. The settings are defined in schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.config import contradictions, endpoint_socket, otel_env
from proxy.config.schema import Config
from proxy.settings.document import Plain
from proxy.settings.load import Loader
from proxy.settings.reference import schema
from proxy.settings.sources import PREFIX

# The variables that the downward API usually sets, and the pod settings they provide.
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


def _is_ours(name: str) -> bool:
    return (
        name.startswith((PREFIX, otel_env.PREFIX))
        or name in DOWNWARD.values()
        or name in (DOWNWARD_ADDRESSES, endpoint_socket.VARIABLE)
    )


def _pod_defaults(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    """Use the downward API's variables for pod settings that the file does not set."""
    pod = values.get("pod")
    if not isinstance(pod, dict | None):
        return
    found: dict[str, Plain] = {
        name: environ[variable] for name, variable in DOWNWARD.items() if environ.get(variable)
    }
    if addresses := environ.get(DOWNWARD_ADDRESSES):
        found["addresses"] = [address.strip() for address in addresses.split(",")]
    if found:
        values["pod"] = {**found, **(pod or {})}


def _tracing_defaults(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    """Use OpenTelemetry's variables for tracing settings that the file does not set."""
    given = values.get("tracing")
    if isinstance(given, dict | None) and (found := otel_env.standard(environ)):
        values["tracing"] = {**found, **(given or {})}


def _defaults(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    _pod_defaults(values, environ)
    endpoint_socket.use_variable(values, environ)
    _tracing_defaults(values, environ)


_loader = Loader(Config, contradictions.check, _is_ours, _defaults, shared=otel_env.PREFIX)


def load(path: Path | None, environ: Mapping[str, str], settle: float = 0.0) -> Config:
    """The configuration from the file at `path` (None: the one in ISTHMUS_CONFIG, if any) and the
    environment. `settle`: see Loader.load. Raises ConfigError with all mistakes.
    """
    return _loader.load(path, environ, settle)


def config_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of the file, generated from the structs."""
    return schema(Config)
